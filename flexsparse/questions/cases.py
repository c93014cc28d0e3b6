"""What is looked at: the masks of all heads at given lengths, each distinct one with its grid."""

from __future__ import annotations

from typing import NamedTuple

from flexsparse.analysis.cells import Grid
from flexsparse.arguments import check_grid
from flexsparse.expr import Mask
from flexsparse.heads import PerHead, as_per_head, refuse_other, refuse_other_count
from flexsparse.text import shown


class Case(NamedTuple):
    """A distinct mask, the heads that have it (None: every head there may be), and its grid.

    unknown: what it reads without being told how many there are: n_heads, batch
    """

    heads: tuple[int, ...] | None
    mask: Mask
    grid: Grid
    unknown: tuple[str, ...]


def cases(
    verb: str,
    mask: Mask | PerHead,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None,
    n_heads: int | None,
    q_offset: int | None,
    block_size: tuple[int, int] = (128, 128),
) -> tuple[Case, ...]:
    """The distinct masks of a mask; errors begin with `verb`, the function that the user called."""
    check_grid(f"{verb}: ", q_len, kv_len, batch, n_heads, q_offset)
    refuse_other(verb, mask)
    refuse_other_count(f"{verb}: ", mask, n_heads)
    masks = as_per_head(mask, n_heads or 1)
    every_head = isinstance(mask, Mask) and n_heads is None
    offset = kv_len - q_len if q_offset is None else q_offset
    found = []
    for place, distinct in enumerate(masks.distinct):
        reads_b, reads_h = (name in distinct.variables for name in ("b", "h"))
        heads = masks.heads_of(place)
        grid = Grid(q_len, kv_len, offset, block_size, batch or 1, heads).read_by(distinct)
        unknown = (["n_heads"] if reads_h and every_head else []) + (
            ["batch"] if reads_b and batch is None else []
        )
        found.append(Case(None if every_head else heads, distinct, grid, tuple(unknown)))
    return tuple(found)


def missing_argument(case: Case) -> str | None:
    """Which argument is missing for a mask that reads the head or the batch row, or None."""
    if not case.unknown:
        return None
    reads = " and ".join({"n_heads": "h", "batch": "b"}[name] for name in case.unknown)
    give = ", ".join(f"{name}=..." for name in case.unknown)
    return f"The mask reads {reads}, so its blocks differ: give {give} ({shown(case.mask)})"
