"""What a mask says in the terms that dense and streaming kernels know, if it can be said in them.

A mask is brought to a union of terms, each a conjunction of bounds:

    Term:  key_lo <= kv_idx <= key_hi  and  far_lo <= q_idx - kv_idx <= far_hi  [and same document]

Recognition goes by this form and not by how the mask was written, so `causal & (sink | window)`,
`(causal & sink) | (causal & window)` and a traced mask_mod of the same rule are one and the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flexsparse.expr import Mask
from flexsparse.tensors import Table
from flexsparse.tree import Expr
from flexsparse.walks import postorder

FAR = 1 << 62  # no bound
MAX_TERMS = 16


class Term(NamedTuple):
    """A conjunction of bounds on kv_idx and on the distance q_idx - kv_idx, ends included.

    documents: a table that has the same entry at q_idx as at kv_idx, or None
    """

    key_lo: int = -FAR
    key_hi: int = FAR
    far_lo: int = -FAR
    far_hi: int = FAR
    documents: Table | None = None

    def meet(self, other: Term) -> Term | None:
        """Both at once, or None if that is no Term."""
        if None not in (self.documents, other.documents) and self.documents != other.documents:
            return None
        return Term(
            max(self.key_lo, other.key_lo),
            min(self.key_hi, other.key_hi),
            max(self.far_lo, other.far_lo),
            min(self.far_hi, other.far_hi),
            self.documents or other.documents,
        )

    @property
    def is_empty(self) -> bool:
        """Whether no pair can be in it: keys are counted from 0."""
        return self.key_hi < max(self.key_lo, 0) or self.far_hi < self.far_lo


Union = tuple[Term, ...]


class Line(NamedTuple):
    """The index expression q * q_idx + kv * kv_idx + constant."""

    q: int
    kv: int
    constant: int


def terms(mask: Mask) -> Union | None:
    """The mask as a union of terms, or None if it is not one (or one of very many)."""
    lines: dict[int, Line | None] = {}
    unions: dict[tuple[int, bool], Union | None] = {}
    for node in postorder(mask):
        if isinstance(node, Mask):
            for wanted in (True, False):
                unions[id(node), wanted] = _union(node, wanted, unions, lines)
        else:
            lines[id(node)] = _line(node, lines)
    return unions[id(mask), True]


def documents_of(node: Expr) -> Table | None:
    """The table whose entries at q_idx and at kv_idx a comparison wants to be equal, if it does."""
    if node.op != "==" or any(len(arg.args) != 1 for arg in node.args):
        return None
    a, b = node.args
    readers = {(a.op, a.args[0].op), (b.op, b.args[0].op)}
    same = readers == {("lookup", "q_idx"), ("lookup", "kv_idx")} and a.payload == b.payload
    return a.payload if same else None


def sink_and_window(mask: Mask) -> tuple[int, int] | None:
    """(s, w) if the mask is `causal & (kv_idx < s | q_idx - kv_idx < w)`, else None; FAR is any."""
    union = terms(mask)
    if not union:
        return None
    sink, window = 0, 0
    for term in union:
        if term.documents is not None or term.far_lo != 0 or term.key_lo > 0:
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
        both = [a.meet(b) for a in first for b in second]
        return None if None in both else _without_needless(x for x in both if x is not None)
    if mask.op in ("<", "<="):
        small, large = mask.args if wanted else reversed(mask.args)
        strict = (mask.op == "<") == wanted
        difference = _difference(lines[id(small)], lines[id(large)])
        return None if difference is None else _at_most(difference, -1 if strict else 0)
    if mask.op == "==" and wanted:
        table = documents_of(mask)
        if table is not None:
            return (Term(documents=table),)
        a, b = (lines[id(arg)] for arg in mask.args)
        ahead, behind = _difference(a, b), _difference(b, a)
        if ahead is None or behind is None:
            return None
        below, above = _at_most(ahead, 0), _at_most(behind, 0)
        return None if not below or not above else _met(below[0], above[0])
    return None


def _met(a: Term, b: Term) -> Union | None:
    both = a.meet(b)
    return None if both is None else _without_needless([both])


def _without_needless(union: Iterable[Term]) -> Union | None:
    """The union without empty terms and without those that lie inside another."""
    kept: list[Term] = []
    for term in union:
        if term.is_empty or any(other.meet(term) == term for other in kept):
            continue
        kept = [other for other in kept if term.meet(other) != other]
        kept.append(term)
    return tuple(kept) if len(kept) <= MAX_TERMS else None


def _line(index: Expr, lines: Mapping[int, Line | None]) -> Line | None:
    """An index expression as a Line, from its operands'; None if it is not linear."""
    if index.op == "const":
        return Line(0, 0, int(index.payload))
    if index.op in ("q_idx", "kv_idx"):
        return Line(int(index.op == "q_idx"), int(index.op == "kv_idx"), 0)
    if index.op not in ("+", "-", "*"):
        return None
    a, b = (lines[id(arg)] for arg in index.args)
    if a is None or b is None:
        return None
    if index.op == "-":
        return _difference(a, b)
    if index.op == "+":
        return Line(*(x + y for x, y in zip(a, b, strict=True)))
    a, b = (a, b) if b[:2] == (0, 0) else (b, a)
    return Line(*(x * b.constant for x in a)) if b[:2] == (0, 0) else None


def _difference(a: Line | None, b: Line | None) -> Line | None:
    if a is None or b is None:
        return None
    return Line(*(x - y for x, y in zip(a, b, strict=True)))


def _at_most(line: Line, bound: int) -> Union | None:
    """The terms of line <= bound."""
    q, kv, constant = line
    room = bound - constant
    if q == kv == 0:
        return (Term(),) if room >= 0 else ()
    if q == 0:
        return (Term(key_hi=room // kv),) if kv > 0 else (Term(key_lo=-(room // -kv)),)
    if q == -kv:
        return (Term(far_hi=room // q),) if q > 0 else (Term(far_lo=-(room // -q)),)
    return None
