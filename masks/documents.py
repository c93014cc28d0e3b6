"""Patterns of several sequences in one: documents, packed batches, padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexsparse import Mask, MaskError, b, kv_idx, pattern, q_idx
from flexsparse.masks.arguments import at_least, flag, integers, number, tensor_of
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
    tensor_of("same_document", "ids", ids, "integer", {1: "[tokens]", 2: "[B, tokens]"})
    if ids.dim() == 2:
        return number(ids, b, q_idx).equals(number(ids, b, kv_idx))
    return number(ids, q_idx).equals(number(ids, kv_idx))


@pattern
def packed(
    cu_seqlens_q: Tensor | Sequence[int],
    cu_seqlens_kv: Tensor | Sequence[int] | None = None,
    inner: Mask = causal,
) -> Mask:
    """Packed sequences, each under the mask `inner` with positions of its own.

    Inside a sequence the last query stands at the last key (bottom-right), also where it has fewer
    queries than keys. Compile with q_offset=0: rows are places in the packed tensor.

    packed([0, 1, 3], [0, 2, 5]), 3 x 5:    ##...
                                            ..##.
    Args:                                   ..###
        cu_seqlens_q: integers [sequences + 1], where each sequence starts, and the end.
        cu_seqlens_kv: the same for keys; that of the queries by default.
        inner: the mask inside a sequence.

    Source: FlashAttention's flash_attn_varlen_func.
    """
    same = cu_seqlens_kv is None
    q_ends = ends_of("packed", "cu_seqlens_q", cu_seqlens_q)
    kv_ends = q_ends if same else ends_of("packed", "cu_seqlens_kv", cu_seqlens_kv)
    if not isinstance(inner, Mask):
        raise MaskError(f"packed(inner={inner!r}): inner must be a Mask, such as causal.")
    if len(q_ends) != len(kv_ends):
        raise MaskError(
            f"packed got {len(q_ends) - 1} sequences of queries and {len(kv_ends) - 1} of "
            "keys; give both the same number."
        )
    q_sequence, q_place = sequences_of(q_ends)
    kv_sequence, kv_place = (q_sequence, q_place) if same else sequences_of(kv_ends)
    ahead = (kv_ends.diff() - q_ends.diff()).to(q_place.dtype)
    q_place = q_place if same else q_place + ahead[q_sequence.long()]
    mine = number(q_sequence, q_idx).equals(number(kv_sequence, kv_idx))
    return mine & inner.at(q_idx=number(q_place, q_idx), kv_idx=number(kv_place, kv_idx))


def ends_of(pattern: str, name: str, given: Tensor | Sequence[int] | None) -> Tensor:
    """cu_seqlens as a tensor: where each sequence starts, and the end."""
    ends = integers(pattern, name, given, "[sequences + 1]")
    if len(ends) < 2:
        raise MaskError(f"{name} has {len(ends)} entries; it must have [sequences + 1], 2 or more.")
    if int(ends[0]) != 0:
        raise MaskError(f"{name} starts at {int(ends[0])}; it must start at 0.")
    lengths = ends.diff()
    if int(lengths.min()) < 0:
        place = int((lengths < 0).nonzero()[0])
        raise MaskError(
            f"{name} decreases from {int(ends[place])} to {int(ends[place + 1])} at entry "
            f"{place + 1}; it must never decrease."
        )
    if int(ends[-1]) >= 2**31:
        raise MaskError(f"{name} ends at {int(ends[-1])}; it must end below 2**31.")
    return ends


def sequences_of(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each token, and the token's place in it."""
    lengths = ends.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths)
    place = torch.arange(len(sequence), device=ends.device) - ends[:-1].long()[sequence]
    return sequence.int(), place.int()


@pattern
def bifurcated(context_len: int, sample_len: int) -> Mask:
    """One context and then samples of equal length, each causal after the context, blind to others.

    Keys are [context | sample 0 | sample 1 | ...], and queries stand where their keys do. For a
    step of all samples, compile .at(q_idx=context_len + q_idx * sample_len + step) with q_offset=0.

    bifurcated(2, 2), 6 x 6:                   #.....
                                               ##....
    Args:                                      ###...
        context_len: tokens of the context.    ####..
        sample_len: tokens of each sample.     ##..#.
                                               ##..##
    Source: bifurcated attention (arXiv 2403.08845).
    """
    at_least("bifurcated", 0, context_len=context_len)
    at_least("bifurcated", 1, sample_len=sample_len)
    q_sample, kv_sample = ((x - context_len) // sample_len for x in (q_idx, kv_idx))
    return causal & ((kv_idx < context_len) | q_sample.equals(kv_sample))


@pattern
def padding(keys: Tensor) -> Mask:
    """Every query of a batch row sees that row's real keys and none of its padding.

    padding([3]), 3 x 5:    ###..
                            ###..
    Args:                   ###..
        keys: integer [B], the number of real keys of each row, padding on the right;
            or boolean [B, kv_len], true for real keys, padding anywhere.
    """
    shapes = {1: "[B] of integers", 2: "[B, kv_len] of booleans"}
    tensor_of("padding", "keys", keys, "boolean or integer", shapes)
    if (keys.dtype == torch.bool) != (keys.dim() == 2):
        raise MaskError(
            f"padding got keys = {keys.dtype} {tuple(keys.shape)}; it must be integer [B] or "
            "boolean [B, kv_len]."
        )
    if keys.dtype == torch.bool:
        return flag(keys, b, kv_idx)
    return kv_idx < number(keys, b)
