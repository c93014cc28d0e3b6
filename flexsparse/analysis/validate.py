"""What must hold of a mask at given lengths for it to be compiled; a broken rule is a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import classify
from flexsparse.analysis.whole import leaves_int64, whole_bounds
from flexsparse.arguments import INT32_MAX
from flexsparse.expr import Index, Mask
from flexsparse.tensors import Table
from flexsparse.text import shown
from flexsparse.tree import Expr, kept_at


def problem(mask: Mask, grid: Grid, device: torch.device | None) -> str | None:
    """Why this mask cannot be compiled for this grid and device, or None if it can.

    Proved, not sampled: a table is read out of range, or a divisor is 0, only if some
    (b, h, q_idx, kv_idx) of the grid does it.
    """
    for table in mask.tables:
        if table.without_values:
            return table.without_values
        if table.tensor.device != device:
            # on meta the table would lose its values
            move = "" if str(device) == "meta" else f"Compile mask.to({str(device)!r}), or "
            fix = f"{move}compile with device={str(table.tensor.device)!r}."
            return (
                f"The table {table!r} is on {table.tensor.device} and the mask is compiled for "
                f"{device}. {fix[0].upper()}{fix[1:]}"
            )
        if table.stale:
            return table.stale
    for broken, sentence in _suspicions(mask, grid):
        place = find(broken, grid)
        if place is not None:
            b, h, q, kv = place
            return f"{sentence} at q_idx={q}, kv_idx={kv} (b={b}, h={h})."
    return None


def needs_int64(mask: Mask, grid: Grid) -> bool:
    """Whether index arithmetic may leave int32 at these lengths."""
    return any(leaves_int32(node, bounds) for node, bounds in whole_bounds(mask, grid))


def leaves_int32(node: Expr, bounds: Any) -> bool:
    """Whether a sub-expression is an index that its bounds do not keep within int32."""
    if not isinstance(node, Index):
        return False
    return bounds is None or bool(max(-bounds.lo, bounds.hi) > INT32_MAX)


def _suspicions(mask: Mask, grid: Grid) -> Iterator[tuple[Mask, str]]:
    """Rules that bounds over the whole grid do not clear: where they are broken, and the sentence.

    Operands come first, so that an expression is looked at only after all that it reads is sound.
    """
    bounds: dict[int, Any] = {}
    for node, bound in whole_bounds(mask, grid):
        bounds[id(node)] = bound
        # an operator without a rule has no bounds; whatever it gives, is exact
        if leaves_int64(node, bound):
            yield (
                Mask("const", payload=True),
                f"{shown(node)} may leave int64 at these lengths (its bounds are {bound.lo} and "
                f"{bound.hi}), for example",
            )
        if node.op in ("//", "%"):
            divisor = node.args[1]
            assert isinstance(divisor, Index)
            about = bounds[id(divisor)]
            if about is None or about.lo <= 0 <= about.hi:
                yield divisor.equals(0), f"The divisor of {shown(node)} is 0"
        if isinstance(node.payload, Table):
            for dim, index in enumerate(node.args):
                size = node.payload.tensor.shape[dim]
                assert isinstance(index, Index)
                about = bounds[id(index)]
                if about is None or about.lo < 0 or about.hi >= size:
                    reach = "may be anything"
                    if about is not None:
                        reach = f"reaches from {about.lo} to {about.hi}"
                    below = about is not None and about.lo < 0 and grid.q_offset < 0
                    negative = " (positions below 0 come from q_offset < 0)" if below else ""
                    yield (
                        (index < 0) | (index >= size),
                        f"The table {node.payload!r} is read out of range: dimension {dim} has "
                        f"{size} entries, and the index {shown(index)} {reach}{negative}. "
                        "Make the table longer, or bound the index with minimum and maximum. It "
                        "is out of range",
                    )


def find(mask: Mask, grid: Grid) -> tuple[int, int, int, int] | None:
    """The first place (b, h, q_idx, kv_idx) of the grid where a mask is true, or None."""
    # the mask is the same along what it does not read, where one place stands for all
    if "q_idx" not in mask.variables:
        grid = grid._replace(q_len=1, block_size=(1, grid.block_size[1]))
    if "kv_idx" not in mask.variables:
        grid = grid._replace(kv_len=1, block_size=(grid.block_size[0], 1))
    if "b" not in mask.variables:
        grid = grid._replace(batch=1)
    if "h" not in mask.variables:
        grid = grid._replace(heads=grid.heads[:1])
    classes = classify(mask, grid)
    for rectangles in (classes.full, classes.partial):
        if not len(rectangles.plane):
            continue
        b, head = divmod(int(rectangles.plane[0]), len(grid.heads))
        h, row, column = grid.heads[head], int(rectangles.row0[0]), int(rectangles.column0[0])
        return b, h, *first_kept(mask, grid, b, h, row, column)
    return None


def first_kept(mask: Mask, grid: Grid, b: int, h: int, row: int, column: int) -> tuple[int, int]:
    """The first place (q_idx, kv_idx) where a mask is true in a block that is not EMPTY."""
    q0, kv0 = row * grid.block_size[0], column * grid.block_size[1]
    q = torch.arange(q0, min(q0 + grid.block_size[0], grid.q_len))[:, None] + grid.q_offset
    kv = torch.arange(kv0, min(kv0 + grid.block_size[1], grid.kv_len))
    places = {"b": torch.tensor(b), "h": torch.tensor(h), "q_idx": q, "kv_idx": kv}
    kept = kept_at(mask, places).expand(len(q), len(kv))
    line, place = kept.nonzero()[0].tolist()
    return int(q[line]), int(kv[place])
