# %% [markdown]
# # 1. Compose a mask and look at it
#
# An attention pattern is an expression of where the query (`q_idx`) and the key (`kv_idx`) stand.
# Patterns combine with `&`, `|` and `~`. Nothing here has a length yet: that comes when a mask is
# drawn, checked or compiled.

# %%
import torch

import flexsparse as fs
from flexsparse import kv_idx
from flexsparse.masks import causal, same_document, sink, window

streaming = causal & (sink(2) | window(4))
print(streaming)

# %% [markdown]
# Up to 64 tokens a picture shows the elements themselves, and the tokens too if you name them.

# %%
words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs"]
fs.draw(streaming, len(words), len(words), labels=words)

# %% [markdown]
# A mask at the end of a cell draws itself. Hover over a cell, and zoom with the wheel.

# %%
streaming

# %% [markdown]
# At real lengths a mask is a grid of blocks of 128 x 128 tokens: EMPTY ones are skipped, FULL ones
# are computed without looking at the mask, and only PARTIAL ones are masked element by element.

# %%
attend = fs.compile_mask(causal & (sink(64) | window(256)), 4096, 4096)
print(attend)
attend.plot()

# %% [markdown]
# Zoom into one block: row 5 of blocks, where the window begins.

# %%
fs.zoom(attend, 5, 3)

# %% [markdown]
# ## Your own pattern
#
# A pattern of your own needs no class. Tables (document ids, numbers per head) are read with
# `lookup`, or through the patterns that do it for you.

# %%
every_fourth = (kv_idx % 4).equals(0)
documents = torch.arange(2048) // 700
mine = causal & (every_fourth | window(32)) & same_document(documents)
fs.draw(mine, 2048, 2048)

# %% [markdown]
# Why does a query see a key, or not? Is there a query that sees nothing?

# %%
print(mine.explain(q=1500, kv=1404))
print(mine.check(2048, 2048))

# %% [markdown]
# What changes if the window is wider? Only what differs is coloured.

# %%
fs.compare(causal & window(256), causal & window(600), 4096, 4096)

# %% [markdown]
# ## Run it
#
# A compiled mask is called on q, k and v. It is exact: the same numbers as dense attention with
# that mask.

# %%
q, k, v = torch.randn(3, 1, 4, 512, 32)
attend = fs.compile_mask(mine, 512, 512)
index = torch.arange(512)
kept = mine(0, 0, index[:, None], index)
dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
print("largest difference:", (attend(q, k, v) - dense).abs().max().item())

# %% [markdown]
# You write FlexAttention mask_mods already? They are masks too: `from_mask_mod` traces them.

# %%
fs.from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < 100))
