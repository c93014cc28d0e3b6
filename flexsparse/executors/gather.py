"""One query on CPU: the keys it sees are gathered, and attention over them is dense.

A query reads few keys. flex_attention's kernel, and what torch.compile does around a call of it,
take several times as long as these reads; there is nothing to compile here, and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from flexsparse.classify import Grid
from flexsparse.dropout import Dropout
from flexsparse.expr import Mask


def unsupported(
    grid: Grid,
    device: torch.device,
    *,
    score_mod: object | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> str | None:
    """Why keys cannot be gathered for these inputs, as a sentence, or None if they can."""
    if device.type != "cpu":
        return "keys are gathered on CPU alone"
    if grid.q_len != 1:
        return f"keys are gathered for one query, and there are {grid.q_len}"
    if grid.planes > 1:
        return "heads or batch rows see keys of their own"
    if torch.compiler.is_compiling():
        return "how many keys a query sees is data, which a graph being compiled does not know"
    if score_mod is not None:
        return "scaled_dot_product_attention takes no score_mod"
    if dropout is not None:
        return "the dropout of scaled_dot_product_attention follows another generator"
    if return_lse:
        return "scaled_dot_product_attention returns no LSE"
    return None


def keys_seen(mask: Mask, grid: Grid, lists: BlockMask) -> Tensor:
    """The keys that the one query of a grid sees, int64 [keys], ascending within its lists."""
    assert lists.full_kv_num_blocks is not None
    assert lists.full_kv_indices is not None
    partial = lists.kv_indices[0, 0, 0, : int(lists.kv_num_blocks)]
    full = lists.full_kv_indices[0, 0, 0, : int(lists.full_kv_num_blocks)]
    of_block = torch.arange(grid.block_size[1])
    keys = (torch.cat([partial, full]).long()[:, None] * grid.block_size[1] + of_block).flatten()
    keys = keys[keys < grid.kv_len]
    kept = mask(0, grid.heads[0], torch.tensor(grid.q_offset), keys)
    return keys[kept.expand_as(keys)]


def run(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, *, scale: float | None = None) -> Tensor:
    """Attention of one query to some keys: [B, n_heads, 1, Dv]; without keys it is 0."""
    out_shape = (*q.shape[:3], v.shape[3])
    if not len(keys):
        return q.new_zeros(out_shape)
    # the query heads of a kv head as its queries, so that k and v are not repeated
    q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    k, v = k.index_select(2, keys), v.index_select(2, keys)
    return scaled_dot_product_attention(q, k, v, scale=scale).reshape(out_shape)
