"""Expressions with torch's dtypes: what a 0-dimensional tensor of a traced mask_mod becomes.

An Index is a mathematical integer, and a traced integer has a width. Each result is bounded as it
is made: where it may leave its dtype, it wraps round as torch's does (`narrow`), and where it may
leave int64 at usual lengths, no expression is made of it (Untranslatable).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flexsparse.analysis.interval import INTERVAL_READING, Interval, Truth, table_bounds
from flexsparse.arguments import INT_LIMIT
from flexsparse.errors import MaskError
from flexsparse.expr import Index, Mask, Real, b, h, kv_idx, q_idx
from flexsparse.tensors import TENSOR_READING, Number, Opaque, Table
from flexsparse.tree import Expr

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float64)  # in which arithmetic is translated
HALVES = (torch.float16, torch.bfloat16)  # which are read, compared and cast
# Positions are smaller than the first for sure, and those of queries may be negative (q_offset).
# What holds of those below the second alone may be used where validate.py refuses the rest.
POSITIONS = (2**30, 2**24)


class Untranslatable(Exception):  # noqa: N818 - caught inside the tracer, and no error
    """An operator for which there is no expression; the text names it."""


class NoRule(Untranslatable):
    """An operator that no rule is written for at all."""


class Scalars:
    """Makes the nodes of one traced mask, each distinct one once."""

    def __init__(self) -> None:
        self._nodes: dict[Any, Expr] = {}
        self._bounds: dict[int, tuple[Any, Any]] = {}
        self._tables: dict[int, tuple[Any, Any]] = {}
        # what reads only b, h and constants may be decided here, for every length
        self._decidable = {id(b), id(h)}
        for variable in (b, h, q_idx, kv_idx):
            self._nodes[variable.op] = variable
            least = -POSITIONS[0] if variable is q_idx else 0
            self._bounds[id(variable)] = (
                Interval(least, POSITIONS[0] - 1),
                Interval(0, POSITIONS[1] - 1),
            )

    def variable(self, name: str) -> Any:
        """The node of b, h, q_idx or kv_idx."""
        return self._nodes[name]

    def node(
        self, dtype: torch.dtype, op: str, args: Sequence[Expr] = (), payload: Any = None
    ) -> Any:
        """The node of an operator, or a constant where the result is one."""
        key = (op, tuple(map(id, args)), dtype, _key(payload))
        if key in self._nodes:
            return self._nodes[key]
        if op != "const" and args and payload is None and all(x.op == "const" for x in args):
            value = TENSOR_READING[op](*[x.payload for x in args])
            return self.const(value, torch.bool if isinstance(value, bool) else torch.int64)
        kind = Mask if dtype == torch.bool else Real if dtype.is_floating_point else Index
        made = self._nodes[key] = kind(op, tuple(args), payload)
        self._bounds[id(made)] = self._bound(made, 0), self._bound(made, 1)
        if not isinstance(payload, (Table, Opaque)) and all(id(x) in self._decidable for x in args):
            self._decidable.add(id(made))
            sure = self._bounds[id(made)][0]
            if op != "const" and isinstance(sure, Truth) and bool(sure.always) == bool(sure.ever):
                return self.const(bool(sure.always), torch.bool)
        return made

    def _bound(self, node: Expr, which: int) -> Any:
        if isinstance(node.payload, Table):
            known = self._tables.get(id(node.payload))
            if known is None:
                known = self._tables[id(node.payload)] = (node.payload, table_bounds(node.payload))
            return known[1]
        payload = () if node.payload is None else (node.payload,)
        operands = [self._bounds[id(x)][which] for x in node.args]
        bounds = INTERVAL_READING[node.op](*payload, *operands)
        if isinstance(bounds, Interval) and isinstance(node, Index):
            bounds = Interval(int(bounds.lo), int(bounds.hi))
            # beyond this the bounds themselves could overflow where they are tensors
            if which == 0 and max(-bounds.lo, bounds.hi) >= INT_LIMIT:
                return None
        return bounds

    def bounds(self, x: Expr) -> Any:
        """The Interval or Truth of a node at every length, or None."""
        return self._bounds[id(x)][0]

    def is_nonnegative(self, x: Expr) -> bool:
        """Whether an integer is never below 0."""
        bounds = self.bounds(x)
        return bounds is not None and bounds.lo >= 0

    def const(self, value: Any, dtype: torch.dtype) -> Any:
        """A constant as torch writes one into an operator of a dtype."""
        if dtype == torch.bool:
            return self.node(dtype, "const", payload=bool(value))
        if dtype.is_floating_point:
            return self.node(
                dtype, "number", payload=Number(torch.tensor(value, dtype=dtype).item(), dtype)
            )
        value = int(value)
        limits = torch.iinfo(dtype)
        if not limits.min <= value <= limits.max or abs(value) >= INT_LIMIT:
            raise Untranslatable(f"the constant {value}")
        return self.node(torch.int64, "const", payload=value)

    def integer(self, dtype: torch.dtype, op: str, *args: Expr) -> Any:
        """Integer arithmetic in a dtype."""
        result = self.node(torch.int64, op, args)
        usual = self._bounds[id(result)][1]
        if usual is not None and max(-usual.lo, usual.hi) >= INT_LIMIT:
            raise Untranslatable(op)
        return self.fit(result, dtype)

    def fit(self, x: Expr, dtype: torch.dtype) -> Any:
        """An integer, wrapped round where it does not fit a dtype."""
        if dtype not in INTEGERS:
            raise Untranslatable(str(dtype))
        bounds = self.bounds(x)
        limits = torch.iinfo(dtype)
        if dtype == torch.int64 or (
            bounds is not None and limits.min <= bounds.lo and bounds.hi <= limits.max
        ):
            return x
        if x.op == "const":
            return self.const(int(torch.tensor(x.payload).to(dtype)), torch.int64)
        return self.node(torch.int64, "narrow", (x,), dtype)

    def cast(self, x: Expr, source: torch.dtype, target: torch.dtype) -> Any:
        """x.to(target), where x is of dtype `source`."""
        for dtype in (source, target):
            if dtype not in (torch.bool, *INTEGERS, *FLOATS, *HALVES):
                raise Untranslatable(str(dtype))
        if source == target:
            return x
        if target == torch.bool:
            return self.invert(self.node(torch.bool, "==", (x, self.const(0, source))))
        if source == torch.bool:
            return self.choose(target, x, self.const(1, target), self.const(0, target))
        if target.is_floating_point:
            if x.op == "const":
                return self.const(x.payload, target)
            return self.node(target, "float", (x,), target)
        if source.is_floating_point:
            return self.node(torch.int64, "truncate", (x,), target)
        return self.fit(x, target)

    def arithmetic(self, dtype: torch.dtype, op: str, left: Expr, right: Expr) -> Any:
        """+, -, * or / in a dtype, and & and | for + and * of booleans."""
        if dtype == torch.bool:
            return self.logic({"+": "|", "*": "&"}[op], left, right)
        if op == "*" and left is right:
            # the same number, with closer bounds
            left = right = self.absolute(dtype, left)
        if dtype.is_floating_point:
            if dtype not in FLOATS:
                raise Untranslatable(f"{op} of {dtype}")
            return self.node(dtype, op, (left, right))
        return self.integer(dtype, op, left, right)

    def divide(self, dtype: torch.dtype, rounding: str, left: Expr, right: Expr) -> Any:
        """Integer division, rounded to "floor" or "trunc"."""
        self._integers_only(dtype, right)
        if rounding == "floor" or (self.is_nonnegative(left) and self.is_nonnegative(right)):
            return self.integer(dtype, "//", left, right)
        size = self.integer(dtype, "//", self.absolute(dtype, left), self.absolute(dtype, right))
        zero = self.const(0, dtype)
        negative = self.logic(
            "^",
            self.node(torch.bool, "<", (left, zero)),
            self.node(torch.bool, "<", (right, zero)),
        )
        return self.choose(dtype, negative, self.negate(dtype, size), size)

    def remainder(self, dtype: torch.dtype, sign_of: str, left: Expr, right: Expr) -> Any:
        """What integer division leaves, with the sign of the "divisor" or of the "dividend"."""
        self._integers_only(dtype, right)
        if sign_of == "divisor" or (self.is_nonnegative(left) and self.is_nonnegative(right)):
            return self.integer(dtype, "%", left, right)
        rest = self.integer(dtype, "%", self.absolute(dtype, left), self.absolute(dtype, right))
        negative = self.node(torch.bool, "<", (left, self.const(0, dtype)))
        return self.choose(dtype, negative, self.negate(dtype, rest), rest)

    def _integers_only(self, dtype: torch.dtype, divisor: Expr) -> None:
        if dtype not in INTEGERS:
            raise Untranslatable(f"division of {dtype}")
        if divisor.op == "const" and divisor.payload == 0:
            raise MaskError("The mask_mod divides by the constant 0. Use a divisor other than 0.")

    def negate(self, dtype: torch.dtype, x: Expr) -> Any:
        """-x."""
        if dtype.is_floating_point:
            # 0 - x would turn -0.0 into 0.0
            return self.arithmetic(dtype, "*", x, self.const(-1, dtype))
        return self.integer(dtype, "-", self.const(0, torch.int64), x)

    def absolute(self, dtype: torch.dtype, x: Expr) -> Any:
        """|x|."""
        if dtype.is_floating_point:
            return self.node(dtype, "abs", (x,))
        return x if self.is_nonnegative(x) else self.integer(dtype, "abs", x)

    def extremum(self, dtype: torch.dtype, op: str, left: Expr, right: Expr) -> Any:
        """Minimum or maximum."""
        if dtype == torch.bool:
            return self.logic({"minimum": "&", "maximum": "|"}[op], left, right)
        return self.node(dtype, op, (left, right))

    def bits(self, dtype: torch.dtype, op: str, left: Expr, right: Expr) -> Any:
        """&, | or ^ of integers, or of booleans."""
        if dtype == torch.bool:
            return self.logic(op, left, right)
        if right.op != "const":
            left, right = right, left
        mask = right.payload
        if op == "&" and right.op == "const" and mask > 0 and mask & (mask + 1) == 0:
            return self.integer(dtype, "%", left, self.const(mask + 1, torch.int64))
        name = {"&": "bit_and", "|": "bit_or", "^": "bit_xor"}[op]
        return self.integer(dtype, name, left, right)

    def shift(self, dtype: torch.dtype, left: bool, x: Expr, by: Expr) -> Any:
        """X << by or x >> by, by a constant."""
        if dtype not in INTEGERS or by.op != "const" or not 0 <= by.payload < 61:
            raise Untranslatable("a shift by what is not a small constant")
        if by.payload >= torch.iinfo(dtype).bits - 1:
            raise Untranslatable("a shift as wide as the integer")
        factor = self.const(2**by.payload, torch.int64)
        return self.integer(dtype, "*" if left else "//", x, factor)

    def power(self, dtype: torch.dtype, x: Expr, exponent: Any) -> Any:
        """X to the power of a small whole number."""
        if not isinstance(exponent, int) or not 1 <= exponent <= (2 if dtype in FLOATS else 8):
            raise Untranslatable(f"a power of {exponent}")
        result = x if exponent == 1 else self.arithmetic(dtype, "*", x, x)
        for _ in range(exponent - 2):
            result = self.arithmetic(dtype, "*", result, x)
        return result

    def compare(self, dtype: torch.dtype, op: str, left: Expr, right: Expr) -> Any:
        """<, <=, >, >=, == or != of two values of a dtype."""
        if op in (">", ">="):
            op, left, right = {">": "<", ">=": "<="}[op], right, left
        if op == "!=":
            return self.invert(self.compare(dtype, "==", left, right))
        if dtype == torch.bool:
            if op == "==":
                return self.invert(self.logic("^", left, right))
            return self.logic("&" if op == "<" else "|", self.invert(left), right)
        return self.node(torch.bool, op, (left, right))

    def logic(self, op: str, left: Expr, right: Expr) -> Any:
        """&, | or ^ of booleans; a constant side is left out."""
        for constant, other in ((left, right), (right, left)):
            if constant.op == "const":
                if op == "^":
                    return self.invert(other) if constant.payload else other
                return other if constant.payload == (op == "&") else constant
        return left if left is right and op != "^" else self.node(torch.bool, op, (left, right))

    def invert(self, x: Expr) -> Any:
        """~x of a boolean."""
        return x.args[0] if x.op == "~" else self.node(torch.bool, "~", (x,))

    def choose(self, dtype: torch.dtype, condition: Expr, yes: Expr, no: Expr) -> Any:
        """where(condition, yes, no)."""
        if condition.op == "const":
            return yes if condition.payload else no
        if yes is no:
            return yes
        if dtype == torch.bool and yes.op == "const" and no.op == "const":
            return condition if yes.payload else self.invert(condition)
        return self.node(dtype, "where", (condition, yes, no))

    def place(self, index: Expr, size: int, wraps: bool = True) -> Any:
        """An index into a dimension, where negative ones count from its end.

        One that is negative only at negative positions is left to validate.py, which refuses those.
        """
        if index.op == "const":
            at = index.payload + (size if index.payload < 0 and wraps else 0)
            if not 0 <= at < size:
                raise MaskError(
                    f"The mask_mod reads entry {index.payload} of a dimension of {size} entries."
                )
            return at
        usual = self._bounds[id(index)][1]
        if not wraps or (usual is not None and usual.lo >= 0):
            return index
        below = self.node(torch.bool, "<", (index, self.const(0, torch.int64)))
        from_end = self.integer(torch.int64, "+", index, self.const(size, torch.int64))
        return self.choose(torch.int64, below, from_end, index)


def _key(payload: Any) -> Any:
    if isinstance(payload, (Table, Opaque)):
        return id(payload)
    return type(payload), repr(payload)
