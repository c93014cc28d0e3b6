# %% [markdown]
# # 4. Every published system on one page
#
# Sparse attention is published as dozens of kernels. As masks they are expressions, and all run
# through the same compiler. `docs/systems.md` lists them with their sources, and says what is no
# mask and why.

# %%
import torch

import flexsparse as fs
from flexsparse import masks
from flexsparse.masks import causal

N = 2048
row, column = torch.arange(32)[:, None], torch.arange(32)
random_blocks = torch.randint(32, (32, 3), generator=torch.Generator().manual_seed(0))
important = torch.tensor([5, 300, 301, 900, 1400])
clips = {"tokens_per_frame": 256}
page = {
    "causal": causal,
    "sliding window": causal & masks.window(300),
    "StreamingLLM": masks.streaming_llm(64, 512),
    "Longformer": masks.longformer(256, 96),
    "BigBird": masks.bigbird(32, 64, 3, random_blocks),
    "Sparse Transformer, strided": masks.sparse_transformer_strided(128),
    "Sparse Transformer, fixed": masks.sparse_transformer_fixed(128, 32),
    "prefix LM": masks.prefix(600),
    "packed documents": causal & masks.same_document(torch.arange(N) // 500),
    "MInference, vertical-slash": causal
    & masks.vertical_slash(important, torch.tensor([0, 64, 700])),
    "MInference, A-shape": masks.a_shape(128, 400),
    "TriangleMix, tri-shape": masks.tri_shape(N, 128, 400, 200),
    "NATTEN, 2-D": masks.neighborhood((32, 64), (9, 17)),
    "video: frames in order": masks.frame_causal(**clips),
    "Radial Attention": masks.radial_attention(32, 64, block_size=16),
    "block diffusion": masks.block_diffusion(N // 2, 128),
    "Star Attention": masks.star_attention(1700, 400),
    "rollouts of one prompt": masks.shared_prefix([0, 500, 800, 1200, 1500, N], [0, 0, 1, 1, 0]),
    "FlashMask, a window": masks.flashmask((torch.arange(N) + 300).view(1, 1, N, 1), causal=True),
    "block-sparse": causal & masks.block_sparse((row + 2 * column) % 5 == 0, block_size=64),
}
# one head for each system: the same picture shows what each computes
fs.draw(
    fs.per_head([mask.named(name) for name, mask in page.items()]),
    N,
    N,
    block_size=32,
    title="Published patterns at 2,048 tokens, in blocks of 32 x 32",
)

# %% [markdown]
# Many systems give each head its own pattern. These are whole layers:

# %%
s2 = masks.s2_attention(8, local_blocks=4, vert_stride=8, block_size=64)
fs.draw(s2, N, N, title="S2-Attention: heads take turns at the strided columns")

# %%
duo = masks.duo_attention([1, 0, 0, 1, 0, 0, 0, 0], sink_size=64, recent_size=256)
fs.draw(duo, N, N, title="DuoAttention: two retrieval heads, six streaming heads")

# %% [markdown]
# What each costs, as a part of dense attention. Blocks are what is computed, and elements what is
# kept: the difference is what blocks of 128 x 128 give away.

# %%
for name, mask in page.items():
    compiled = fs.compile_mask(mask, N, N)
    blocks = compiled.cost().blocks / (N // 128) ** 2
    index = torch.arange(N)
    elements = mask(0, 0, index[:, None], index).float().mean().item()
    print(f"{name:28} {blocks:6.1%} of blocks {elements:6.1%} of elements")

# %% [markdown]
# All of them run, and each is what its rule says.

# %%
q, k, v = torch.randn(3, 1, 2, N, 32)
for name in ("BigBird", "NATTEN, 2-D", "TriangleMix, tri-shape"):
    attend = fs.compile_mask(page[name], N, N)
    difference = attend(q, k, v, executor="blockwise") - attend(q, k, v, executor="reference")
    print(f"{name:28} largest difference to dense: {difference.abs().max().item():.1e}")
