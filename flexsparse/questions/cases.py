"""What is looked at: the masks of all heads at given lengths, each distinct one with its grid."""

from __future__ import annotations

from typing import NamedTuple

from flexsparse.analysis.classify import Grid
from flexsparse.arguments import INT32_MAX, MOST_HEADS, check_position, check_size
from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.heads import PerHead, not_a_mask
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
    check_size(f"{verb}: q_len", q_len, INT32_MAX)
    check_size(f"{verb}: kv_len", kv_len, INT32_MAX)
    check_size(f"{verb}: batch", batch, INT32_MAX, optional=True)
    check_size(f"{verb}: n_heads", n_heads, MOST_HEADS, optional=True)
    check_position(f"{verb}: q_offset", q_offset, "query row 0", optional=True)
    reason = not_a_mask(mask)
    if reason is not None:
        raise MaskError(f"{verb} takes a Mask or per_head([...]), not {reason}")
    if isinstance(mask, PerHead) and n_heads not in (None, mask.n_heads):
        raise MaskError(
            f"{verb}: per_head got {mask.n_heads} masks but n_heads={n_heads}. Give one mask for "
            "each query head, or leave n_heads out."
        )
    masks = PerHead((mask,), (0,) * (n_heads or 1)) if isinstance(mask, Mask) else mask
    every_head = isinstance(mask, Mask) and n_heads is None
    offset = kv_len - q_len if q_offset is None else q_offset
    found = []
    for place, distinct in enumerate(masks.distinct):
        reads_b, reads_h = (name in distinct.variables for name in ("b", "h"))
        heads = masks.heads_of(place)
        grid = Grid(
            q_len,
            kv_len,
            offset,
            block_size,
            batch if batch and reads_b else 1,
            heads if reads_h else (0,),
        )
        unknown = (["n_heads"] if reads_h and every_head else []) + (
            ["batch"] if reads_b and batch is None else []
        )
        found.append(Case(None if every_head else heads, distinct, grid, tuple(unknown)))
    return tuple(found)


def needed(case: Case) -> str | None:
    """Which argument is missing for a mask that reads the head or the batch row, or None."""
    if not case.unknown:
        return None
    reads = " and ".join({"n_heads": "h", "batch": "b"}[name] for name in case.unknown)
    give = ", ".join(f"{name}=..." for name in case.unknown)
    return f"The mask reads {reads}, so its blocks differ: give {give} ({shown(case.mask)})"
