"""A training step on Block-Sparse-Attention's functions, run by flexsparse: one import is changed.

    python examples/block_sparse_attn.py --tokens 1024 --heads 6

On a GPU or a CPU. What block_sparse_attn's script does comes first, what it could not do last.
"""

import argparse

import torch

# from block_sparse_attn import (
from flexsparse.compat.block_sparse_attn import (
    block_sparse_attn_func,
    block_streaming_attn_func,
    token_streaming_attn_func,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tokens", type=int, default=8192, help="of the longest sequence")
parser.add_argument("--heads", type=int, default=12)
parser.add_argument("--kv-heads", type=int, default=2)
parser.add_argument("--head-dim", type=int, default=128)
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32

# 1. Packed sequences, and a third of the heads of each type
lengths = torch.tensor([options.tokens, options.tokens // 2, options.tokens // 3])
cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
total, longest, third = int(lengths.sum()), int(lengths.max()), options.heads // 3
q, k, v = (
    torch.randn(total, n, options.head_dim, device=device, dtype=dtype, requires_grad=True)
    for n in (options.heads, options.kv_heads, options.kv_heads)
)
types = [0] * (options.heads - 2 * third) + [1] * third + [-1] * third
head_mask_type = torch.tensor(types, dtype=torch.int32, device=device)

# 2. Block-sparse heads keep 30 % of the blocks; streaming heads a first block and the latest 3
blocks = -(-longest // 128)
base_blockmask = torch.rand(len(lengths), third, blocks, blocks, device=device) < 0.3
streaming_info = torch.tensor([1, 3] * options.heads, dtype=torch.int32, device=device)
out = block_sparse_attn_func(
    q,
    k,
    v,
    cu_seqlens,
    cu_seqlens,
    head_mask_type,
    streaming_info,
    base_blockmask,
    longest,
    longest,
    0.1,
    deterministic=True,
    is_causal=True,
)
out.sum().backward()
print(f"block-sparse: out {list(out.shape)}, largest gradient of q {q.grad.abs().max():.3g}")

# 3. Half of the heads dense, half streaming by blocks
half = options.heads // 2
halves = torch.tensor([0] * (options.heads - half) + [-1] * half, device=device)
out, lse, _ = block_streaming_attn_func(
    *(q, k, v),
    *(cu_seqlens, cu_seqlens),
    halves.int(),
    streaming_info,
    *(longest, longest),
    0.0,
    return_attn_probs=True,
)
print(f"block streaming: out {list(out.shape)}, softmax_lse {list(lse.shape)}")

# 4. What block_sparse_attn refuses: gradients of token streaming (64 first keys, 256 latest)
tokens = torch.tensor([64, 256] * options.heads, dtype=torch.int32, device=device)
out = token_streaming_attn_func(
    q, k, v, cu_seqlens, cu_seqlens, halves.int(), tokens, longest, longest
)
q.grad = None
out.sum().backward()
print(f"token streaming: out {list(out.shape)}, largest gradient of q {q.grad.abs().max():.3g}")
