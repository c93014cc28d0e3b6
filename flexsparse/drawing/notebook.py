"""html: a mask as a notebook shows it: a table, a picture, and the same picture to zoom into."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from flexsparse.compiler import CompiledMask
from flexsparse.cost import time_text
from flexsparse.default_device import cpu_by_default
from flexsparse.drawing.canvas import canvas
from flexsparse.drawing.figure import picture
from flexsparse.drawing.page import Layout, lengths_text
from flexsparse.drawing.panels import ELEMENTS_EVALUATED, MOST_PANELS, Panel, Panels, counted, panel
from flexsparse.drawing.paper import small_png
from flexsparse.drawing.plane import ELEMENTS_UP_TO, Plane
from flexsparse.drawing.planes import Lengths, planes
from flexsparse.drawing.words import percent
from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.heads import PerHead
from flexsparse.report import heads_text
from flexsparse.text import SHOWN, formula, shown

LONGEST = 8192  # tokens at which a mask without lengths is shown
LONGEST_OPAQUE = 1024  # where every element may have to be looked at
MOST_ROWS = 8  # of the table, before it is folded up
ENOUGH = 4  # times the largest number in a mask, so that what it does is seen


@cpu_by_default()
def html(drawn: Any) -> str:
    """A Mask, per_head([...]), a CompiledMask or a BlockMask as HTML, without anything outside.

    A table of what each head computes, a picture, and a canvas that takes the place of the picture
    where scripts run: the wheel zooms, dragging moves, hovering names the block. Without matplotlib
    there is no picture. A mask without lengths is shown at a length that shows what it does.
    """
    if not isinstance(drawn, (Mask, PerHead)):
        found = planes("html", drawn, Lengths())
        return _page(type(drawn).__name__, _facts(drawn, found), drawn, found)
    title = f"Mask: {shown(drawn)}" if isinstance(drawn, Mask) else "PerHead"
    reason = ""
    for length in _telling_lengths(drawn):
        try:
            found = planes("html", drawn, Lengths(length))
        except MaskError as error:
            reason = str(error)
            continue
        at = f"{length:,} × {length:,} tokens"
        facts = [f"Shown at {at}; a mask has no length of its own."]
        return _page(title, [*_formula(drawn), *facts], drawn, found)
    return _text(title, [*_formula(drawn), f"No picture: {reason.removeprefix('html: ')}"])


def _formula(drawn: Mask | PerHead) -> list[str]:
    """The mask spelled out, if its name hides that."""
    if isinstance(drawn, PerHead):
        return []
    spelled_out = formula(drawn, SHOWN)
    return [] if spelled_out == shown(drawn) else [spelled_out]


def _telling_lengths(drawn: Mask | PerHead) -> Iterator[int]:
    """Lengths to try: as long as its tables, or as its numbers ask for, or a few tokens."""
    masks = drawn.distinct if isinstance(drawn, PerHead) else (drawn,)
    tables = [t.tensor.shape[0] for mask in masks for t in mask.tables if t.tensor.dim() == 1]
    numbers = [
        abs(step.payload)
        for mask in masks
        for step in mask.steps
        if step.op == "const" and not step.is_mask
    ]
    wanted = max(numbers, default=1) * ENOUGH
    is_opaque = any(mask.opaque_operators for mask in masks)
    most = LONGEST_OPAQUE if is_opaque else LONGEST
    if tables and ELEMENTS_UP_TO < min(tables) <= most:
        yield min(tables)
    if wanted > ELEMENTS_UP_TO:
        yield min(1 << (wanted - 1).bit_length(), most)
    yield ELEMENTS_UP_TO


def _facts(drawn: Any, found: Sequence[Plane]) -> list[str]:
    grid = found[0].grid
    facts = [lengths_text(grid, with_blocks=True)]
    if isinstance(drawn, CompiledMask):
        facts[0] = f"{heads_text(drawn)}, {facts[0]}, {drawn.device}"
        facts.append(f"Compiled in {time_text(drawn.compile_seconds)}.")
    return facts


def _page(title: str, facts: Sequence[str], drawn: Any, found: Sequence[Plane]) -> str:
    first = found[:MOST_PANELS]
    layout = Layout.of(len(first))
    blocks = [counted(plane, ELEMENTS_EVALUATED // len(first)) for plane in first]
    pooled = Panels(tuple(panel(x, layout.pools) for x in blocks), len(found) - len(first))
    if pooled.left_out:
        facts = [*facts, f"{pooled.left_out:,} more distinct masks are left out."]
    return canvas(
        blocks, _text(title, facts) + _table(drawn, pooled.shown) + _still(pooled, layout)
    )


def _still(pooled: Panels, layout: Layout) -> str:
    """The picture as an image, or nothing without matplotlib."""
    try:
        data = base64.b64encode(small_png(picture(pooled, layout))).decode()
    except ImportError:
        return ""
    return f'<img alt="which blocks each head computes" src="data:image/png;base64,{data}">'


def _table(drawn: Any, panels: Sequence[Panel]) -> str:
    """What each distinct mask computes, a row each; folded up where there are many."""
    rows = [_row(drawn, x) for x in panels]
    head = "".join(f'<th class="flexsparse-{cell.align}">{cell.name}</th>' for cell in rows[0])
    lines = [
        "".join(f'<td class="flexsparse-{cell.align}">{cell.text}</td>' for cell in row)
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    if len(panels) <= MOST_ROWS:
        return table
    return f"<details><summary>{len(panels)} distinct masks</summary>{table}</details>"


class Cell(NamedTuple):
    """A cell of the table: the name of its column, its HTML, and the side it keeps to."""

    name: str
    text: str
    align: str = "right"


def _row(drawn: Any, x: Panel) -> list[Cell]:
    row = [
        Cell("heads", escape(x.who.removeprefix("heads ").removeprefix("head ")), "left"),
        Cell("mask", f"<code>{escape(x.name)}</code>", "left"),
    ]
    if isinstance(drawn, CompiledMask):
        h = x.owners[0][1] or 0
        launch = next(launch for launch in drawn.launches if h in launch.heads)
        row.append(Cell("executor", launch.usual_executor, "left"))
    if x.elements is None:
        row += [
            Cell("blocks computed", f"{x.blocks:,}"),
            Cell("of them full", f"{int(x.full.sum()):,}"),
            Cell("of all blocks", percent(x.block_density)),
        ]
    return [*row, Cell("elements kept", percent(x.element_density))]


def _text(title: str, facts: Sequence[str]) -> str:
    lines = "".join(f"<div>{escape(fact)}</div>" for fact in facts)
    return f"<div><b>{escape(title)}</b>{lines}</div>"
