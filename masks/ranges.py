"""Patterns in the languages of other kernels: rows of each column, and slices of ranges."""

from __future__ import annotations

import functools
import heapq
import operator

import torch
from torch import Tensor

from flexsparse import Index, Mask, MaskError, b, h, kv_idx, minimum, pattern, q_idx
from flexsparse.masks.arguments import at_least, booleans, flag, number, row_number, tensor_of

NUMBERS = {True: (1, 2), False: (2, 4)}  # FlashMask's for each key, by whether it is causal
SLICE_TYPES = "0 (full), 1 (causal), 2 (inverse causal) or 3 (both)"
MOST_SLICES = 32  # of one row: each is a term of the mask
MOST_SEGMENTS = 1 << 28  # pairs of segments of rows and of keys, in a table


@pattern
def flashmask(
    startend_row_indices: Tensor, causal: bool = False, q_offset: int = 0, group_size: int = 1
) -> Mask:
    """FlashMask: each key is hidden from an interval of rows below the diagonal, and one above.

    flashmask([[[[2], [2], [4], [4]]]], True), 4 x 4:    #...
                                                         ##..
    Args:                                                ..#.
        startend_row_indices: integer                    ..##
            [B, heads, kv_len, numbers], both B and heads possibly 1, query rows counted from 0. The
            numbers of a key are, where causal, the row from which on it is hidden, or the first
            such row and the one after the last; else the row from which on it is hidden and the one
            up to which it is, or the first row and the one after the last of both intervals.
        causal: keep only keys up to the query.
        q_offset: position of query row 0: kv_len - q_len.
        group_size: query heads of a head of startend_row_indices (GQA).

    Its block_mask is & block_sparse(block_mask.bool()).

    Source: FlashMask (arXiv 2410.01359), flashmask_attention.
    """
    booleans("flashmask", causal=causal)
    at_least("flashmask", 1, group_size=group_size)
    shape = {4: "[B, heads, kv_len, numbers]"}
    tensor_of("flashmask", "startend_row_indices", startend_row_indices, "integer", shape)
    n_numbers = startend_row_indices.shape[-1]
    if n_numbers not in NUMBERS[causal]:
        raise MaskError(
            f"flashmask(causal={causal}) got {n_numbers} numbers for each key; it must have "
            f"{' or '.join(map(str, NUMBERS[causal]))}."
        )
    head = h // group_size if group_size > 1 and startend_row_indices.shape[1] > 1 else h
    numbers = [number(x, b, head, kv_idx) for x in startend_row_indices.unbind(-1)]
    row = row_number("flashmask", q_offset)
    if causal:
        return (kv_idx <= q_idx) & _outside(row, *numbers)
    if n_numbers == 2:
        return (row < numbers[0]) & (row >= numbers[1])
    return _outside(row, *numbers[:2]) & _outside(row, *numbers[2:])


def _outside(row: Index, first: Index, end: Index | None = None) -> Mask:
    """Rows before an interval that begins with `first`, and from its end on."""
    return row < first if end is None else (row < first) | (row >= end)


@pattern
def attention_slices(
    q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None = None, q_offset: int = 0
) -> Mask:
    """MagiAttention's slices: the queries of a range see a range of keys, whole or cut diagonally.

    attention_slices([[0, 3], [3, 6]], [[0, 4], [2, 6]], [1, 2]), 6 x 6:    ##....
                                                                            ###...
    Args:                                                                   ####..
        q_ranges: integer [slices, 2], the first row of each slice and      ..####
            the one after its last, counted from query row 0.               ...###
        k_ranges: the same for keys.                                        ....##
        attn_type_map: integer [slices]: 0 the whole slice, the default; 1 causal, its last key seen
            by its last row alone; 2 inverse causal, its first key seen by its first row alone; 3
            both.
        q_offset: position of query row 0: kv_len - q_len.

    Slices may overlap: their union is kept. A row of no slice sees nothing. At most 32 may have a
    row in common, or any number of whole ones.

    Source: MagiAttention (SandAI-org/MagiAttention), flex_flash_attn_func.
    """
    name = "attention_slices"
    for argument, ranges in (("q_ranges", q_ranges), ("k_ranges", k_ranges)):
        tensor_of(name, argument, ranges, "integer", {2: "[slices, 2]"})
        _check_ranges(argument, ranges)
    types = torch.zeros_like(q_ranges[:, 0]) if attn_type_map is None else attn_type_map
    tensor_of(name, "attn_type_map", types, "integer", {1: "[slices]"})
    if not len(q_ranges) == len(k_ranges) == len(types):
        raise MaskError(
            f"{name} got {len(q_ranges)} q_ranges, {len(k_ranges)} k_ranges and "
            f"{len(types)} types; give one of each for a slice."
        )
    unknown = types[(types < 0) | (types > 3)]
    if len(unknown):
        raise MaskError(f"{name} got a slice of type {int(unknown[0])}; it must be {SLICE_TYPES}.")
    row = row_number(name, q_offset)
    if are_many_whole(q_ranges, types):
        counts, q_segment, k_segment = counts_of_segments(q_ranges, k_ranges)
        rows_and_keys = (
            number(segment, minimum(place, len(segment) - 1))
            for segment, place in ((q_segment, row), (k_segment, kv_idx))
        )
        return flag(counts > 0, *rows_and_keys)
    starts, ends = keys_of_rows(q_ranges, k_ranges, attn_type_map)
    # the last entry stands for all rows past the slices
    row = minimum(row, starts.shape[1] - 1)
    seen = [
        (kv_idx >= number(start, row)) & (kv_idx < number(end, row))
        for start, end in zip(starts, ends, strict=True)
    ]
    return functools.reduce(operator.or_, seen)


