"""Index expressions and masks over them: the one definition every reading is made from.

An expression is an immutable tree. It has no length, device or head count.
"""

from __future__ import annotations

import operator
import reprlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from flexsparse.arguments import INT_LIMIT, usable_device
from flexsparse.errors import MaskError
from flexsparse.tensors import READABLE, TENSOR_READING, Table
from flexsparse.tree import VARIABLES, Expr, evaluate
from flexsparse.walks import rewritten

if TYPE_CHECKING:
    from flexsparse.questions.checks import Check
    from flexsparse.questions.explanation import Explanation


class Index(Expr):
    """An integer per (b, h, q_idx, kv_idx): variable, constant, arithmetic or entry of a table."""

    def __add__(self, other: Index | int) -> Index:
        return Index("+", (self, as_index(other)))

    def __radd__(self, other: int) -> Index:
        return Index("+", (as_index(other), self))

    def __sub__(self, other: Index | int) -> Index:
        return Index("-", (self, as_index(other)))

    def __rsub__(self, other: int) -> Index:
        return Index("-", (as_index(other), self))

    def __mul__(self, other: Index | int) -> Index:
        return Index("*", (self, as_index(other)))

    def __rmul__(self, other: int) -> Index:
        return Index("*", (as_index(other), self))

    def __floordiv__(self, other: Index | int) -> Index:
        return Index("//", (self, _divisor(other, self, "//")))

    def __rfloordiv__(self, other: int) -> Index:
        return Index("//", (as_index(other), self))

    def __mod__(self, other: Index | int) -> Index:
        return Index("%", (self, _divisor(other, self, "%")))

    def __rmod__(self, other: int) -> Index:
        return Index("%", (as_index(other), self))

    def __neg__(self) -> Index:
        return as_index(0) - self

    def __abs__(self) -> Index:
        return Index("abs", (self,))

    def __lt__(self, other: Index | int) -> Mask:
        return Mask("<", (self, as_index(other)))

    def __le__(self, other: Index | int) -> Mask:
        return Mask("<=", (self, as_index(other)))

    def __gt__(self, other: Index | int) -> Mask:
        return Mask("<", (as_index(other), self))

    def __ge__(self, other: Index | int) -> Mask:
        return Mask("<=", (as_index(other), self))

    def equals(self, other: Index | int) -> Mask:
        """The mask that is true where both are the same number (`==` compares the expressions)."""
        return Mask("==", (self, as_index(other)))

    def abs(self) -> Index:
        """The distance from 0, as tensors write it."""
        return abs(self)

    def __truediv__(self, other: object) -> NoReturn:
        raise MaskError(f"({self}) / {other}: indices are integers; use // (floor division).")

    def _no_power(self, other: object) -> NoReturn:
        raise MaskError(
            f"{self} takes no **, << or >>. Write x * x for x ** 2, x * 4 for x << 2 and x // 4 "
            "for x >> 2."
        )

    __pow__ = __rpow__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _no_power

    def __invert__(self) -> NoReturn:
        raise MaskError(f"~ inverts Masks, and {self} is an index expression; compare it first.")

    def __index__(self) -> NoReturn:
        raise MaskError(
            f"{self} is not one number, but one for each place. Read a tensor with "
            "fs.lookup(table, *indices), not table[index]."
        )

    def __bool__(self) -> NoReturn:
        raise MaskError(
            f"An index expression ({self}) has no single truth value. "
            "Compare it (<, <=, .equals) to get a Mask, and combine Masks with & | ~."
        )

    def _no_logic(self, other: object) -> NoReturn:
        raise MaskError(
            f"& | ^ combine Masks, and {self} is an index expression. "
            "Put parentheses round comparisons: (a <= b) & (c < d)."
        )

    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _no_logic


class Real(Expr):
    """A floating-point number per (b, h, q_idx, kv_idx); it arises in traced mask_mods alone."""


