"""Interval and Truth: what an expression can be over all positions of a cell.

Bounds are inclusive. `None` stands for "nothing is known", which is always a legal answer: the
analysis then looks closer, and it is slower and never wrong. Vectorised: a bound is an int64 tensor
with an entry for each cell, or a plain int.

Floats are bounded in their own dtype, where rounding is monotone, so that bounds of bounds hold.
(-inf, inf) is a float of which nothing is known, NaN included; a finite bound excludes NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis import bits
from flexsparse.analysis.pyramid import Pyramid
from flexsparse.errors import MaskError
from flexsparse.tensors import Number, Opaque, Table

Bound = Any  # Tensor | int; torch's stubs do not type arithmetic between the two


class Interval(NamedTuple):
    """All integers an index expression can be in a cell, lo <= value <= hi."""

    lo: Bound
    hi: Bound


class Truth(NamedTuple):
    """Whether a mask is true everywhere in a cell (always), and whether it may be at all (ever)."""

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


def _remainder(a: Interval | None, b: Interval | None) -> Interval | None:
    if b is None:
        return None
    # whatever is divided: a remainder is smaller than its divisor
    lo = _where(b.lo < 0, b.lo + 1, 0)
    hi = _where(b.hi > 0, b.hi - 1, 0)
    if a is None:
        return Interval(lo, hi)
    # within one quotient of one divisor the remainder just counts up
    known = (b.lo == b.hi) & (b.lo != 0)
    divisor = _where(known, b.lo, 1)
    quotient = a.lo // divisor
    counting = known & (quotient == a.hi // divisor)
    start = quotient * divisor
    return Interval(_where(counting, a.lo - start, lo), _where(counting, a.hi - start, hi))


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
        return None if any(x is None for x in operands) else settled(rule(*operands))

    return apply


def settled(a: Interval) -> Interval:
    """The same bounds, where those of a float that may be infinite or NaN become (-inf, inf)."""
    if not (isinstance(a.lo, Tensor) and a.lo.is_floating_point()):
        return a
    known = a.lo.isfinite() & a.hi.isfinite()
    return Interval(a.lo.where(known, -torch.inf), a.hi.where(known, torch.inf))


def _choose(condition: Truth, yes: Any, no: Any) -> Any:
    """Bounds of `yes` where the condition always holds, of `no` where never, else of both."""

    def pick(of_yes: Bound, of_no: Bound, of_both: Bound) -> Bound:
        return _where(condition.always, of_yes, _where(_not(condition.ever), of_no, of_both))

    if yes is None or no is None:
        return None
    if isinstance(yes, Truth):
        always, ever = yes.always & no.always, yes.ever | no.ever
        return Truth(pick(yes.always, no.always, always), pick(yes.ever, no.ever, ever))
    lo, hi = _lowest(yes.lo, no.lo), _highest(yes.hi, no.hi)
    return settled(Interval(pick(yes.lo, no.lo, lo), pick(yes.hi, no.hi, hi)))


def _bit_rule(rule: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Interval | None]:
    return _unless_unknown(lambda a, b: Interval(*rule(a, b)))


def _narrow(dtype: torch.dtype, a: Interval | None) -> Interval:
    """Integers that wrap round to fit a dtype."""
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if a is None:
        return Interval(least, most)
    fits = (a.lo >= least) & (a.hi <= most)
    return Interval(_where(fits, a.lo, least), _where(fits, a.hi, most))


def _number(number: Number) -> Interval:
    value = torch.tensor(number.value, dtype=number.dtype)
    return settled(Interval(value, value))


def _float(dtype: torch.dtype, a: Interval | None) -> Interval | None:
    return None if a is None else settled(Interval(*(torch.as_tensor(x).to(dtype) for x in a)))


def _truncate(dtype: torch.dtype, a: Interval | None) -> Interval | None:
    """A float cut off to an integer; what does not fit the integer is anyone's guess."""
    if a is None:
        return None
    limit = min(torch.iinfo(dtype).max // 2, 2**61)  # half, because floats round
    least = 0 if torch.iinfo(dtype).min == 0 else -limit
    if not bool(((a.lo >= least) & (a.hi <= limit)).all()):
        return None
    return Interval(a.lo.long(), a.hi.long())


def _divide(a: Interval, b: Interval) -> Interval:
    has_zero = (b.lo <= 0) & (b.hi >= 0)
    quotients = [x / y for x in a for y in b]
    return Interval(
        _where(has_zero, -torch.inf, _lowest(*quotients)),
        _where(has_zero, torch.inf, _highest(*quotients)),
    )


def _monotone(function: Callable[[Tensor], Tensor]) -> Callable[..., Interval | None]:
    return _unless_unknown(lambda a: Interval(function(a.lo), function(a.hi)))


def _opaque(payload: Opaque, *_operands: Any) -> Truth | None:
    return UNDECIDED if payload.dtype == torch.bool else None


def _comparison(rule: Callable[[Interval, Interval], Truth]) -> Callable[..., Truth]:
    def apply(a: Interval | None, b: Interval | None) -> Truth:
        return UNDECIDED if a is None or b is None else rule(a, b)

    return apply


def _constant(value: int) -> Interval | Truth:
    return Truth(value, value) if isinstance(value, bool) else Interval(value, value)


def read_table(
    pyramid: Pyramid, *indices: Interval | None, ask_reached: bool = False
) -> tuple[Interval | Truth | None, Bound]:
    """Bounds of the entries that indices may point at, and whether both are known to be entries."""
    known = [i for i in indices if i is not None]
    if len(known) < len(indices):
        return (UNDECIDED if pyramid.is_boolean else None), False
    first, last = [i.lo for i in known], [i.hi for i in known]
    lo, hi, reached = pyramid.bounds(first, last, ask_reached=ask_reached)
    return (Truth(lo, hi) if pyramid.is_boolean else settled(Interval(lo, hi))), reached


def table_bounds(table: Table) -> Interval | Truth:
    """The least and the greatest entry of a table.

    Raises:
        MaskError: it is on meta.
    """
    if table.without_values:
        raise MaskError(table.without_values)
    tensor = table.tensor.detach()
    is_boolean = tensor.dtype == torch.bool
    # torch is many times slower with booleans
    low, high = (x.cpu() for x in (tensor.view(torch.uint8) if is_boolean else tensor).aminmax())
    if low.is_floating_point():
        return settled(Interval(low, high))
    return Truth(bool(low), bool(high)) if is_boolean else Interval(int(low), int(high))


# what the operators mean on intervals; `lookup` takes the Pyramid of its table
INTERVAL_READING: dict[str, Callable[..., Any]] = {
    "const": _constant,
    "lookup": lambda pyramid, *indices: read_table(pyramid, *indices)[0],
    "+": _unless_unknown(_add),
    "-": _unless_unknown(_subtract),
    "*": _unless_unknown(_multiply),
    "//": _unless_unknown(_floor_divide),
    "%": _remainder,
    "abs": _unless_unknown(_absolute),
    "minimum": _unless_unknown(_minimum),
    "maximum": _unless_unknown(_maximum),
    "where": _choose,
    "bit_and": _bit_rule(bits.bounds_of_and),
    "bit_or": _bit_rule(bits.bounds_of_or),
    "bit_xor": _bit_rule(bits.bounds_of_xor),
    "narrow": _narrow,
    "number": _number,
    "float": _float,
    "truncate": _truncate,
    "/": _unless_unknown(_divide),
    "sqrt": _monotone(torch.sqrt),
    "floor": _monotone(torch.floor),
    "ceil": _monotone(torch.ceil),
    "opaque": _opaque,
    "<": _comparison(_less),
    "<=": _comparison(_less_equal),
    "==": _comparison(_equal),
    "&": _and,
    "|": _or,
    "^": _exclusive_or,
    "~": _invert,
}
