# %% [markdown]
# # 2. A mask for each head, and what the plan does with it
#
# Heads of one layer look at different things: some need every key, most need the last few hundred
# and the first few (StreamingLLM, DuoAttention). So each query head has its own mask.

# %%
import torch

import flexsparse as fs
from flexsparse import h, kv_idx, lookup, q_idx
from flexsparse.masks import causal, sink, strided, window

heads = [causal] * 2 + [causal & (sink(64) | window(256))] * 3
heads += [causal & (sink(64) | window(512)), causal & window(1024), causal & strided(8)]
masks = fs.per_head(heads)
masks

# %% [markdown]
# Compiling decides every block and makes a plan. Heads with the same mask share their blocks;
# masks that differ in a number alone run as one launch; causal heads go to torch's own kernel.

# %%
attend = fs.compile_mask(masks, 4096, 4096)
print(attend)
attend.plot()

# %% [markdown]
# The dots are what the launches would take on an H200 by its data sheet: which are bound by
# arithmetic and which by memory. (A prediction; notebook 5 measures.)

# %%
fs.roofline(attend, device="H200")

# %% [markdown]
# Grouped-query attention is inferred from the shapes: 8 query heads over 2 heads of keys.

# %%
q = torch.randn(1, 8, 4096, 32)
k, v = torch.randn(2, 1, 2, 4096, 32)
out, lse = attend(q, k, v, return_lse=True)
print(tuple(out.shape), tuple(lse.shape))

# %% [markdown]
# Gradients work everywhere, also on CPU.

# %%
q.requires_grad_()
attend(q, k, v).square().sum().backward()
print("gradient:", tuple(q.grad.shape))

# %% [markdown]
# ## Longer, shorter, one token at a time
#
# The same mask at other lengths costs an analysis of milliseconds and no new kernel.

# %%
chunk = attend.at(512, 2048)  # queries 1536 to 2047, all keys so far
part = chunk(q[:, :, 1536:2048], k[:, :, :2048], v[:, :, :2048])
print("chunk equals the whole:", torch.allclose(part, out[:, :, 1536:2048], atol=1e-5))
print(attend.row(700).at(1, 701))

# %% [markdown]
# ## A pattern that reads the head
#
# The head's number is a variable as well: here each head's window stands in a table.

# %%
spans = torch.tensor([128, 256, 512, 1024])
by_table = causal & (q_idx - kv_idx < lookup(spans, h))
fs.draw(by_table, 2048, 2048, n_heads=4)

# %% [markdown]
# A million tokens, 32 heads: no N x N tensor is ever made.

# %%
million = fs.per_head([causal] * 8 + [causal & (sink(64) | window(256))] * 24)
long = fs.compile_mask(million, 1 << 20, 1 << 20)
print(long)
long.plot()
