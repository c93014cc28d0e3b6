"""What an expression can be over a whole grid, operands first: that arithmetic does not overflow.

A cell is a part of its grid, so its bounds are inside these: what fits int64 here fits in a cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flexsparse.analysis.interval import INTERVAL_READING, Interval, table_bounds
from flexsparse.arguments import INT_LIMIT
from flexsparse.expr import Index, Mask
from flexsparse.tensors import Table
from flexsparse.tree import VARIABLES, Expr
from flexsparse.walks import postorder

if TYPE_CHECKING:
    from flexsparse.analysis.cells import Grid


def whole_bounds(expr: Expr, grid: Grid) -> Iterator[tuple[Expr, Any]]:
    """Every sub-expression with its Interval or Truth over the whole grid, operands first."""
    variables = {
        "b": Interval(0, grid.batch - 1),
        "h": Interval(min(grid.heads), max(grid.heads)),
        "q_idx": Interval(grid.q_offset, grid.q_offset + grid.q_len - 1),
        "kv_idx": Interval(0, grid.kv_len - 1),
    }
    bounds: dict[int, Any] = {}
    for node in postorder(expr):
        if node.op in VARIABLES:
            result: Any = variables[node.op]
        elif isinstance(node.payload, Table):
            result = table_bounds(node.payload)
        else:
            constant = () if node.payload is None else (node.payload,)
            result = INTERVAL_READING[node.op](*constant, *[bounds[id(arg)] for arg in node.args])
        if isinstance(node, Index) and result is not None:
            # Python's integers, which do not wrap round as those of tensors would
            result = Interval(int(result.lo), int(result.hi))
        yield node, result
        # a number that leaves int64 wraps round, and nothing is known of it
        bounds[id(node)] = None if leaves_int64(node, result) else result


def leaves_int64(node: Expr, bounds: Any) -> bool:
    """Whether a sub-expression is an index that its bounds, if any, do not keep within int64."""
    if not isinstance(node, Index) or bounds is None:
        return False
    return bool(max(-bounds.lo, bounds.hi) >= INT_LIMIT)


def loosely_truncated(mask: Mask, grid: Grid) -> bool:
    """Whether indices are computed from a float cut off to an integer that may be any on this grid.

    In a cell such a float may have bounds, and the arithmetic on them would overflow.
    """
    if all(step.op != "truncate" for step in mask.steps):
        return False
    return any(
        bounds is None and isinstance(node, Index) and node.op not in ("truncate", "opaque")
        for node, bounds in whole_bounds(mask, grid)
    )
