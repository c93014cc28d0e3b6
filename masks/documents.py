"""Patterns of several sequences in one: documents, packed batches, padding."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse import Mask, MaskError, b, kv_idx, lookup, pattern, q_idx
from flexsparse.masks.positions import causal


@pattern
def same_document(ids: Tensor) -> Mask:
    """Positions see each other inside their document: ids[q_idx] == ids[kv_idx].

    same_document([0, 0, 1, 1, 1]), 5 x 5:      ##...
                                                ##...
    Args:                                       ..###
        ids: integer [tokens], the document     ..###
            of each position, in any order.     ..###
            A batch may have its own: [B, tokens].

    Source: FlexAttention blog, "Document Masking".
    """
    if ids.dim() == 2:
        return lookup(ids, b, q_idx).equals(lookup(ids, b, kv_idx))
    return lookup(ids, q_idx).equals(lookup(ids, kv_idx))


@pattern
def packed(
    cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor | None = None, inner: Mask = causal
) -> Mask:
    """Packed sequences, each under the mask `inner` with positions of its own.

    Inside a sequence the last query stands at the last key (bottom-right), also where it has fewer
    queries than keys. Compile with q_offset=0: rows are places in the packed tensor.

    packed([0, 1, 3], [0, 2, 5]), 3 x 5:    ##...
                                            ..##.
    Args:                                   ..###
        cu_seqlens_q: integer [sequences + 1], where each sequence starts, and the end.
        cu_seqlens_kv: the same for keys; that of the queries by default.
        inner: the mask inside a sequence.

    Source: FlashAttention's flash_attn_varlen_func.
    """
    same = cu_seqlens_kv is None
    kv_ends = cu_seqlens_q if cu_seqlens_kv is None else cu_seqlens_kv
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", kv_ends)):
        _check_cu_seqlens(name, ends)
    if len(cu_seqlens_q) != len(kv_ends):
        raise MaskError(
            f"packed got {len(cu_seqlens_q) - 1} sequences of queries and {len(kv_ends) - 1} of keys; "
            "give both the same number."
        )
    q_sequence, q_place = _sequences(cu_seqlens_q)
    kv_sequence, kv_place = (q_sequence, q_place) if same else _sequences(kv_ends)
    ahead = (kv_ends.diff() - cu_seqlens_q.diff()).to(q_place.dtype)
    q_place = q_place if same else q_place + ahead[q_sequence.long()]
    mine: Mask = lookup(q_sequence, q_idx).equals(lookup(kv_sequence, kv_idx))
    return mine & inner.at(q_idx=lookup(q_place, q_idx), kv_idx=lookup(kv_place, kv_idx))


def _check_cu_seqlens(name: str, ends: Tensor) -> None:
    if ends.dim() != 1 or len(ends) < 2 or ends.is_floating_point() or ends.dtype == torch.bool:
        raise MaskError(
            f"{name} is {ends.dtype} {tuple(ends.shape)}; it must be integers [sequences + 1]."
        )
    if int(ends[0]) != 0:
        raise MaskError(f"{name} starts at {int(ends[0])}; it must start at 0.")
    lengths = ends.diff()
    if int(lengths.min()) < 0:
        place = int((lengths < 0).nonzero()[0])
        raise MaskError(
            f"{name} decreases from {int(ends[place])} to {int(ends[place + 1])} at entry {place + 1}; "
            "it must never decrease."
        )


def _sequences(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each token, and the token's place in it."""
    lengths = ends.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths)
    place = torch.arange(len(sequence), device=ends.device) - ends[:-1].long()[sequence]
    return sequence.int(), place.int()


@pattern
def padding(keys: Tensor) -> Mask:
    """Every query of a batch row sees that row's real keys and none of its padding.

    Args:
        keys: integer [B], the number of real keys of each row, padding on the right;
            or boolean [B, kv_len], true for real keys, padding anywhere.
    """
    if keys.dtype == torch.bool:
        real: Mask = lookup(keys, b, kv_idx)
        return real
    return kv_idx < lookup(keys, b)
