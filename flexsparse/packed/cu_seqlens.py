"""cu_seqlens by value: the lengths of packed sequences, checked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse.arguments import check_position
from flexsparse.errors import MaskError


def lengths(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of each sequence, of queries and of keys."""
    named = {"cu_seqlens_q": cu_seqlens_q}
    if cu_seqlens_k is not None and cu_seqlens_k is not cu_seqlens_q:
        named["cu_seqlens_k"] = cu_seqlens_k
    for name, ends in named.items():
        if (
            not isinstance(ends, Tensor)
            or ends.dim() != 1
            or not len(ends)
            or ends.dtype not in (torch.int32, torch.int64)
        ):
            is_tensor = isinstance(ends, Tensor)
            found = f"{ends.dtype} {tuple(ends.shape)}" if is_tensor else type(ends).__name__
            raise MaskError(
                f"{name} is {found}; it must be an int32 or int64 tensor [sequences + 1]."
            )
        if ends.is_meta:
            raise MaskError(f"{name} is on meta, where tensors have no values; give it on the CPU.")
    if len({len(ends) for ends in named.values()}) > 1:
        raise MaskError(
            f"cu_seqlens_q has {len(cu_seqlens_q)} entries and cu_seqlens_k has "
            f"{len(named['cu_seqlens_k'])}; both must have one more than there are sequences."
        )
    if len({ends.device for ends in named.values()}) == 1:
        values = torch.stack([ends.long() for ends in named.values()]).tolist()
    else:
        values = [ends.tolist() for ends in named.values()]
    for name, ends in zip(named, values, strict=True):
        if ends[0] != 0:
            raise MaskError(f"{name} starts at {ends[0]}; it must start at 0.")
        for place, (start, end) in enumerate(itertools.pairwise(ends)):
            if end < start:
                raise MaskError(
                    f"{name} decreases from {start} to {end} at entry {place + 1}; it must never "
                    "decrease."
                )
    lens = [tuple(end - start for start, end in itertools.pairwise(ends)) for ends in values]
    return lens[0], lens[-1]


def first_positions(
    q_offset: int | Sequence[int] | Tensor | None,
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
) -> tuple[int, ...]:
    """The position of the first query of each sequence."""
    if q_offset is None:
        return tuple(kv_len - q_len for q_len, kv_len in zip(q_lens, kv_lens, strict=True))
    if isinstance(q_offset, Tensor) and q_offset.is_meta:
        raise MaskError("q_offset is on meta, where tensors have no values; give it on the CPU.")
    given: Any = q_offset.tolist() if isinstance(q_offset, Tensor) else q_offset
    offsets = tuple(given) if isinstance(given, (list, tuple)) else (given,) * len(q_lens)
    if len(offsets) != len(q_lens) or any(
        not isinstance(x, int) or isinstance(x, bool) for x in offsets
    ):
        raise MaskError(
            f"q_offset={q_offset!r}; it must be an int, or one for each of {len(q_lens)} sequences."
        )
    for offset in offsets:
        check_position("q_offset", offset, "a sequence's first query")
    return offsets
