"""Blocks proved to be PARTIAL, by bounds that some pair of the block reaches.

In a block every query meets every key. Where `kv_idx <= q_idx` may be true and may be false, its
last query and first key make it true, and its first query and last key false: nobody has to look.
What is said here of an index or a mask is sure; where nothing is sure, it is False.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid, batch_and_head, positions
from flexsparse.analysis.interval import INTERVAL_READING, Bound, Interval, Truth, read_table
from flexsparse.analysis.pyramid import Pyramid
from flexsparse.expr import Mask
from flexsparse.tensors import Table
from flexsparse.tree import evaluate

QUERY, KEY = 1, 2  # what an expression reads of a pair, as bits


class Reach(NamedTuple):
    """An index in a block.

    bounds: what INTERVAL_READING makes of it, an Interval or None
    reads: QUERY, KEY, both or neither
    reached: whether it is at both bounds somewhere
    gapless: whether it is everything between them somewhere
    """

    bounds: Any
    reads: int
    reached: Bound
    gapless: Bound


class Sight(NamedTuple):
    """A mask in a block.

    bounds: what INTERVAL_READING makes of it
    reads: QUERY, KEY, both or neither
    some: whether it is true somewhere
    not_all: whether it is false somewhere
    """

    bounds: Truth
    reads: int
    some: Bound
    not_all: Bound


def bound_blocks(
    mask: Mask, reading: dict[str, Any], grid: Grid, cells: list[Tensor]
) -> tuple[Tensor, ...]:
    """What is proved of a mask in single blocks: (always true, may ever be, some true, some false).

    Args:
        mask: what to bound.
        reading: its reached_reading.
        grid: lengths and block size.
        cells: planes, rows and columns of the blocks.
    """
    seen: Sight = evaluate(mask, block_variables(grid, cells), reading)
    proved = (*seen.bounds, seen.some, seen.not_all)
    return tuple(torch.as_tensor(x).expand(cells[0].shape) for x in proved)


def block_variables(grid: Grid, cells: list[Tensor]) -> dict[str, Any]:
    """What b, h, q_idx and kv_idx are in single blocks: a Reach each."""
    b, h = (Reach(Interval(x, x), 0, True, True) for x in batch_and_head(grid, cells[0]))
    q, kv = positions(grid, cells, 1)
    q_idx, kv_idx = Reach(q, QUERY, True, True), Reach(kv, KEY, True, True)
    return {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}


def reached_reading(
    reading: dict[str, Any], pyramid_of: Callable[[Table], Pyramid]
) -> dict[str, Any]:
    """What operators mean on Reach and Sight.

    Args:
        reading: what they mean on intervals.
        pyramid_of: the pyramid of a table.
    """

    def lookup(table: Table, *indices: Reach) -> Reach | Sight:
        intervals = [x.bounds for x in indices]
        bounds, reached = read_table(pyramid_of(table), *intervals, ask_reached=True)
        reached = functools.reduce(operator.and_, (x.gapless for x in indices), reached)
        reached = reached & _apart(*indices)
        if isinstance(bounds, Truth):
            sight = _sight(bounds, if_ever=reached, unless_always=reached)
            return Sight(bounds, _reads(indices), *sight)
        if bounds is None or table.tensor.is_floating_point():
            return Reach(bounds, _reads(indices), False, False)
        return Reach(bounds, _reads(indices), reached, reached & (bounds.lo == bounds.hi))

    known = {op: functools.partial(_apply, rule, RULES.get(op)) for op, rule in reading.items()}
    return {**known, "lookup": lookup}


def _apply(
    bounds_rule: Callable[..., Any], rule: Callable[..., tuple[Bound, Bound]] | None, *given: Any
) -> Reach | Sight:
    """An operator on its payload, if it has one, and its operands."""
    operands = [x for x in given if isinstance(x, (Reach, Sight))]
    bounds = bounds_rule(*[x.bounds if isinstance(x, (Reach, Sight)) else x for x in given])
    reads = _reads(operands)
    if isinstance(bounds, Truth):
        return Sight(bounds, reads, *(rule or _sight)(bounds, *operands))
    if rule is None or bounds is None or any(x.bounds is None for x in operands):
        return Reach(bounds, reads, False, False)
    return Reach(bounds, reads, *rule(bounds, *operands))


def _reads(operands: Iterable[Reach | Sight]) -> int:
    return functools.reduce(operator.or_, (x.reads for x in operands), 0)


def _apart(*operands: Reach | Sight) -> bool:
    """Whether they can be chosen one by one, since no two read the same half of a pair."""
    return sum(x.reads for x in operands) == _reads(operands)


def _sight(
    bounds: Truth, *_: Any, if_ever: Bound = False, unless_always: Bound = False
) -> tuple[Bound, Bound]:
    """What bounds say by themselves, and what they say if they are reached."""
    never, ever_false = INTERVAL_READING["~"](bounds)
    return bounds.always | (bounds.ever & if_ever), never | (ever_false & unless_always)


def _constant(bounds: Interval | Truth) -> tuple[Bound, Bound]:
    return _sight(bounds) if isinstance(bounds, Truth) else (True, True)


def _both(_: object, a: Reach, b: Reach) -> tuple[Bound, Bound]:
    """Of operators that are monotone in each operand, and go in steps of 1 at most."""
    apart = _apart(a, b)
    return a.reached & b.reached & apart, a.gapless & b.gapless & apart


def _multiply(bounds: Interval, a: Reach, b: Reach) -> tuple[Bound, Bound]:
    return _both(bounds, a, b)[0], False


def _floor_divide(bounds: Interval, a: Reach, b: Reach) -> tuple[Bound, Bound]:
    lo, hi = b.bounds
    reached = _both(bounds, a, b)[0] & ((lo > 0) | (hi < 0))
    return reached, reached & a.gapless & (lo == hi)


def _remainder(bounds: Interval, a: Reach, b: Reach) -> tuple[Bound, Bound]:
    lo, hi = b.bounds
    # within one quotient it counts up; from one to the next it is at both of its ends
    reached = a.gapless & (lo == hi) & (lo != 0)
    return reached, reached & (a.bounds.hi - a.bounds.lo >= bounds.hi - bounds.lo)


def _absolute(_: object, a: Reach) -> tuple[Bound, Bound]:
    return a.gapless, a.gapless


def _narrow(bounds: Interval, a: Reach) -> tuple[Bound, Bound]:
    fits = (bounds.lo == a.bounds.lo) & (bounds.hi == a.bounds.hi)
    return a.reached & fits, a.gapless & fits


def _compare(bounds: Truth, a: Reach, b: Reach) -> tuple[Bound, Bound]:
    reached = _both(bounds, a, b)[0]
    return _sight(bounds, if_ever=reached, unless_always=reached)


def _equal(bounds: Truth, a: Reach, b: Reach) -> tuple[Bound, Bound]:
    reached, gapless = _both(bounds, a, b)
    if a.bounds is None or b.bounds is None:
        return _sight(bounds)
    meet = functools.reduce(operator.or_, (x == y for x in a.bounds for y in b.bounds))
    return _sight(bounds, if_ever=gapless | (reached & meet), unless_always=reached)


def _and(_: object, a: Sight, b: Sight) -> tuple[Bound, Bound]:
    some = (
        (a.bounds.always & b.some) | (b.bounds.always & a.some) | (a.some & b.some & _apart(a, b))
    )
    return some, a.not_all | b.not_all


def _invert(_: object, a: Sight) -> tuple[Bound, Bound]:
    return a.not_all, a.some


def _or(bounds: Truth, a: Sight, b: Sight) -> tuple[Bound, Bound]:
    # not (not a and not b)
    not_a, not_b = (
        Sight(INTERVAL_READING["~"](x.bounds), x.reads, x.not_all, x.some) for x in (a, b)
    )
    not_all, some = _and(bounds, not_a, not_b)
    return some, not_all


# (reached, gapless) of an index, (some, not_all) of a mask; of an operator that has no rule here
# nothing is sure but what its bounds say
RULES: dict[str, Callable[..., tuple[Bound, Bound]]] = {
    "const": _constant,
    "+": _both,
    "-": _both,
    "*": _multiply,
    "//": _floor_divide,
    "%": _remainder,
    "abs": _absolute,
    "minimum": _both,
    "maximum": _both,
    "narrow": _narrow,
    "<": _compare,
    "<=": _compare,
    "==": _equal,
    "&": _and,
    "|": _or,
    "~": _invert,
}
