"""explain: which terms of a mask keep or drop one pair of a query and a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flexsparse.default_device import cpu_by_default
from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.heads import PerHead, refuse_other
from flexsparse.tensors import TENSOR_READING, Table
from flexsparse.text import formula, shorten, shown
from flexsparse.tree import VARIABLES, Expr
from flexsparse.walks import postorder

COMBINING = ("&", "|", "^", "~", "where")
COMPARING = ("<", "<=", "==")
TERMS_SHOWN = 16  # of one combination; what is left out has no say in the result
LEVELS_SHOWN = 40  # of terms inside terms
NAMES_SHOWN = 4
TEXT_WIDTH = 60


@dataclass(frozen=True)
class Term:
    """A term of a mask at one pair.

    depth: how deep it stands in the mask, 0 for the mask itself
    text: in the names the mask was composed from
    value: whether it is true there; None for a line that stands for several terms
    note: the numbers that were compared
    decides: whether it is one of the terms that settle the result
    """

    depth: int
    text: str
    value: bool | None
    note: str
    decides: bool


@dataclass(frozen=True)
class Explanation:
    """Why a query sees a key or does not; true if it does. Print it.

    kept: whether the mask keeps the pair
    because: terms which together settle that, whatever the others are
    terms: the mask as a tree, each term above those it is made of
    """

    q_idx: int
    kv_idx: int
    h: int
    b: int
    kept: bool
    because: tuple[Term, ...]
    terms: tuple[Term, ...]

    def __bool__(self) -> bool:
        return self.kept

    @property
    def sentence(self) -> str:
        """Which terms keep or drop the pair, in one sentence."""
        sees = "sees" if self.kept else "does not see"
        named, more = self.because[:NAMES_SHOWN], len(self.because) - NAMES_SHOWN
        names = [shorten(term.text, TEXT_WIDTH) for term in named]
        if len({term.value for term in self.because}) == 1:
            names += [f"{more} more terms"] if more > 0 else []
            is_are = "is" if len(names) == 1 else "are"
            reason = f"{_listed(names)} {is_are} {_word(named[0].value)}"
        else:
            reasons = [f"{x} is {_word(t.value)}" for x, t in zip(names, named, strict=True)]
            reason = _listed(reasons + ([f"{more} more terms"] if more > 0 else []))
        where = f"(h={self.h}, b={self.b})"
        return f"q_idx={self.q_idx} {sees} kv_idx={self.kv_idx} {where}, because {reason}."

    def __str__(self) -> str:
        texts = ["  " * term.depth + shorten(term.text, TEXT_WIDTH) for term in self.terms]
        width = max(map(len, texts))
        lines = [
            f"  {text.ljust(width)}  {_word(term.value).ljust(5)}  {term.note}".rstrip()
            for text, term in zip(texts, self.terms, strict=True)
        ]
        return "\n".join([self.sentence, *lines])

    __repr__ = __str__


@cpu_by_default()
def explain(mask: Mask | PerHead, q: int, kv: int, h: int = 0, b: int = 0) -> Explanation:
    """Say which terms of a mask keep or drop one pair.

    >>> print(explain(causal & (sink(64) | window(256)), 1000, 500))
    q_idx=1000 does not see kv_idx=500 (h=0, b=0), because sink(64) and window(256) are false.
      causal & (sink(64) | window(256))  false
        causal                           true   kv_idx <= q_idx: 500 <= 1000
        sink(64) | window(256)           false
          sink(64)                       false  kv_idx < 64: 500 < 64
          window(256)                    false  q_idx - kv_idx < 256: 500 < 256

    Args:
        mask: one mask for all heads, or `per_head([...])`.
        q: position of the query (its row plus q_offset).
        kv: position of the key.
        h: the query head.
        b: the batch row.
    """
    for name, n in (("q", q), ("kv", kv), ("h", h), ("b", b)):
        if not isinstance(n, int) or isinstance(n, bool):
            raise MaskError(f"explain: {name}={n!r}; it must be an int.")
        if n < 0 and name != "q":
            raise MaskError(f"explain: {name}={n}; it must be 0 or more.")
    if isinstance(mask, PerHead):
        if h >= mask.n_heads:
            raise MaskError(f"explain: h={h}, and the mask has the heads 0 to {mask.n_heads - 1}.")
        mask = mask[h]
    refuse_other("explain", mask)
    values = _values(mask, {"b": b, "h": h, "q_idx": q, "kv_idx": kv})
    terms, because = _terms(mask, values)
    return Explanation(q, kv, h, b, bool(values[id(mask)]), tuple(because), tuple(terms))


def _values(mask: Mask, place: dict[str, int]) -> dict[int, Any]:
    """What every sub-expression is at one place, by its id."""
    values: dict[int, Any] = {}
    for node in postorder(mask):
        operands = [values[id(arg)] for arg in node.args]
        if node.op in VARIABLES:
            # one entry, not none: tensors without dimensions promote dtypes by other rules
            values[id(node)] = torch.tensor([place[node.op]], device=mask.device)
            continue
        if node.op in ("//", "%") and not bool(torch.as_tensor(operands[1]).ne(0).all()):
            raise MaskError(f"explain: the divisor of {shown(node)} is 0 at {_at(place)}.")
        if isinstance(node.payload, Table):
            for dim, (index, size) in enumerate(
                zip(operands, node.payload.tensor.shape, strict=True)
            ):
                if not 0 <= int(index) < size:
                    raise MaskError(
                        f"explain: the table {node.payload!r} is read out of range at "
                        f"{_at(place)}: dimension {dim} has {size} entries, and the index "
                        f"{shown(node.args[dim])} is {int(index)} there."
                    )
        constant = () if node.payload is None else (node.payload,)
        values[id(node)] = TENSOR_READING[node.op](*constant, *operands)
    return values


class _Visit(NamedTuple):
    """A term to come; unnamed: no name stands above it that the sentence will say instead."""

    node: Expr | str
    depth: int
    decides: bool
    unnamed: bool
    is_shown: bool

    @property
    def alike(self) -> tuple[Any, ...]:
        """What visits have in common that find the same terms."""
        return id(self.node), self.decides, self.unnamed, self.is_shown


def _terms(mask: Mask, values: dict[int, Any]) -> tuple[list[Term], list[Term]]:
    """The tree of a mask, terms above their operands, and the terms that settle its value.

    A term that stands in several places is opened in the first of those that are alike.
    """
    terms: list[Term] = []
    because: dict[int, Term] = {}
    opened: set[tuple[Any, ...]] = set()
    stack = [_Visit(mask, 0, decides=True, unnamed=True, is_shown=True)]
    while stack:
        visit = stack.pop()
        node, depth, decides, unnamed, is_shown = visit
        if isinstance(node, str):
            terms.append(Term(depth, node, None, "", False))
            continue
        # a name is opened where it decides, to show why; the sentence keeps to the name
        is_named = depth > 0 and node.label is not None
        is_open = node.op in COMBINING and (decides or not is_named)
        settles = decides and unnamed and (is_named or not is_open)
        seen = is_open and visit.alike in opened
        if is_shown or settles:
            note = "as above" if seen else _note(node, values)
            term = Term(depth, shown(node), bool(values[id(node)]), note, decides)
            terms += [term] if is_shown else []
            if settles:
                because.setdefault(id(node), term)
        if not is_open or seen:
            continue
        opened.add(visit.alike)
        operands = _operands(node)
        chosen = _deciding(node, operands, values) if decides else set()
        by_weight = sorted(range(len(operands)), key=lambda i: id(operands[i]) not in chosen)
        printed = set(by_weight[: TERMS_SHOWN if depth < LEVELS_SHOWN else 0])
        left_out = len(operands) - len(printed)
        if left_out and is_shown:
            more = f"and {left_out} more terms" if printed else "..."
            stack.append(_Visit(more, depth + 1, decides=False, unnamed=False, is_shown=True))
        for i, arg in reversed(list(enumerate(operands))):
            deciding = id(arg) in chosen
            if deciding or i in printed:
                visible = is_shown and i in printed
                stack.append(_Visit(arg, depth + 1, deciding, unnamed and not is_named, visible))
    return terms, list(because.values())


def _operands(node: Expr) -> list[Expr]:
    """The terms that an operator combines, through chains of itself: a & b & c has three."""
    if node.op not in ("&", "|", "^"):
        return list(node.args)
    found: list[Expr] = []
    seen: set[int] = set()
    stack = list(reversed(node.args))
    while stack:
        arg = stack.pop()
        is_first = id(arg) not in seen
        seen.add(id(arg))
        if arg.op == node.op and arg.label is None and is_first:
            stack.extend(reversed(arg.args))
        elif is_first or node.op == "^":  # twice the same says no more to & and |
            found.append(arg)
    return found


def _deciding(node: Expr, operands: Sequence[Expr], values: dict[int, Any]) -> set[int]:
    """Operands whose values alone give the node its value."""
    value = bool(values[id(node)])
    if node.op == "where":
        return {id(operands[0]), id(operands[1 if bool(values[id(operands[0])]) else 2])}
    if (node.op, value) in (("&", False), ("|", True)):
        return {next(id(arg) for arg in operands if bool(values[id(arg)]) == value)}
    return {id(arg) for arg in operands}


def _note(node: Expr, values: dict[int, Any]) -> str:
    """The numbers behind a comparison or a table's entry, and what they are if a name hides it."""
    operands = [_number(values[id(arg)]) for arg in node.args]
    if node.op in COMPARING:
        numbers = f"{operands[0]} {node.op} {operands[1]}"
    elif isinstance(node.payload, Table) and operands:
        numbers = f"at [{', '.join(operands)}]"
    else:
        return ""
    return numbers if node.label is None else f"{formula(node, TEXT_WIDTH)}: {numbers}"


def _number(value: Any) -> str:
    number = value.item() if isinstance(value, torch.Tensor) else value
    return f"{number:g}" if isinstance(number, float) else str(number)


def _at(place: dict[str, int]) -> str:
    return ", ".join(f"{name}={place[name]}" for name in ("q_idx", "kv_idx", "b", "h"))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _word(value: bool | None) -> str:
    return "" if value is None else "true" if value else "false"
