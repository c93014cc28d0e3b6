# %% [markdown]
# # Compose a mask and look at it
#
# A pattern is an expression of where the query (`q_idx`) and the key (`kv_idx`) stand.
# Patterns combine with `&`, `|` and `~`. Open this file as a notebook with jupytext, or run it.

# %%
import sys

import torch

import flexsparse as fs
from flexsparse import kv_idx, q_idx
from flexsparse.masks import causal, same_document, sink, window
from flexsparse.terminal import Ink, picture

streaming = causal & (sink(2) | window(4))
streaming

# %% [markdown]
# Up to 64 tokens, the picture shows the elements themselves.

# %%
ink = Ink.of(sys.stdout)
small = fs.compile_mask(streaming, 16, 16)
print(picture(small, ink))

# %% [markdown]
# At real lengths a mask is a grid of blocks of 128 x 128 tokens: EMPTY ones are skipped, FULL ones
# are computed without looking at the mask, and only PARTIAL ones are masked element by element.

# %%
attend = fs.compile_mask(causal & (sink(64) | window(256)), 4096, 4096)
print(attend)
print(picture(attend, ink))

# %% [markdown]
# A pattern of your own needs no class. Tables (document ids, numbers per head) are read with
# `lookup`, or through the patterns that do it for you.

# %%
every_fourth = (kv_idx % 4).equals(0) & causal
documents = torch.arange(4096) // 700
mine = (every_fourth | window(32)) & same_document(documents) & causal
print(fs.compile_mask(mine, 4096, 4096))

# %% [markdown]
# Why does a query see a key, or not?

# %%
print(mine.explain(q=1500, kv=1404))
print(mine.check(4096, 4096))

# %% [markdown]
# One mask for each query head, and the attention itself.

# %%
heads = fs.per_head([causal] * 2 + [streaming] * 2)
q, k, v = torch.randn(3, 1, 4, 512, 32)
out = fs.compile_mask(heads, 512, 512)(q, k, v, executor="blockwise")
assert out.shape == (1, 4, 512, 32)

# %%
future = ~causal & (kv_idx - q_idx <= 8)
print(picture(fs.compile_mask(future, 24, 24), ink))
