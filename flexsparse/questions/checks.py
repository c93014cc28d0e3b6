"""check: what there is to know of a mask at given lengths before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flexsparse.analysis.classify import classify
from flexsparse.analysis.validate import leaves_int32, problem
from flexsparse.analysis.whole import whole_bounds
from flexsparse.default_device import cpu_by_default
from flexsparse.expr import Mask
from flexsparse.heads import PerHead, numbered
from flexsparse.questions.cases import Case, cases, missing_argument
from flexsparse.questions.gaps import Ranges, empty_rows, unseen_keys
from flexsparse.text import amount, shorten, shown

RANGES_SHOWN = 6
TEXT_WIDTH = 72


@dataclass(frozen=True)
class Unused:
    """Positions of queries that see no key, or of keys that no query sees.

    heads, batch: the heads and batch rows where it is so; None where it is so in all of them
    positions: ranges of q_idx or kv_idx; the row of a query is its position less q_offset
    """

    heads: tuple[int, ...] | None
    batch: tuple[int, ...] | None
    positions: Ranges

    @property
    def count(self) -> int:
        """How many tokens that is, in each of the heads and batch rows."""
        return sum(map(len, self.positions))

    def __str__(self) -> str:
        ranges = ", ".join(
            f"{x.start:,}" if len(x) == 1 else f"{x.start:,} to {x.stop - 1:,}"
            for x in self.positions[:RANGES_SHOWN]
        )
        more = len(self.positions) - RANGES_SHOWN
        ranges += f" and {more:,} ranges more" if more > 0 else ""
        where = [] if self.heads is None else [numbered("head", self.heads)]
        if self.batch is not None:
            where.append(numbered("batch row", self.batch))
        return f"{ranges} ({', '.join(where)})" if where else ranges


class Beyond(NamedTuple):
    """Index arithmetic that may leave int32, and its bounds (None: nothing is known of them)."""

    expression: str
    lo: int | None
    hi: int | None

    def __str__(self) -> str:
        if self.lo is None or self.hi is None:
            return f"{shorten(self.expression, TEXT_WIDTH)} may be anything"
        return f"{shorten(self.expression, TEXT_WIDTH)} reaches from {self.lo:,} to {self.hi:,}"


@dataclass(frozen=True)
class Check:
    """What `check` found; print it. True (and `ok`) if the mask compiles and no query is left out.

    broken: why it cannot be compiled for these arguments, a sentence each
    empty_rows: queries that see no key; their output is 0
    unseen_keys: keys that no query sees
    depends_on: of "h" and "b", what the mask reads, and "h" where heads have masks of their own
    beyond_int32: index arithmetic that leaves int32; flexsparse computes such a mask in int64
    opaque: operators the analysis has no rule for: exact, and slower to compile
    """

    mask: str
    q_len: int
    kv_len: int
    q_offset: int
    broken: tuple[str, ...]
    empty_rows: tuple[Unused, ...]
    unseen_keys: tuple[Unused, ...]
    depends_on: tuple[str, ...]
    beyond_int32: tuple[Beyond, ...]
    opaque: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the mask compiles for these arguments and every query sees a key."""
        return not self.broken and not self.empty_rows

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        first, last = self.q_offset, self.q_offset + self.q_len - 1
        title = (
            f"check of {shorten(self.mask, TEXT_WIDTH)}: {self.q_len:,} queries at {first:,} to "
            f"{last:,}, {self.kv_len:,} keys at 0 to {self.kv_len - 1:,}"
        )
        lines = [f"cannot be compiled: {sentence}" for sentence in self.broken]
        for x in self.empty_rows:
            lines.append(f"{amount(x.count, 'query sees', 'queries see')} no key: q_idx {x}")
        for x in self.unseen_keys:
            lines.append(f"{amount(x.count, 'key is', 'keys are')} seen by nobody: kv_idx {x}")
        lines += [f"depends on the {_VARIABLES[name]} ({name})" for name in self.depends_on]
        lines += [f"leaves int32, so it is computed in int64: {y}" for y in self.beyond_int32]
        lines += [f"an operator without a rule, exact but slower: {name}" for name in self.opaque]
        verdict = [] if lines else ["every query sees a key, and every key is seen"]
        return "\n  ".join([title, *lines, *verdict])

    __repr__ = __str__


