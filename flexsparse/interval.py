"""Interval and Truth: what an expression can be over all positions of a cell.

Bounds are inclusive. `None` stands for "nothing is known", which is always a legal answer: the
analysis then looks closer, and it is slower and never wrong. Vectorised: a bound is an int64 tensor
with an entry for each cell, or a plain int.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.pyramid import Pyramid

Bound = Any  # Tensor | int; torch's stubs do not type arithmetic between the two


class Interval(NamedTuple):
    """All integers an index expression can be in a cell, lo <= value <= hi."""

    lo: Bound
    hi: Bound


class Truth(NamedTuple):
    """Whether a mask is true everywhere in a cell (always), and whether it may be anywhere (ever)."""

    always: Bound
    ever: Bound


UNDECIDED = Truth(False, True)


def _lowest(*bounds: Bound) -> Bound:
    return _fold(torch.minimum, min, bounds)


def _highest(*bounds: Bound) -> Bound:
    return _fold(torch.maximum, max, bounds)


def _fold(tensor_op: Callable[..., Tensor], number_op: Callable[..., int], bounds: Any) -> Bound:
    result = bounds[0]
    for bound in bounds[1:]:
        if isinstance(result, Tensor) or isinstance(bound, Tensor):
            result = tensor_op(torch.as_tensor(result), torch.as_tensor(bound))
        else:
            result = number_op(result, bound)
    return result


def _where(condition: Bound, yes: Bound, no: Bound) -> Bound:
    if isinstance(condition, Tensor):
        return torch.where(condition, torch.as_tensor(yes), torch.as_tensor(no))
    return yes if condition else no


def _not(x: Bound) -> Bound:
    return ~x if isinstance(x, Tensor) else not x


def _add(a: Interval, b: Interval) -> Interval:
    return Interval(a.lo + b.lo, a.hi + b.hi)


def _subtract(a: Interval, b: Interval) -> Interval:
    return Interval(a.lo - b.hi, a.hi - b.lo)


def _multiply(a: Interval, b: Interval) -> Interval:
    products = [x * y for x in a for y in b]
    return Interval(_lowest(*products), _highest(*products))


def _floor_divide(a: Interval, b: Interval) -> Interval:
    # floor division is monotone in each argument while the divisor keeps its sign
    has_zero = (b.lo <= 0) & (b.hi >= 0)
    divisors = [_where(has_zero, 1, bound) for bound in b]
    quotients = [x // y for x in a for y in divisors]
    # |x // y| <= |x| whatever the divisor
    size = _highest(abs(a.lo), abs(a.hi))
    return Interval(
        _where(has_zero, -size, _lowest(*quotients)), _where(has_zero, size, _highest(*quotients))
    )


def _remainder(a: Interval, b: Interval) -> Interval:
    # within one quotient of one divisor the remainder just counts up
    known = (b.lo == b.hi) & (b.lo != 0)
    divisor = _where(known, b.lo, 1)
    quotient = a.lo // divisor
    counting = known & (quotient == a.hi // divisor)
    lo = _where(b.lo < 0, b.lo + 1, 0)
    hi = _where(b.hi > 0, b.hi - 1, 0)
    return Interval(
        _where(counting, a.lo - quotient * divisor, lo), _where(counting, a.hi - quotient * divisor, hi)
    )


def _absolute(a: Interval) -> Interval:
    return Interval(_highest(a.lo, -a.hi, 0), _highest(a.hi, -a.lo))


def _minimum(a: Interval, b: Interval) -> Interval:
    return Interval(_lowest(a.lo, b.lo), _lowest(a.hi, b.hi))


def _maximum(a: Interval, b: Interval) -> Interval:
    return Interval(_highest(a.lo, b.lo), _highest(a.hi, b.hi))


def _less(a: Interval, b: Interval) -> Truth:
    return Truth(a.hi < b.lo, a.lo < b.hi)


def _less_equal(a: Interval, b: Interval) -> Truth:
    return Truth(a.hi <= b.lo, a.lo <= b.hi)


def _equal(a: Interval, b: Interval) -> Truth:
    ever = (a.lo <= b.hi) & (b.lo <= a.hi)
    return Truth((a.lo == b.hi) & (a.hi == b.lo), ever)


def _and(a: Truth, b: Truth) -> Truth:
    return Truth(a.always & b.always, a.ever & b.ever)


def _or(a: Truth, b: Truth) -> Truth:
    return Truth(a.always | b.always, a.ever | b.ever)


def _invert(a: Truth) -> Truth:
    return Truth(_not(a.ever), _not(a.always))


def _exclusive_or(a: Truth, b: Truth) -> Truth:
    return _and(_or(a, b), _invert(_and(a, b)))


def _unless_unknown(rule: Callable[..., Interval]) -> Callable[..., Interval | None]:
    def apply(*operands: Interval | None) -> Interval | None:
        return None if any(x is None for x in operands) else rule(*operands)

    return apply


def _comparison(rule: Callable[[Interval, Interval], Truth]) -> Callable[..., Truth]:
    def apply(a: Interval | None, b: Interval | None) -> Truth:
        return UNDECIDED if a is None or b is None else rule(a, b)

    return apply


def _constant(value: int) -> Interval | Truth:
    return Truth(value, value) if isinstance(value, bool) else Interval(value, value)


def _lookup(pyramid: Pyramid, *indices: Interval | None) -> Interval | Truth | None:
    known = [i for i in indices if i is not None]
    if len(known) < len(indices):
        return UNDECIDED if pyramid.is_boolean else None
    lo, hi = pyramid.bounds([i.lo for i in known], [i.hi for i in known])
    return Truth(lo, hi) if pyramid.is_boolean else Interval(lo, hi)


# what the operators mean on intervals; `lookup` takes the Pyramid of its table
INTERVAL_READING: dict[str, Callable[..., Any]] = {
    "const": _constant,
    "lookup": _lookup,
    "+": _unless_unknown(_add),
    "-": _unless_unknown(_subtract),
    "*": _unless_unknown(_multiply),
    "//": _unless_unknown(_floor_divide),
    "%": _unless_unknown(_remainder),
    "abs": _unless_unknown(_absolute),
    "minimum": _unless_unknown(_minimum),
    "maximum": _unless_unknown(_maximum),
    "<": _comparison(_less),
    "<=": _comparison(_less_equal),
    "==": _comparison(_equal),
    "&": _and,
    "|": _or,
    "^": _exclusive_or,
    "~": _invert,
}
