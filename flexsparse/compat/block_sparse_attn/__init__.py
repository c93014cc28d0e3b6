"""Block-Sparse-Attention's functions: change the import and keep the script.

    from block_sparse_attn import block_sparse_attn_func                    # before
    from flexsparse.compat.block_sparse_attn import block_sparse_attn_func  # after

Names, order and defaults of the arguments are theirs, and so are the rules of the four patterns.
Added are gradients of token streaming, dropout with it, any device, head_dim and float dtype, and
sentences for what were asserts or illegal memory accesses.

Every executor gives the same bits on every run, `deterministic` or not; only `blockwise` on CUDA
(which runs head_dims below 16) needs torch.use_deterministic_algorithms(True) for that.

The plan of a call is kept: calls with the same lengths, types, numbers and base_blockmask analyse
nothing. All of these are read by value, which waits for the device.

Source: github.com/mit-han-lab/Block-Sparse-Attention, block_sparse_attn_interface.py.
"""

from flexsparse.compat.block_sparse_attn.functions import (
    block_sparse_attn_func,
    block_streaming_attn_func,
    token_streaming_attn_func,
)

__all__ = ["block_sparse_attn_func", "block_streaming_attn_func", "token_streaming_attn_func"]
