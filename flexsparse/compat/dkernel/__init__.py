"""S2-Attention's modules (the package dkernel): change the import and keep the script.

    from dkernel import LocalStrideSparseAttention                      # before
    from flexsparse.compat.dkernel import LocalStrideSparseAttention    # after

Names, order and defaults of the arguments are theirs. Added are chunked prefill, gradients and the
LSE for packed and padded sequences too, any device, block_size and head_dim, and rows without keys:
their output is 0 and their LSE -inf.
"""

from flexsparse.compat.dkernel.modules import LocalStrideSparseAttention, SparseAttention
from flexsparse.compat.dkernel.patterns import combine_attn_partitions, get_sparse_attn_mask

__all__ = [
    "LocalStrideSparseAttention",
    "SparseAttention",
    "combine_attn_partitions",
    "get_sparse_attn_mask",
]
