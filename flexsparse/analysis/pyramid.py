"""Smallest and largest entry of a table over a range of indices, from a min/max pyramid."""

from __future__ import annotations

import functools
import itertools
import operator
from typing import Any

import torch
from torch import Tensor

MOST_NODES = 4  # reads a dimension, which bound a range to within a half of its length


class Pyramid:
    """The table's minimum and maximum over aligned ranges of 1, 2, 4, ... entries a dimension.

    A range is covered by one node a dimension where it is aligned, as the cells of the analysis
    are, and by a few smaller ones elsewhere: bounds may be too wide and are never too narrow.

    A dimension takes part once it is read over a range; one that is always read at one entry, as a
    table of parameters per head is, stays whole.

    Args:
        table: integers, booleans or floats, 0 to 4 dimensions.
    """

    def __init__(self, table: Tensor) -> None:
        table = table.detach().cpu()
        self.is_boolean = table.dtype == torch.bool
        self.shape = table.shape
        self._build(table, (False,) * table.dim())

    def _build(self, table: Tensor, ranged: tuple[bool, ...]) -> None:
        self.ranged = ranged
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

    def bounds(
        self, first: list[Any], last: list[Any], *, ask_reached: bool = False
    ) -> tuple[Any, Any, Any]:
        """Bounds of the entries with first <= index <= last, as (lo, hi, reached), for each cell.

        reached says where both bounds are known to be entries of the range. To find out takes as
        long again, and where nobody asks it is False.

        Indices outside the table are moved to its edge: whether that can happen is checked apart.
        """
        if not self.shape:
            value = _wide(self.levels[0][0])
            return value, value, True
        sizes = [n - 1 for n in self.shape]
        first = [torch.as_tensor(x).clamp(0, n) for x, n in zip(first, sizes, strict=True)]
        last = [torch.as_tensor(x).clamp(0, n) for x, n in zip(last, sizes, strict=True)]
        # an index of the head alone may have a range too: (h * 5) % 8 where `%` is not bounded
        ranged = tuple(
            r or bool((a != b).any()) for a, b, r in zip(first, last, self.ranged, strict=True)
        )
        if ranged != self.ranged:
            self._build(self.levels[0][0], ranged)
        spans = [b - a for a, b, r in zip(first, last, self.ranged, strict=True) if r]
        if not spans:
            lo = hi = self.levels[0][0][tuple(first)]
            return _wide(lo), _wide(hi), True
        widest = functools.reduce(torch.maximum, spans)
        # cells of one size have spans alike, but where a table of places jumps inside a cell
        is_wide = widest > 2 * int(widest.min()) + 1
        if is_wide.any():
            return self._apart(first, last, is_wide, ask_reached)
        level = min(int(widest.max()).bit_length(), len(self.levels) - 1)
        ranges = self._nodes(first, last, level)
        # one node of twice the span at most is close enough; two may be far too wide
        while level and any(len(nodes) > 1 for nodes in ranges):
            finer = self._nodes(first, last, level - 1)
            if max(len(nodes) for nodes in finer) > MOST_NODES:
                break
            level, ranges = level - 1, finer
        lows, highs = self.levels[level]
        nodes = list(itertools.product(*ranges))
        lo = functools.reduce(torch.minimum, [lows[node] for node in nodes])
        hi = functools.reduce(torch.maximum, [highs[node] for node in nodes])
        reached: Any = False
        if ask_reached:
            inside = self._inside(ranges, first, last, level)
            least, most = hi, lo  # of nodes that are not wider than the range
            for node, is_inside in zip(nodes, inside, strict=True):
                least = torch.minimum(least, torch.where(is_inside, lows[node], hi))
                most = torch.maximum(most, torch.where(is_inside, highs[node], lo))
            reached = (least == lo) & (most == hi)
        return _wide(lo), _wide(hi), reached

    def _apart(
        self, first: list[Tensor], last: list[Tensor], is_wide: Tensor, ask_reached: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of the cells that are wide and of those that are not, each at their own level."""
        shape = torch.broadcast_tensors(*first, *last)[0].shape  # type: ignore[no-untyped-call]
        first, last = ([x.expand(shape) for x in ends] for ends in (first, last))
        is_wide = is_wide.expand(shape)
        lo, hi = (x.new_empty(shape) for x in map(_wide, self.levels[0]))
        reached = torch.empty(shape, dtype=torch.bool)
        for part in (is_wide, ~is_wide):
            ends = [x[part] for x in first], [x[part] for x in last]
            bounds = self.bounds(*ends, ask_reached=ask_reached)
            for result, bound in zip((lo, hi, reached), bounds, strict=True):
                result[part] = bound
        return lo, hi, reached

    def _inside(
        self, ranges: list[list[Tensor]], first: list[Tensor], last: list[Tensor], level: int
    ) -> list[Any]:
        """Of each combination of nodes, one a dimension, whether it lies between first and last."""
        inside: list[list[Any]] = []
        for nodes, start, end, n, is_ranged in zip(
            ranges, first, last, self.shape, self.ranged, strict=True
        ):
            if not is_ranged:
                inside.append([True])
                continue
            begins = (start + (1 << level) - 1) >> level  # the first node that begins in the range
            ends = torch.where(end == n - 1, end, end - ((1 << level) - 1)) >> level
            inside.append([(begins <= node) & (node <= ends) for node in nodes])
        return [functools.reduce(operator.and_, x) for x in itertools.product(*inside)]

    def _nodes(self, first: list[Tensor], last: list[Tensor], level: int) -> list[list[Tensor]]:
        """For each dimension the nodes of a level that together cover first to last."""
        ranges = []
        for start, end, is_ranged in zip(first, last, self.ranged, strict=True):
            if not is_ranged:
                ranges.append([start])
                continue
            start, end = start >> level, end >> level
            more = int((end - start).max())
            ranges.append([start, *(torch.minimum(start + i, end) for i in range(1, more + 1))])
        return ranges


def _halve(x: Tensor, dim: int, extremum: Any) -> Tensor:
    if x.shape[dim] % 2:
        x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)
    step = [slice(None)] * x.dim()
    even, odd = step.copy(), step.copy()
    even[dim], odd[dim] = slice(0, None, 2), slice(1, None, 2)
    return torch.as_tensor(extremum(x[tuple(even)], x[tuple(odd)]))


def _wide(x: Any) -> Any:
    return x if x.dtype == torch.bool or x.is_floating_point() else x.long()
