"""The pattern library: attention patterns by name, written in flexsparse's public names alone.

Each is a Mask or a function that returns one; combine them with & | ~ and per_head. Those of
`systems`, s2_attention and phi3_small return the masks of all heads.
"""

from flexsparse.masks.diffusion import block_diffusion, dflash
from flexsparse.masks.documents import bifurcated, packed, padding, same_document
from flexsparse.masks.grids import axial, neighborhood, sliding_tile
from flexsparse.masks.models import (
    bigbird,
    combiner_fixed,
    longformer,
    orion_msp,
    sparse_transformer_fixed,
    sparse_transformer_strided,
)
from flexsparse.masks.positions import (
    causal,
    chunked,
    dilated,
    full,
    global_tokens,
    prefix,
    sink,
    strided,
    window,
)
from flexsparse.masks.radial import radial_attention
from flexsparse.masks.ranges import attention_slices, flashmask
from flexsparse.masks.streaming import (
    a_shape,
    block_streaming,
    duo_streaming,
    star_attention,
    streaming_llm,
    token_streaming,
    tri_shape,
)
from flexsparse.masks.strides import (
    local_stride,
    phi3_small,
    relative_stride,
    s2_attention,
)
from flexsparse.masks.systems import (
    block_sparse_attention,
    duo_attention,
    longgen,
    lserve,
    moa,
)
from flexsparse.masks.tables import (
    block_sparse,
    clusters,
    hash_sparse,
    kept_keys,
    qk_sparse,
    vertical_slash,
    vertical_slash_blocks,
)
from flexsparse.masks.trees import shared_prefix, token_tree
from flexsparse.masks.video import (
    attention_tile,
    diagonal,
    frame_causal,
    mminference_grid,
    multi_diagonal,
    spatial_head,
    temporal_head,
    vertical_stripe,
)

__all__ = [
    "a_shape",
    "attention_slices",
    "attention_tile",
    "axial",
    "bifurcated",
    "bigbird",
    "block_diffusion",
    "block_sparse",
    "block_sparse_attention",
    "block_streaming",
    "causal",
    "chunked",
    "clusters",
    "combiner_fixed",
    "dflash",
    "diagonal",
    "dilated",
    "duo_attention",
    "duo_streaming",
    "flashmask",
    "frame_causal",
    "full",
    "global_tokens",
    "hash_sparse",
    "kept_keys",
    "local_stride",
    "longformer",
    "longgen",
    "lserve",
    "mminference_grid",
    "moa",
    "multi_diagonal",
    "neighborhood",
    "orion_msp",
    "packed",
    "padding",
    "phi3_small",
    "prefix",
    "qk_sparse",
    "radial_attention",
    "relative_stride",
    "s2_attention",
    "same_document",
    "shared_prefix",
    "sink",
    "sliding_tile",
    "sparse_transformer_fixed",
    "sparse_transformer_strided",
    "spatial_head",
    "star_attention",
    "streaming_llm",
    "strided",
    "temporal_head",
    "token_streaming",
    "token_tree",
    "tri_shape",
    "vertical_slash",
    "vertical_slash_blocks",
    "vertical_stripe",
    "window",
]
