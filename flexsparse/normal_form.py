"""What a mask says in the terms that dense and streaming kernels know, if it can be said in them.

A mask is brought to a union of terms, each a conjunction of bounds:

    Term:  key_lo <= kv_idx <= key_hi  and  far_lo <= q_idx - kv_idx <= far_hi  [and same document]

Recognition goes by this form and not by how the mask was written, so `causal & (sink | window)`,
`(causal & sink) | (causal & window)` and a traced mask_mod of the same rule are one and the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flexsparse.expr import Expr, Mask, Table

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


def terms(mask: Mask) -> tuple[Term, ...] | None:
    """The mask as a union of terms, or None if it is not one (or one of very many)."""
    return _terms(mask, True)


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


def _terms(mask: Expr, wanted: bool) -> tuple[Term, ...] | None:
    """The terms of the mask, or with wanted=False those of its negation."""
    if mask.op == "const":
        return (Term(),) if mask.payload == wanted else ()
    if mask.op == "~":
        return _terms(mask.args[0], not wanted)
    if mask.op in ("&", "|"):
        sides = [_terms(arg, wanted) for arg in mask.args]
        if None in sides:
            return None
        first, second = sides
        assert first is not None
        assert second is not None
        if (mask.op == "|") == wanted:
            return _without_needless((*first, *second))
        both = [a.meet(b) for a in first for b in second]
        return None if None in both else _without_needless(x for x in both if x is not None)
    if mask.op in ("<", "<="):
        small, large = mask.args if wanted else reversed(mask.args)
        strict = (mask.op == "<") == wanted
        difference = _linear(small, large)
        return None if difference is None else _at_most(*difference, -1 if strict else 0)
    if mask.op == "==" and wanted:
        a, b = mask.args
        readers = {(a.op, a.args[0].op) if a.args else a.op for a in (a, b) if len(a.args) == 1}
        if readers == {("lookup", "q_idx"), ("lookup", "kv_idx")} and a.payload == b.payload:
            return (Term(documents=a.payload),)
        difference = _linear(a, b)
        if difference is None:
            return None
        q, kv, constant = difference
        below, above = _at_most(q, kv, constant, 0), _at_most(-q, -kv, -constant, 0)
        return None if not below or not above else _met(below[0], above[0])
    return None


def _met(a: Term, b: Term) -> tuple[Term, ...] | None:
    both = a.meet(b)
    return None if both is None else _without_needless([both])


def _without_needless(union: Iterable[Term]) -> tuple[Term, ...] | None:
    """The union without empty terms and without those that lie inside another."""
    kept: list[Term] = []
    for term in union:
        if term.is_empty or any(other.meet(term) == term for other in kept):
            continue
        kept = [other for other in kept if term.meet(other) != other]
        kept.append(term)
    return tuple(kept) if len(kept) <= MAX_TERMS else None


def _linear(a: Expr, b: Expr) -> tuple[int, int, int] | None:
    """What a - b is: (of q_idx, of kv_idx, constant), or None if not linear in them."""
    sides = [_coefficients(a), _coefficients(b)]
    if sides[0] is None or sides[1] is None:
        return None
    q, kv, constant = (x - y for x, y in zip(*sides, strict=True))
    return q, kv, constant


def _coefficients(index: Expr) -> tuple[int, int, int] | None:
    if index.op == "const":
        return 0, 0, int(index.payload)
    if index.op in ("q_idx", "kv_idx"):
        return int(index.op == "q_idx"), int(index.op == "kv_idx"), 0
    if index.op not in ("+", "-", "*"):
        return None
    a, b = (_coefficients(arg) for arg in index.args)
    if a is None or b is None:
        return None
    if index.op == "*":
        a, b = (a, b) if b[:2] == (0, 0) else (b, a)
        return None if b[:2] != (0, 0) else (a[0] * b[2], a[1] * b[2], a[2] * b[2])
    sign = 1 if index.op == "+" else -1
    return a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2]


def _at_most(q: int, kv: int, constant: int, bound: int) -> tuple[Term, ...] | None:
    """The terms of q * q_idx + kv * kv_idx + constant <= bound."""
    room = bound - constant
    if q == kv == 0:
        return (Term(),) if room >= 0 else ()
    if q == 0:
        return (Term(key_hi=room // kv),) if kv > 0 else (Term(key_lo=-(room // -kv)),)
    if q == -kv:
        return (Term(far_hi=room // q),) if q > 0 else (Term(far_lo=-(room // -q)),)
    return None