class Mask(Expr):
    """A truth value per (b, h, q_idx, kv_idx), true where the query may see the key.

    A Mask is itself a FlexAttention mask_mod: call it with index tensors. Indices are absolute
    positions; where query row 0 stands is an argument of compiling (`q_offset`), not of the mask.
    """

    is_mask = True

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Tensor:
        """Evaluate on index tensors, which broadcast: the mask_mod of FlexAttention."""
        variables = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        kept = evaluate(self, variables, TENSOR_READING)
        if isinstance(kept, Tensor):
            return kept
        # a mask that reads no variable still answers on the device it was asked on
        device = next((x.device for x in variables.values() if isinstance(x, Tensor)), None)
        return torch.tensor(kept, device=device)

    def named(self, label: str) -> Mask:
        """The same mask, shown as `label` in reports and pictures; equality ignores the name."""
        if not isinstance(label, str) or label.splitlines() != [label]:
            raise MaskError(f"named({label!r}): a label must be a str of one line.")
        return replace(self, label=label)

    @property
    def name(self) -> str:
        """The mask in the words it was composed from: 'causal & (sink(64) | window(256))'."""
        from flexsparse.text import named_text

        return named_text(self)

    def _repr_html_(self) -> str:
        from flexsparse.drawing import html

        return html(self)

    def check(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int | None = None,
        n_heads: int | None = None,
        q_offset: int | None = None,
    ) -> Check:
        """Look the mask over at given lengths: empty rows, unseen keys, tables, int32; print it."""
        from flexsparse.questions.checks import check

        return check(self, q_len, kv_len, batch=batch, n_heads=n_heads, q_offset=q_offset)

    def explain(self, q: int, kv: int, h: int = 0, b: int = 0) -> Explanation:
        """Which terms keep or drop the pair of the query and the key at these positions."""
        from flexsparse.questions.explanation import explain

        return explain(self, q, kv, h, b)

    def at(self, **variables: Index | int) -> Mask:
        """The same mask read at other positions: causal.at(q_idx=q_idx + 5) looks 5 keys ahead.

        Args:
            variables: an index expression for any of q_idx, kv_idx, h and b.
        """
        unknown = set(variables) - set(VARIABLES)
        if unknown:
            raise MaskError(f"at() got {sorted(unknown)}; a mask reads {', '.join(VARIABLES)}.")

        def moved(node: Expr, args: tuple[Expr, ...]) -> Expr:
            return as_index(variables[node.op]) if node.op in variables else node.over(args)

        return rewritten(self, moved)

    def to(self, device: torch.device | str) -> Mask:
        """The same mask with its tables on a device; the tables of this one stay where they are."""
        if self.opaque_operators:
            raise MaskError(
                f"A mask with {self.opaque_operators[0]}, which flexsparse has no rule for, cannot "
                "be moved. Move the tensors of the mask_mod function, and trace it again."
            )
        device = usable_device(device)

        def moved(node: Expr, args: tuple[Expr, ...]) -> Expr:
            payload = node.payload
            if isinstance(payload, Table):
                if payload.stale:
                    raise MaskError(payload.stale)
                payload = Table(payload.tensor.to(device))
            return replace(node, args=args, payload=payload)

        return rewritten(self, moved)

    def __and__(self, other: Mask) -> Mask:
        return Mask("&", (self, _as_mask(other, "&")))

    def __or__(self, other: Mask) -> Mask:
        return Mask("|", (self, _as_mask(other, "|")))

    def __xor__(self, other: Mask) -> Mask:
        return Mask("^", (self, _as_mask(other, "^")))

    def __invert__(self) -> Mask:
        return Mask("~", (self,))

    def __rand__(self, other: object) -> NoReturn:
        _as_mask(other, "&")
        raise AssertionError

    def __ror__(self, other: object) -> NoReturn:
        _as_mask(other, "|")
        raise AssertionError

    def __rxor__(self, other: object) -> NoReturn:
        _as_mask(other, "^")
        raise AssertionError

    def __bool__(self) -> NoReturn:
        raise MaskError(
            "A Mask has no single truth value. You wrote `and`, `or`, `not`, `if`, or a chained "
            "comparison; use & | ~, and split `a <= x < b` into (a <= x) & (x < b). For max(x, 3) "
            "and min(x, 3) write fs.maximum(x, 3) and fs.minimum(x, 3)."
        )

    def _no_arithmetic(self, other: object = None) -> NoReturn:
        raise MaskError(
            f"{self.name} is a Mask, which is true or false and no number. Combine Masks with & | "
            "^ ~ (a & ~b is a without b); for numbers write fs.where(mask, 1, 0)."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = _no_arithmetic


def as_index(value: Index | int) -> Index:
    """Turn an int, or a 0-dimensional integer tensor, into an index expression."""
    if isinstance(value, Index):
        return value
    if hasattr(value, "__index__") and not isinstance(value, (bool, Tensor)):
        value = operator.index(value)  # of an integer of numpy as well
        if abs(value) >= INT_LIMIT:
            raise MaskError(f"The constant {value} is beyond 2**61, the limit of index arithmetic.")
        return Index("const", payload=value)
    if isinstance(value, Tensor) and value.dim() == 0:
        read = lookup(value)
        if isinstance(read, Index):
            return read
    found = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    raise MaskError(
        f"Index arithmetic takes integers and index expressions, not {found}: "
        f"{reprlib.repr(value)}. Read a tensor with fs.lookup(table, *indices)."
    )


def _divisor(value: Index | int, dividend: Index, op: str) -> Index:
    divisor = as_index(value)
    if divisor.op == "const" and divisor.payload == 0:
        raise MaskError(f"Division by zero: {dividend} {op} 0. Use a divisor of 1 or more.")
    return divisor


def _as_mask(value: object, op: str) -> Mask:
    if isinstance(value, Mask):
        return value
    hint = {
        bool: "`==` compares the expressions themselves; write a.equals(b) for the mask, and "
        "fs.everything or fs.nothing for True or False.",
        int: "~(a == b) inverts a bool; write ~a.equals(b) for the mask.",
        Index: "Put parentheses round comparisons: (a <= b) & (c < d).",
    }.get(type(value), "Call the pattern first, or read a boolean tensor with fs.lookup.")
    raise MaskError(f"{op} combines two Masks, but one side is {type(value).__name__}. {hint}")


def minimum(a: Index | int, b: Index | int) -> Index:
    """The smaller of two index expressions."""
    return Index("minimum", (as_index(a), as_index(b)))


def maximum(a: Index | int, b: Index | int) -> Index:
    """The larger of two index expressions."""
    return Index("maximum", (as_index(a), as_index(b)))


def where(condition: Mask, yes: Any, no: Any) -> Any:
    """`yes` where a mask is true, and `no` elsewhere: two index expressions, or two masks."""
    if isinstance(yes, (Mask, bool)) or isinstance(no, (Mask, bool)):
        sides: tuple[Expr, Expr] = (_as_mask(yes, "where"), _as_mask(no, "where"))
        return Mask("where", (_as_mask(condition, "where"), *sides))
    return Index("where", (_as_mask(condition, "where"), as_index(yes), as_index(no)))


def bit_and(a: Index | int, b: Index | int) -> Index:
    """The bits that both index expressions have (`&` combines masks)."""
    return Index("bit_and", (as_index(a), as_index(b)))


def bit_or(a: Index | int, b: Index | int) -> Index:
    """The bits that either index expression has (`|` combines masks)."""
    return Index("bit_or", (as_index(a), as_index(b)))


def bit_xor(a: Index | int, b: Index | int) -> Index:
    """The bits in which two index expressions differ (`^` combines masks)."""
    return Index("bit_xor", (as_index(a), as_index(b)))


def lookup(table: Tensor, *indices: Index | int) -> Any:
    """The entry of a tensor at index expressions: an Index for integers, a Mask for booleans.

    Args:
        table: an integer or boolean tensor of 0 to 4 dimensions; it is kept, not copied, and must
            not be written to afterwards (running the mask then raises). A write through table.data
            cannot be noticed, nor any by a function that torch.compile made of yours: it runs on
            with the old entries. A tensor made in inference_mode is copied.
        indices: one index expression for each dimension. Out of range is an error when compiling.
    """
    if not isinstance(table, Tensor):
        raise MaskError(
            f"lookup reads a torch.Tensor, not {type(table).__name__}: {reprlib.repr(table)}. Make "
            "one with torch.as_tensor."
        )
    if table.layout != torch.strided or table.is_nested:
        kind = "nested" if table.is_nested else table.layout
        raise MaskError(f"lookup reads dense tensors, and the table is {kind}; use .to_dense().")
    if table.dtype not in READABLE:
        fix = " Use .long()." if str(table.dtype).startswith("torch.uint") else ""
        raise MaskError(f"lookup reads integers or booleans, and the table is {table.dtype}.{fix}")
    if table.dim() != len(indices) or table.dim() > 4:
        raise MaskError(
            f"lookup got {len(indices)} indices for a table of {table.dim()} dimensions "
            f"{tuple(table.shape)}; give one index for each dimension, of which 0 to 4 may be."
        )
    if table.dim() and table.numel() == 0:
        raise MaskError(f"lookup got an empty table of shape {tuple(table.shape)}.")
    node = Mask if table.dtype == torch.bool else Index
    return node("lookup", tuple(as_index(i) for i in indices), Table(table))


b = Index("b")
h = Index("h")
q_idx = Index("q_idx")
kv_idx = Index("kv_idx")
everything = Mask("const", payload=True)
nothing = Mask("const", payload=False)
