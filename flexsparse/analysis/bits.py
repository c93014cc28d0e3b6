"""Bounds of bit operations: the bits above the highest one in which two bounds differ are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Bits(NamedTuple):
    """Each bit of a value is at least that of `ones` and at most that of `possible`."""

    ones: Tensor
    possible: Tensor


def _all_below(x: Tensor) -> Tensor:
    """X with every bit below its highest one set."""
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return x


def _bits(lo: Tensor, hi: Tensor) -> _Bits:
    unknown = _all_below(lo ^ hi)
    return _Bits(lo & ~unknown, lo | unknown)


def _bounds(a: Any, b: Any, combine: Callable[[_Bits, _Bits], _Bits]) -> tuple[Tensor, Tensor]:
    a, b = ([torch.as_tensor(x) for x in bounds] for bounds in (a, b))
    ones, possible = combine(_bits(*a), _bits(*b))
    # where even the sign is open, the result still has no more bits than the operands
    sizes = [torch.maximum(hi, ~lo) for lo, hi in (a, b)]
    size = _all_below(torch.maximum(*sizes))
    open_sign = (ones >= 0) & (possible < 0)
    return torch.where(open_sign, ~size, ones), torch.where(open_sign, size, possible)


def bounds_of_and(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Bounds of a & b, two's complement integers within bounds (lo, hi)."""
    return _bounds(a, b, lambda x, y: _Bits(x.ones & y.ones, x.possible & y.possible))


def bounds_of_or(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Bounds of a | b, two's complement integers within bounds (lo, hi)."""
    return _bounds(a, b, lambda x, y: _Bits(x.ones | y.ones, x.possible | y.possible))


def bounds_of_xor(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Bounds of a ^ b, two's complement integers within bounds (lo, hi)."""

    def combine(x: _Bits, y: _Bits) -> _Bits:
        unknown = (x.ones ^ x.possible) | (y.ones ^ y.possible)
        differ = (x.ones ^ y.ones) & ~unknown
        return _Bits(differ, differ | unknown)

    return _bounds(a, b, combine)
