"""Smallest and largest entry of a table over a range of indices, from a min/max pyramid."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


class Pyramid:
    """The table's minimum and maximum over aligned ranges of 1, 2, 4, ... entries a dimension.

    A range of any place and length is covered by two nodes a dimension: exact for the aligned cells
    of the analysis, wider (never narrower) for others.

    Args:
        table: integers, booleans or floats, 0 to 4 dimensions.
        ranged: for each dimension, whether it is read over ranges (else at one entry at a time,
            as a table of parameters per head is).
    """

    def __init__(self, table: Tensor, ranged: tuple[bool, ...]) -> None:
        table = table.detach().cpu()
        self.is_boolean = table.dtype == torch.bool
        self.ranged = ranged
        self.shape = table.shape
        self.levels = [(table, table)]
        longest = max((n for n, r in zip(table.shape, ranged, strict=True) if r), default=1)
        while longest > 1:
            lo, hi = self.levels[-1]
            for dim, is_ranged in enumerate(ranged):
                if is_ranged:
                    lo = _halve(lo, dim, torch.minimum)
                    hi = _halve(hi, dim, torch.maximum)
            self.levels.append((lo, hi))
            longest = (longest + 1) // 2

    def bounds(self, first: list[Any], last: list[Any]) -> tuple[Any, Any]:
        """Bounds of the entries with first <= index <= last, as (lo, hi), one for each cell.

        Indices outside the table are moved to its edge: whether that can happen is checked apart.
        """
        if not self.shape:
            value = _wide(self.levels[0][0])
            return value, value
        sizes = [n - 1 for n in self.shape]
        first = [torch.as_tensor(x).clamp(0, n) for x, n in zip(first, sizes, strict=True)]
        last = [torch.as_tensor(x).clamp(0, n) for x, n in zip(last, sizes, strict=True)]
        spans = [b - a for a, b, r in zip(first, last, self.ranged, strict=True) if r]
        if not spans:
            lo = hi = self.levels[0][0][tuple(first)]
            return _wide(lo), _wide(hi)
        # cells of one level of the refinement are equally large, so the widest span serves all
        widest = max(int(span.max()) for span in spans)
        level = min(widest.bit_length(), len(self.levels) - 1)
        lows, highs = self.levels[level]
        corners = [
            (a >> level, b >> level) if is_ranged else (a,)
            for a, b, is_ranged in zip(first, last, self.ranged, strict=True)
        ]
        lo = hi = None
        for corner in itertools.product(*corners):
            at_lo, at_hi = lows[corner], highs[corner]
            lo = at_lo if lo is None else torch.minimum(lo, at_lo)
            hi = at_hi if hi is None else torch.maximum(hi, at_hi)
        return _wide(lo), _wide(hi)


def _halve(x: Tensor, dim: int, extremum: Any) -> Tensor:
    if x.shape[dim] % 2:
        x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)
    step = [slice(None)] * x.dim()
    even, odd = step.copy(), step.copy()
    even[dim], odd[dim] = slice(0, None, 2), slice(1, None, 2)
    return torch.as_tensor(extremum(x[tuple(even)], x[tuple(odd)]))


def _wide(x: Any) -> Any:
    return x if x.dtype == torch.bool or x.is_floating_point() else x.long()
