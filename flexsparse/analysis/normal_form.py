"""What a mask says in the terms that dense and streaming kernels know, if it can be said in them.

A mask is brought to a union of terms, each a conjunction of bounds:

    Term:  key_lo <= kv_idx <= key_hi  and  far_lo <= q_idx - kv_idx <= far_hi

Recognition goes by this form and not by how the mask was written, so `causal & (sink | window)`,
`(causal & sink) | (causal & window)` and a traced mask_mod of the same rule are one and the same.

Where the tokens are packed sequences, q_idx and kv_idx are here positions in a sequence. The mask
reads these from tables; of its own q_idx and kv_idx, places in the pack, the distance is the same.
What every pair of one sequence meets is no bound.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flexsparse.analysis.sequences import Sequences, documents_of, values_at
from flexsparse.expr import Mask, everything
from flexsparse.tree import Expr
from flexsparse.walks import conjuncts, postorder

FAR = 1 << 62  # no bound
MAX_TERMS = 16


class Term(NamedTuple):
    """A conjunction of bounds on kv_idx and on the distance q_idx - kv_idx, ends included."""

    key_lo: int = -FAR
    key_hi: int = FAR
    far_lo: int = -FAR
    far_hi: int = FAR

    def meet(self, other: Term) -> Term:
        """Both at once."""
        return Term(
            max(self.key_lo, other.key_lo),
            min(self.key_hi, other.key_hi),
            max(self.far_lo, other.far_lo),
            min(self.far_hi, other.far_hi),
        )

    @property
    def is_empty(self) -> bool:
        """Whether no pair can be in it: keys are counted from 0."""
        return self.key_hi < max(self.key_lo, 0) or self.far_hi < self.far_lo


Union = tuple[Term, ...]


class Line(NamedTuple):
    """The index expression q * q_idx + kv * kv_idx + start * s + constant.

    s is the place of the first token of the sequence; the others are positions in it.
    """

    q: int
    kv: int
    start: int
    constant: int


def terms(mask: Mask, sequences: Sequences | None = None) -> Union | None:
    """The mask as a union of terms, or None if it is not one (or one of very many).

    With sequences, it is what the mask says of two tokens of one sequence.
    """
    lines: dict[int, Line | None] = {}
    unions: dict[tuple[int, bool], Union | None] = {}
    ids = None if sequences is None else sequences.ids
    if sequences is not None and sequences.always:
        more = [x for x in conjuncts(mask) if not any(x is met for met in sequences.always)]
        mask = functools.reduce(operator.and_, more, everything)
    for node in postorder(mask):
        if isinstance(node, Mask):
            for wanted in (True, False):
                if ids is not None and documents_of(node) == ids:
                    unions[id(node), wanted] = (Term(),) if wanted else ()
                else:
                    unions[id(node), wanted] = _union(node, wanted, unions, lines)
        else:
            lines[id(node)] = _line(node, lines, sequences)
    return unions[id(mask), True]


def sink_and_window(mask: Mask, sequences: Sequences | None = None) -> tuple[int, int] | None:
    """(s, w) if the mask is `causal & (kv_idx < s | q_idx - kv_idx < w)`, else None; FAR is any."""
    union = terms(mask, sequences)
    if not union:
        return None
    sink, window = 0, 0
    for term in union:
        if term.far_lo != 0 or term.key_lo > 0:
            return None
        if term.key_hi == FAR:
            window = max(window, term.far_hi + 1 if term.far_hi < FAR else FAR)
        elif term.far_hi == FAR:
            sink = max(sink, term.key_hi + 1)
        else:
            return None  # sink & window: fewer keys than either
    return sink, window


def _union(
    mask: Mask,
    wanted: bool,
    unions: Mapping[tuple[int, bool], Union | None],
    lines: Mapping[int, Line | None],
) -> Union | None:
    """The terms of the mask, or with wanted=False those of its negation, from its operands'."""
    if mask.op == "const":
        return (Term(),) if mask.payload == wanted else ()
    if mask.op == "~":
        return unions[id(mask.args[0]), not wanted]
    if mask.op in ("&", "|"):
        first, second = (unions[id(arg), wanted] for arg in mask.args)
        if first is None or second is None:
            return None
        if (mask.op == "|") == wanted:
            return _without_needless((*first, *second))
        return _without_needless(a.meet(b) for a in first for b in second)
    if mask.op in ("<", "<="):
        small, large = mask.args if wanted else reversed(mask.args)
        strict = (mask.op == "<") == wanted
        difference = _difference(lines[id(small)], lines[id(large)])
        return None if difference is None else _at_most(difference, -1 if strict else 0)
    if mask.op == "==" and wanted:
        a, b = (lines[id(arg)] for arg in mask.args)
        ahead, behind = _difference(a, b), _difference(b, a)
        if ahead is None or behind is None:
            return None
        below, above = _at_most(ahead, 0), _at_most(behind, 0)
        return None if not below or not above else _without_needless([below[0].meet(above[0])])
    return None


def _without_needless(union: Iterable[Term]) -> Union | None:
    """The union without empty terms and without those that lie inside another."""
    kept: list[Term] = []
    for term in union:
        if term.is_empty or any(other.meet(term) == term for other in kept):
            continue
        kept = [other for other in kept if term.meet(other) != other]
        kept.append(term)
    return tuple(kept) if len(kept) <= MAX_TERMS else None


def _line(
    index: Expr, lines: Mapping[int, Line | None], sequences: Sequences | None
) -> Line | None:
    """An index expression as a Line, from its operands'; None if it is not linear."""
    if index.op == "const":
        return Line(0, 0, 0, int(index.payload))
    if index.op in ("q_idx", "kv_idx"):
        is_q = index.op == "q_idx"
        return Line(int(is_q), int(not is_q), int(sequences is not None), 0)
    if index.op not in ("+", "-", "*"):
        return None if sequences is None else _line_of_values(index, sequences)
    a, b = (lines[id(arg)] for arg in index.args)
    if a is None or b is None:
        return None
    if index.op == "-":
        return _difference(a, b)
    if index.op == "+":
        return Line(*(x + y for x, y in zip(a, b, strict=True)))
    a, b = (a, b) if b[:3] == (0, 0, 0) else (b, a)
    return Line(*(x * b.constant for x in a)) if b[:3] == (0, 0, 0) else None


def _line_of_values(index: Expr, sequences: Sequences) -> Line | None:
    """An expression of one token that is its position or its place, read from a table, say."""
    values = values_at(index, sequences.places)
    if values is None:
        return None
    is_q = "q_idx" in index.variables
    for start, numbers in ((0, sequences.positions), (1, sequences.places)):
        more = values - numbers
        if bool((more == more[0]).all()):
            return Line(int(is_q), int(not is_q), start, int(more[0]))
    return None


def _difference(a: Line | None, b: Line | None) -> Line | None:
    if a is None or b is None:
        return None
    return Line(*(x - y for x, y in zip(a, b, strict=True)))


def _at_most(line: Line, bound: int) -> Union | None:
    """The terms of line <= bound."""
    q, kv, start, constant = line
    room = bound - constant
    if start:
        return None  # in each sequence it is another bound
    if q == kv == 0:
        return (Term(),) if room >= 0 else ()
    if q == 0:
        return (Term(key_hi=room // kv),) if kv > 0 else (Term(key_lo=-(room // -kv)),)
    if q == -kv:
        return (Term(far_hi=room // q),) if q > 0 else (Term(far_lo=-(room // -q)),)
    return None
