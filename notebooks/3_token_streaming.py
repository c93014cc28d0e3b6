# %% [markdown]
# # 3. Token streaming, and the block granularity it escapes
#
# StreamingLLM keeps a few first tokens (the attention sink) and the last few hundred. A BlockMask
# is made of blocks of 128 x 128 tokens, so with 4 sinks and a window of 64 most of what it computes
# is thrown away.

# %%
import torch

import flexsparse as fs
from flexsparse.masks import causal, sink, window

small = causal & (sink(4) | window(64))
attend = fs.compile_mask(small, 2048, 2048)
attend.plot()

# %% [markdown]
# One block on the diagonal, element by element: the triangle and the window's edge.

# %%
fs.zoom(attend, 8, 7)

# %% [markdown]
# How many keys does a row of queries need, and how many do its blocks hold?


# %%
def needed(s, w, n):
    """Keys that all queries of n tokens see together under causal & (sink(s) | window(w))."""
    position = torch.arange(n)
    near = (position + 1).clamp(max=w)
    return int((near + (position + 1 - near).clamp(max=s)).sum())


rows = []
for s, w in [(4, 64), (64, 256), (128, 1024)]:
    compiled = fs.compile_mask(causal & (sink(s) | window(w)), 16384, 16384)
    by_blocks = compiled.cost().blocks * 128 * 128
    rows.append((f"sink {s}, window {w}", by_blocks / needed(s, w, 16384)))
for name, ratio in rows:
    print(f"{name:22} blocks of 128 compute {ratio:4.1f} x what is needed")

# %%
import matplotlib.pyplot as plt

_, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
axes.barh([name for name, _ in rows], [ratio for _, ratio in rows], color="#e08e35")
axes.axvline(1, color="#1b2b5e")
axes.set_xlabel("keys computed with blocks of 128 / keys needed")
axes.invert_yaxis()

# %% [markdown]
# Smaller blocks waste less and cost more (more list entries, smaller matrix products):

# %%
for size in (128, 64, 32):
    compiled = fs.compile_mask(small, 16384, 16384, block_size=size)
    waste = compiled.cost().blocks * size * size / needed(4, 64, 16384)
    print(f"blocks of {size:3}: {waste:.1f} x what is needed, {compiled.cost().blocks:,} blocks")

# %% [markdown]
# On CUDA such heads go to a Triton kernel of their own that walks over tokens, not blocks, forward
# and backward, with a number for each head: `print(attend)` says `streaming` there. The mask is
# recognised however it is written:

# %%
from flexsparse.analysis.normal_form import sink_and_window

spelled = [
    causal & (sink(4) | window(64)),
    (causal & sink(4)) | (causal & window(64)),
    fs.from_mask_mod(lambda b, h, q, k: (q >= k) & ((k < 4) | (q - k <= 63))),
]
print([sink_and_window(mask) for mask in spelled])