def _check_ranges(argument: str, ranges: Tensor) -> None:
    if ranges.shape[1] != 2:
        raise MaskError(
            f"attention_slices got {argument} of {tuple(ranges.shape)}; it must be [slices, 2]."
        )
    wrong = ranges[(ranges[:, 0] < 0) | (ranges[:, 1] < ranges[:, 0]) | (ranges[:, 1] >= 2**30)]
    if len(wrong):
        raise MaskError(
            f"attention_slices got {argument} with {wrong[0].tolist()}; a range must be [first, "
            "one after the last], of 0 or more and below 2**30."
        )


def are_many_whole(q_ranges: Tensor, types: Tensor) -> bool:
    """Whether slices are all whole, and more have a row in common than a mask has terms for."""
    if len(q_ranges) <= MOST_SLICES or bool(types.any()):
        return False
    cuts, at = torch.unique(q_ranges, return_inverse=True)
    steps = torch.ones_like(at)
    steps[:, 1] = -1
    depth = at.new_zeros(len(cuts)).index_add_(0, at.flatten(), steps.flatten())
    return int(depth.cumsum(0).max()) > MOST_SLICES


def counts_of_segments(q_ranges: Tensor, k_ranges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and keys in segments, cut where a slice begins or ends, and the slices of each pair.

    Returns:
        counts: how many whole slices keep a segment of rows and one of keys.
        q_segment: the segment of each row; its last entry stands for all rows past the slices.
        k_segment: the same of keys.
    """
    (q_cuts, q_at), (k_cuts, k_at) = (
        torch.unique(x.long(), return_inverse=True) for x in (q_ranges, k_ranges)
    )
    shape = (len(q_cuts) + 1, len(k_cuts) + 1)
    if shape[0] * shape[1] > MOST_SEGMENTS:
        raise MaskError(
            f"attention_slices cuts the rows into {shape[0]} segments and the keys into "
            f"{shape[1]}; at most {MOST_SEGMENTS} pairs are allowed. Blocks of one size are a "
            "table for block_sparse."
        )
    counts = torch.zeros(shape, dtype=torch.int32, device=q_ranges.device)
    for q_side, k_side in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = counts.new_tensor(1 if q_side == k_side else -1).expand(len(q_at))
        counts.index_put_((q_at[:, q_side] + 1, k_at[:, k_side] + 1), step, accumulate=True)
    counts = counts.cumsum(0).cumsum(1)
    segments = (
        torch.searchsorted(cuts, torch.arange(int(cuts[-1]) + 1, device=cuts.device), right=True)
        for cuts in (q_cuts, k_cuts)
    )
    q_segment, k_segment = (x.int() for x in segments)
    return counts, q_segment, k_segment


def keys_of_rows(
    q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The keys that each row sees of slices, as ranges: their starts and ends, [ranges, rows + 1].

    Where no row is in two slices, that is one range.
    """
    q_ranges, k_ranges = q_ranges.long(), k_ranges.long()
    types = torch.zeros_like(q_ranges[:, 0]) if attn_type_map is None else attn_type_map.long()
    n_rows = int(q_ranges.max()) if len(q_ranges) else 0
    track, n_tracks = _tracks(q_ranges)
    lengths = q_ranges.diff().flatten()
    before = lengths.cumsum(0) - lengths
    inverse, causal = (types >= 2).long(), types % 2
    # with the rows of all slices in one list, what the i-th sees is linear in i inside a slice
    of_slices = (
        track * (n_rows + 1) + q_ranges[:, 0] - before,
        k_ranges[:, 0] - inverse * before,
        inverse,
        k_ranges[:, 1] - causal * (before + lengths - 1),
        causal,
    )
    i = torch.arange(int(lengths.sum()), device=lengths.device)
    of_rows = torch.stack(of_slices, 1).repeat_interleave(lengths, 0, output_size=len(i))
    place, start, start_step, end, end_step = of_rows.unbind(1)
    starts, ends = q_ranges.new_zeros(2, n_tracks, n_rows + 1, dtype=torch.int32)
    starts.view(-1)[place + i] = (start + start_step * i).int()
    ends.view(-1)[place + i] = (end + end_step * i).int()
    return starts, ends


def _tracks(q_ranges: Tensor) -> tuple[Tensor, int]:
    """A number for each range so that ranges with the same one do not overlap, and how many."""
    tracks = [0] * len(q_ranges)
    ends: list[tuple[int, int]] = []  # a heap: where the last range of each track ends
    ranges = q_ranges.tolist()
    for i in q_ranges[:, 0].argsort().tolist():
        first, end = ranges[i]
        if ends and ends[0][0] <= first:
            tracks[i] = heapq.heapreplace(ends, (end, ends[0][1]))[1]
        elif first < end:
            tracks[i] = len(ends)
            heapq.heappush(ends, (end, len(ends)))
        if len(ends) > MOST_SLICES:
            raise MaskError(
                f"attention_slices: row {first} is in {len(ends)} slices; at most {MOST_SLICES} "
                "are allowed where not all are whole (type 0). Unite those that touch."
            )
    # of a power of two, some of them empty, so that few kernels serve any slices
    n_tracks = 1 << max(len(ends) - 1, 0).bit_length()
    return torch.tensor(tracks, dtype=torch.int64, device=q_ranges.device), n_tracks
