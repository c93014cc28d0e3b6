"""One query on CPU: the keys it sees are gathered, and attention over them is dense.

A query reads few keys. flex_attention's kernel, and what torch.compile does around a call of it,
take several times as long as these reads; there is nothing to compile here, and gradients. Keys
that follow each other are read where they are; many others would take longer to copy than to skip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from flexsparse.analysis.cells import Grid
from flexsparse.executors import sdpa
from flexsparse.expr import Mask

MOST_COPIED = 512  # keys; measured with 8 heads of 64: from there on flex_attention is faster

Keys = slice | Tensor  # int64 [keys], ascending


def unsupported(grid: Grid, device: torch.device) -> str | None:
    """Why keys cannot be gathered on this grid, as a sentence, or None if they can."""
    if device.type != "cpu":
        return "keys are gathered on CPU alone"
    if grid.q_len != 1:
        return f"keys are gathered for one query, and there are {grid.q_len}"
    if grid.planes > 1:
        return "heads or batch rows see keys of their own"
    return None


def unsupported_extras(
    *,
    score_mod: object | None = None,
    dropout: object | None = None,
    return_lse: bool = False,
) -> str | None:
    """Why gathering cannot do what is asked besides a mask, or None."""
    if torch.compiler.is_compiling():
        return "how many keys a query sees is data, which a graph being compiled does not know"
    return sdpa.unsupported_extras(score_mod=score_mod, dropout=dropout, return_lse=return_lse)


def keys_seen(mask: Mask, grid: Grid, lists: BlockMask) -> Keys:
    """The keys that the one query of a grid sees, of the blocks in its lists."""
    assert lists.full_kv_num_blocks is not None
    assert lists.full_kv_indices is not None
    partial = lists.kv_indices[0, 0, 0, : int(lists.kv_num_blocks)]
    full = lists.full_kv_indices[0, 0, 0, : int(lists.full_kv_num_blocks)]
    blocks = torch.cat([partial, full]).long().sort().values
    of_block = torch.arange(grid.block_size[1])
    keys = (blocks[:, None] * grid.block_size[1] + of_block).flatten()
    keys = keys[keys < grid.kv_len]
    keys = keys[mask(0, grid.heads[0], torch.tensor(grid.q_offset), keys).expand_as(keys)]
    first, end = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 0)
    return slice(first, end) if end - first == len(keys) else keys


def too_many(keys: Keys) -> str | None:
    """Why these keys are not to be copied, as a sentence, or None if they are."""
    if isinstance(keys, slice) or len(keys) <= MOST_COPIED:
        return None
    return f"the query sees {len(keys):,} keys in pieces; at most {MOST_COPIED} are copied"


def run(
    q: Tensor, k: Tensor, v: Tensor, keys: Keys, *, scale: float | None = None
) -> tuple[Tensor, None]:
    """Attention of one query to some keys: out [B, n_heads, 1, Dv], 0 without keys, and no LSE."""
    out_shape = (*q.shape[:3], v.shape[3])
    if isinstance(keys, slice):
        k, v = k[:, :, keys], v[:, :, keys]
    else:
        k, v = k.index_select(2, keys), v.index_select(2, keys)
    # the query heads of a kv head as its queries, so that k and v are not repeated
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    if not k.shape[2]:
        # sums of nothing: 0, and gradients of 0
        return (q @ k.mT @ v).reshape(out_shape), None
    return scaled_dot_product_attention(q, k, v, scale=scale).reshape(out_shape), None
