"""How many elements a mask keeps in each of its PARTIAL blocks, exactly, without looking at all.

Most partial blocks of a mask are alike: those of a window are one block moved along the diagonal.
Blocks are sorted by a description from which the mask inside them follows, and one of each kind is
evaluated. An index expression is described by `offset` + a function of the place inside the block
that depends on `shape` alone; for a comparison the difference of the two offsets and both shapes
are enough. Comparisons that interval arithmetic decides for a block need no description.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid, interval_reading
from flexsparse.analysis.interval import Interval, Truth
from flexsparse.expr import Mask
from flexsparse.tensors import Table
from flexsparse.tree import Step, kept_at

MOST_BLOCKS = 1 << 19  # that are worth describing; each takes some hundred bytes
ELEMENTS_AT_ONCE = 1 << 20
COMPARISONS = ("<", "<=", "==")
CONNECTIVES = ("&", "|", "^", "~")
MOST_COLUMNS = 16  # of a description; more are numbered, or they would double with each x + x


class Form(NamedTuple):
    """An index expression inside each block: offset + f(place in the block, shape)."""

    offset: Tensor
    shape: tuple[Tensor, ...]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """Numbers that say what the expression is in a block."""
        return (self.offset, *self.shape)


def kept_elements(mask: Mask, grid: Grid, row: Tensor, column: Tensor, most: int) -> Tensor | None:
    """int64: the elements that a mask keeps in each of the given blocks, or None if that is costly.

    Args:
        mask: it reads neither b nor h.
        grid: its lengths, offset and block size.
        row: of each block.
        column: of each block.
        most: elements that may be evaluated.
    """
    if not len(row):
        return row
    kind = _kinds(mask, grid, row, column)
    kinds = int(kind.max()) + 1
    if kinds * grid.block_size[0] * grid.block_size[1] > most:
        return None
    example = torch.empty(kinds, dtype=torch.int64)
    example[kind] = torch.arange(len(kind))  # any block of a kind will do
    return _count(mask, grid, row[example], column[example])[kind]


def _count(mask: Mask, grid: Grid, row: Tensor, column: Tensor) -> Tensor:
    """The elements kept in each block, by looking at all of them."""
    q_step, kv_step = (torch.arange(n) for n in grid.block_size)
    at_once = max(1, ELEMENTS_AT_ONCE // (len(q_step) * len(kv_step)))
    counts = [row[:0]]
    for start in range(0, len(row), at_once):
        q = row[start : start + at_once, None, None] * len(q_step) + q_step[:, None]
        kv = column[start : start + at_once, None, None] * len(kv_step) + kv_step
        inside = (q < grid.q_len) & (kv < grid.kv_len)
        # what sticks out over the end may be outside the tables that the mask reads
        places = {
            "q_idx": q.clamp(max=grid.q_len - 1) + grid.q_offset,
            "kv_idx": kv.clamp(max=grid.kv_len - 1),
        }
        counts.append((kept_at(mask, places) & inside).sum((1, 2)))
    return torch.cat(counts)


def _kinds(mask: Mask, grid: Grid, row: Tensor, column: Tensor) -> Tensor:
    """int64: a number for each block; in blocks of one number the mask keeps the same elements."""
    starts, bounds = [], []
    kind = torch.zeros_like(row)
    for place, block, length, offset in (
        (row, grid.block_size[0], grid.q_len, grid.q_offset),
        (column, grid.block_size[1], grid.kv_len, 0),
    ):
        start = place * block
        end = (start + block).clamp(max=length)
        kind = _divide(kind, end - start)
        starts.append(start + offset)
        bounds.append(Interval(start + offset, end - 1 + offset))
    zero = torch.zeros_like(row)
    reading = interval_reading(mask, grid)
    values: list[Any] = []
    forms: list[Form] = []
    for step in mask.steps:
        operands = [forms[i] for i in step.operands]
        if step.op in ("q_idx", "kv_idx"):
            is_key = step.op == "kv_idx"
            values.append(bounds[is_key])
            forms.append(Form(starts[is_key], ()))
            continue
        constant = () if step.payload is None else (step.payload,)
        value = reading[step.op](*constant, *[values[i] for i in step.operands])
        values.append(value)
        if step.is_mask:
            # its columns are in `kind` from here on, and so need no form
            forms.append(Form(zero, ()))
            if step.op not in CONNECTIVES:
                kind = _divide(kind, *_leaf(step, value, operands, row))
        else:
            numbers = [_number(values[i]) for i in step.operands]
            form = _form(step, operands, numbers, zero) if _is_integer(value) else None
            form = _settled(form, value) if form else _anything(operands, zero)
            if len(form.shape) > MOST_COLUMNS:
                form = Form(form.offset, (_divide(zero, *form.shape),))
            forms.append(form)
    return kind


def _leaf(step: Step, truth: Truth, operands: Sequence[Form], row: Tensor) -> list[Tensor]:
    """What tells blocks apart by one comparison, or by another mask that combines no masks."""
    always, ever = (torch.as_tensor(x).expand(row.shape) for x in truth)
    if step.op in COMPARISONS:
        a, b = operands
        columns = [*a.shape, *b.shape, a.offset - b.offset]
    else:
        columns = list(_anything(operands, row).shape)
    undecided = ever & ~always
    return [undecided * 2 + always, *(x * undecided for x in columns)]


def _anything(operands: Sequence[Form], zero: Tensor) -> Form:
    """What any function of some expressions is: it follows from all that they are."""
    return Form(zero, tuple(column for form in operands for column in form.columns))


def _form(
    step: Step, operands: Sequence[Form], numbers: Sequence[int | None], zero: Tensor
) -> Form:
    """What an integer expression is inside each block."""
    if step.op == "const":
        return Form(zero + step.payload, ())
    if step.op in ("+", "-"):
        a, b = operands
        offset = a.offset + b.offset if step.op == "+" else a.offset - b.offset
        return Form(offset, a.shape + b.shape)
    if step.op in ("//", "%") and numbers[1]:
        a, n = operands[0], numbers[1]
        offset = a.offset // n if step.op == "//" else zero
        return Form(offset, (*a.shape, a.offset % n))
    if step.op == "*":
        for a, factor in ((operands[0], numbers[1]), (operands[1], numbers[0])):
            if factor is not None:
                return Form(a.offset * factor, a.shape)
    if isinstance(step.payload, Table) and not operands:
        return Form(zero + step.payload.tensor.long().cpu(), ())
    return _anything(operands, zero)


def _is_integer(value: Any) -> bool:
    """Whether the bounds of an expression are known and are integers."""
    return isinstance(value, Interval) and not torch.as_tensor(value.lo).is_floating_point()


def _number(value: Any) -> int | None:
    """The integer that an expression is in all blocks, or None if it is not one."""
    if not _is_integer(value):
        return None
    ends = torch.cat([torch.as_tensor(x).flatten() for x in value])
    return int(ends[0]) if bool((ends == ends[0]).all()) else None


def _settled(form: Form, value: Interval) -> Form:
    """The form, simpler where bounds prove that the expression is one number in a block."""
    lo, hi = (torch.as_tensor(x).expand(form.offset.shape) for x in value)
    varies = lo != hi
    if bool(varies.all()):
        return form
    shape = tuple(x * varies for x in form.shape)
    # a number and a function of the place are told apart by the last column
    return Form(torch.where(varies, form.offset, lo), (*shape, varies.long()) if shape else ())


def _divide(kind: Tensor, *columns: Tensor) -> Tensor:
    """Kinds of blocks, parted further by columns of numbers."""
    for column in columns:
        if bool((column == column[0]).all()):
            continue
        values, which = torch.unique(column, return_inverse=True)
        kind = torch.unique(kind * len(values) + which, return_inverse=True)[1]
    return kind