_VARIABLES = {"h": "head", "b": "batch row"}


@cpu_by_default()
def check(
    mask: Mask | PerHead,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None = None,
    n_heads: int | None = None,
    q_offset: int | None = None,
) -> Check:
    """Look a mask over at given lengths: empty rows, unseen keys, tables out of range, int32.

    Nothing is sampled: what is not listed is not there. Cost: that of compiling the mask, and the
    PARTIAL blocks of rows that have no FULL one; no [q_len, kv_len] tensor is made.

    Args:
        mask: one mask for all heads, or `per_head([...])`.
        q_len: queries, in tokens.
        kv_len: keys, in tokens.
        batch: batch rows; a mask that reads `b` is looked at in row 0 alone without it.
        n_heads: query heads; a mask that reads `h` is looked at in head 0 alone without it.
        q_offset: position of query row 0; kv_len - q_len by default.
    """
    looked_at = cases("check", mask, q_len, kv_len, batch=batch, n_heads=n_heads, q_offset=q_offset)
    broken: list[str] = []
    empty: list[Unused] = []
    unseen: list[Unused] = []
    for case in looked_at:
        missing = missing_argument(case)
        broken += [missing] if missing else []
        reason = problem(case.mask, case.grid, case.mask.device)
        if reason is not None:
            broken.append(reason)
            continue
        classes = classify(case.mask, case.grid)
        empty += _unused(case, empty_rows(case.mask, classes))
        unseen += _unused(case, unseen_keys(case.mask, classes))
    reads = {name for case in looked_at for name in case.mask.variables}
    reads |= {"h"} if len(looked_at) > 1 else set()
    return Check(
        shown(mask) if isinstance(mask, Mask) else mask.name,
        q_len,
        kv_len,
        looked_at[0].grid.q_offset,
        tuple(dict.fromkeys(broken)),
        _merged(empty),
        _merged(unseen),
        tuple(name for name in ("h", "b") if name in reads),
        tuple(dict.fromkeys(x for case in looked_at for x in _beyond_int32(case))),
        tuple(dict.fromkeys(x for case in looked_at for x in case.mask.opaque_operators)),
    )


def _unused(case: Case, planes: Sequence[Ranges]) -> Iterator[Unused]:
    """What the planes of a mask lack, for its heads and batch rows."""
    n_heads = len(case.grid.heads)
    reads_h, reads_b = ("h" in case.mask.variables, "b" in case.mask.variables)
    for plane, positions in enumerate(planes):
        if positions:
            heads = (case.grid.heads[plane % n_heads],) if reads_h else case.heads
            yield Unused(heads, (plane // n_heads,) if reads_b else None, positions)


def _merged(found: Sequence[Unused]) -> tuple[Unused, ...]:
    """One entry for heads, and then for batch rows, that lack the same positions."""
    by_batch: dict[tuple[tuple[int, ...] | None, Ranges], list[tuple[int, ...] | None]] = {}
    for x in found:
        by_batch.setdefault((x.batch, x.positions), []).append(x.heads)
    by_heads: dict[tuple[tuple[int, ...] | None, Ranges], list[tuple[int, ...] | None]] = {}
    for (batch, positions), heads in by_batch.items():
        by_heads.setdefault((_together(heads), positions), []).append(batch)
    return tuple(
        Unused(heads, _together(rows), positions) for (heads, positions), rows in by_heads.items()
    )


def _together(parts: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    numbers: set[int] = set()
    for part in parts:
        if part is None:
            return None
        numbers.update(part)
    return tuple(sorted(numbers))


def _beyond_int32(case: Case) -> Iterator[Beyond]:
    """The smallest expressions that leave int32; what is made of them is not listed again."""
    leaving: set[int] = set()
    for node, bounds in whole_bounds(case.mask, case.grid):
        if leaves_int32(node, bounds):
            leaving.add(id(node))
            if not any(id(arg) in leaving for arg in node.args):
                lo, hi = (None, None) if bounds is None else (int(bounds.lo), int(bounds.hi))
                yield Beyond(shown(node), lo, hi)
