"""S2-Attention's quick start, run by flexsparse: one import is changed.

    python examples/s2_attention.py --tokens 1024

On a GPU or a CPU. What dkernel's script does comes first, what it could not do last.
"""

import argparse

import torch

# from dkernel import LocalStrideSparseAttention, SparseAttention
from flexsparse.compat.dkernel import LocalStrideSparseAttention, SparseAttention

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tokens", type=int, default=8192)
parser.add_argument("--heads", type=int, default=32)
options = parser.parse_args()

# 1. The local-stride pattern
block_size = 64  # tokens of a block
local_blocks = 4  # a query sees the keys of its latest 4 blocks
vert_stride = 8  # and of every 8th block before them, each head of other ones
max_seq_len = options.tokens
num_heads = options.heads
device = "cuda" if torch.cuda.is_available() else "cpu"

q, k, v = [
    torch.rand(2, max_seq_len, num_heads, 128, device=device).requires_grad_() for _ in range(3)
]
attn = LocalStrideSparseAttention(
    num_heads,
    max_seq_len,
    block_size,
    local_blocks,
    vert_stride,
    seq_dim=1,  # q, k, v: (batch, seq, heads, head_dim)
)
attn.to(device)
output, lse = attn(q, k, v, return_lse=True)
output.sum().backward()
print(attn)
print(f"out {list(output.shape)}, lse {list(lse.shape)}, gradient of q {list(q.grad.shape)}")

# 2. A pattern of one's own
num_blocks = max_seq_len // block_size
block_sparse_pattern = torch.rand((num_heads, num_blocks, num_blocks)) > 0.8
for head_sparse_pattern in block_sparse_pattern:
    head_sparse_pattern.diagonal()[:] = True
block_sparse_pattern *= torch.tril(torch.ones_like(block_sparse_pattern[0]))

attn2 = SparseAttention(block_size, block_sparse_pattern)
attn2.to(device)
output = attn2(q, k, v, sm_scale=0.008)
print(attn2)
print(f"out {list(output.shape)}")

# 3. What dkernel refuses: a prompt prefilled in chunks, and gradients of packed sequences
chunks = [
    attn(q[:, start : start + 256], k[:, : start + 256], v[:, : start + 256])
    for start in range(0, max_seq_len, 256)
]
whole = attn(q, k, v)
print(f"prefill in {len(chunks)} chunks: error {(torch.cat(chunks, 1) - whole).abs().max():.1e}")

cu_seqlens = torch.tensor([0, max_seq_len // 3, max_seq_len], device=device)
packed = attn(q[0], k[0], v[0], cu_seqlen_k=cu_seqlens)
packed.sum().backward()
print(f"packed out {list(packed.shape)}, with gradients")
