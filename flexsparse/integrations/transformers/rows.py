"""A step of decoding: one query of each sequence, and the keys that its heads keep.

Heads that keep few keys have them picked from the cache, and attention is over these alone; the
others read the whole cache. What is picked is found once for all layers that share their masks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FEW = 4  # keys are picked where they are at most one in so many; copying them costs too


class Pick(NamedTuple):
    """What is read for some kv heads.

    kv_heads: which: a slice, where they read the whole cache, or int64 [heads]
    keys: int64 [B, heads, keys], places in the cache, or None for the whole of it
    kept: bool [B, heads, query heads of each, keys], or None if all of them are kept
    """

    kv_heads: slice | Tensor
    keys: Tensor | None
    kept: Tensor | None


ALL_HEADS = slice(None)
EVERYTHING = [Pick(ALL_HEADS, None, None)]


def pick(kept: Tensor) -> list[Pick]:
    """Which keys are read for each kv head, of those that its query heads keep.

    Args:
        kept: bool [B, n_kv_heads, query heads of each, kv_len].
    """
    kv_len = kept.shape[3]
    seen = kept.any(2)  # [B, n_kv_heads, kv_len]
    counts = seen.sum(-1)
    # the only wait for a GPU
    most, fewest = torch.stack([counts.amax(0), kept.sum(-1).amin((0, 2))]).tolist()
    is_few = [n * FEW <= kv_len for n in most]
    few = [head for head, picked in enumerate(is_few) if picked]
    picks = []
    for picked, run in itertools.groupby(range(len(is_few)), key=is_few.__getitem__):
        if not picked:
            many = list(run)
            of_run = slice(many[0], many[-1] + 1)  # a view of the cache, where a list is a copy
            everything = all(fewest[head] == kv_len for head in many)
            picks.append(Pick(of_run, None, None if everything else kept[:, of_run]))
    if few:
        n = max(1, *(most[head] for head in few))
        heads = torch.tensor(few, device=kept.device)
        keys, is_key = _places(seen[:, heads], counts[:, heads], n)
        of_keys = None
        if any(fewest[head] < n for head in few):
            at = keys[:, :, None].expand(-1, -1, kept.shape[2], -1)
            of_keys = kept[:, heads].gather(3, at) & is_key[:, :, None]
        picks.append(Pick(heads, keys, of_keys))
    return picks


def _places(seen: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Where each line of `seen` is true, in ascending order, as [..., n], and which of them count.

    Lines have at most n places, `counts` of them; the others are 0.
    """
    batch, head, key = seen.nonzero(as_tuple=True)
    before = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    keys = key.new_zeros(*counts.shape, n)
    keys[batch, head, torch.arange(len(key), device=key.device) - before[batch, head]] = key
    return keys, torch.arange(n, device=key.device) < counts[..., None]


def attend_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    picks: Sequence[Pick],
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention of few queries to the keys picked for each kv head: [B, n_heads, q_len, Dv]."""
    batch, n_heads, q_len, head_dim = q.shape
    # the query heads of a kv head as its queries, so that k and v are not repeated
    q = q.reshape(batch, k.shape[1], -1, head_dim)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for heads, keys, kept in picks:
        if isinstance(heads, slice) or keys is None:
            at: Any = (slice(None), heads)
        else:
            heads, keys = heads.to(k.device), keys.to(k.device)
            at = (torch.arange(batch, device=k.device)[:, None, None], heads[:, None], keys)
        out[:, heads] = _attention(q[:, heads], k[at], v[at], kept, scale, softcap, dropout)
    return out.reshape(batch, n_heads, q_len, v.shape[3])


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor | None,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    kept = None if kept is None else kept.to(q.device)
    if softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, kept, dropout, scale=scale)
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if kept is not None:
        scores = scores.masked_fill(~kept, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row that sees nothing is 0
    return functional.dropout(weights, dropout).to(v.dtype) @ v
