"""What aten operators that work entry by entry mean on arrays of expressions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from flexsparse.tracing.arrays import Array, Call, Places, Rule
from flexsparse.tracing.moves import MOVES, UNROLL
from flexsparse.tracing.scalars import FLOATS, INTEGERS, Untranslatable
from flexsparse.tree import Expr


def translate(name: str, call: Call) -> Array | list[Array] | None:
    """What an operator returns, or None if there is no rule for it."""
    if name in POINTWISE:
        operands, promoted, rule = POINTWISE[name]
        return _pointwise(call, [call.values[x] for x in operands], promoted(call), rule)
    makes = MOVES.get(name) or OTHERS.get(name)
    return None if makes is None else makes(call)


def _pointwise(
    call: Call, operands: list[Any], dtype: torch.dtype, rule: Callable[..., Expr]
) -> Array:
    s = call.scalars

    def entry(places: Places) -> Expr:
        entries = [
            s.cast(x.spread(places), x.dtype, dtype) if isinstance(x, Array) else s.const(x, dtype)
            for x in operands
        ]
        return rule(call, dtype, *entries)

    return Array(call.shape, call.dtype, entry)


def _common(call: Call) -> torch.dtype:
    return torch.result_type(call.raw["self"], call.raw["other"])


def _result(call: Call) -> torch.dtype:
    return call.dtype


def _own(call: Call) -> torch.dtype:
    dtype: torch.dtype = call.raw["self"].dtype
    return dtype


def _boolean(call: Call) -> torch.dtype:
    return torch.bool


def _arithmetic(op: str, swapped: bool = False) -> Callable[..., Expr]:
    def rule(call: Call, dtype: torch.dtype, a: Expr, b: Expr) -> Expr:
        alpha = call.values.get("alpha", 1)
        left, right = (b, a) if swapped else (a, b)
        if alpha != 1:
            if swapped:
                raise Untranslatable("alpha")
            right = call.scalars.arithmetic(dtype, "*", right, call.scalars.const(alpha, dtype))
        return call.scalars.arithmetic(dtype, op, left, right)  # type: ignore[no-any-return]

    return rule


def _divide(call: Call, dtype: torch.dtype, a: Expr, b: Expr) -> Expr:
    rounding = call.values.get("rounding_mode", "floor")
    return call.scalars.divide(dtype, rounding, a, b)  # type: ignore[no-any-return]


def _compare(op: str) -> Callable[..., Expr]:
    return lambda call, dtype, a, b: call.scalars.compare(dtype, op, a, b)


def _method(name: str, *extra: Any) -> Callable[..., Expr]:
    """A rule that is a method of Scalars: method(dtype, *extra, *operands)."""
    return lambda call, dtype, *entries: getattr(call.scalars, name)(dtype, *extra, *entries)


def _logical(op: str) -> Callable[..., Expr]:
    return lambda call, dtype, a, b: call.scalars.logic(op, a, b)


def _invert_bits(call: Call, dtype: torch.dtype, x: Expr) -> Expr:
    s = call.scalars
    if dtype == torch.bool:
        return s.invert(x)  # type: ignore[no-any-return]
    return s.integer(dtype, "-", s.const(-1, torch.int64), x)  # type: ignore[no-any-return]


def _rounded(op: str) -> Callable[..., Expr]:
    def rule(call: Call, dtype: torch.dtype, x: Expr) -> Expr:
        if dtype in INTEGERS:
            return x
        if dtype not in FLOATS:
            raise Untranslatable(f"{op} of {dtype}")
        return call.scalars.node(dtype, op, (x,))  # type: ignore[no-any-return]

    return rule


def _sign(call: Call, dtype: torch.dtype, x: Expr) -> Expr:
    s = call.scalars
    if dtype not in INTEGERS:
        raise Untranslatable(f"sign of {dtype}")
    one, zero = s.const(1, torch.int64), s.const(0, torch.int64)
    below = s.choose(torch.int64, s.compare(dtype, "<", x, zero), s.const(-1, torch.int64), zero)
    return s.choose(torch.int64, s.compare(dtype, ">", x, zero), one, below)  # type: ignore[no-any-return]


PAIR = ("self", "other")
POINTWISE: dict[str, tuple[tuple[str, ...], Callable[[Call], torch.dtype], Callable[..., Expr]]] = {
    "add": (PAIR, _common, _arithmetic("+")),
    "sub": (PAIR, _common, _arithmetic("-")),
    "rsub": (PAIR, _common, _arithmetic("-", swapped=True)),
    "mul": (PAIR, _common, _arithmetic("*")),
    "floor_divide": (PAIR, _common, _divide),
    "remainder": (PAIR, _common, _method("remainder", "divisor")),
    "fmod": (PAIR, _common, _method("remainder", "dividend")),
    "minimum": (PAIR, _common, _method("extremum", "minimum")),
    "maximum": (PAIR, _common, _method("extremum", "maximum")),
    "eq": (PAIR, _common, _compare("==")),
    "ne": (PAIR, _common, _compare("!=")),
    "lt": (PAIR, _common, _compare("<")),
    "le": (PAIR, _common, _compare("<=")),
    "gt": (PAIR, _common, _compare(">")),
    "ge": (PAIR, _common, _compare(">=")),
    "bitwise_and": (PAIR, _common, _method("bits", "&")),
    "bitwise_or": (PAIR, _common, _method("bits", "|")),
    "bitwise_xor": (PAIR, _common, _method("bits", "^")),
    "bitwise_left_shift": (PAIR, _common, _method("shift", True)),
    "bitwise_right_shift": (PAIR, _common, _method("shift", False)),
    "logical_and": (PAIR, _boolean, _logical("&")),
    "logical_or": (PAIR, _boolean, _logical("|")),
    "logical_xor": (PAIR, _boolean, _logical("^")),
    "logical_not": (("self",), _boolean, lambda call, dtype, x: call.scalars.invert(x)),
    "bitwise_not": (("self",), _own, _invert_bits),
    "neg": (("self",), _own, _method("negate")),
    "abs": (("self",), _own, _method("absolute")),
    "sign": (("self",), _own, _sign),
    "sqrt": (("self",), _result, _rounded("sqrt")),
    "floor": (("self",), _own, _rounded("floor")),
    "ceil": (("self",), _own, _rounded("ceil")),
    "_to_copy": (("self",), _result, lambda call, dtype, x: x),
}
for _dunder, _name in (
    ("__and__", "bitwise_and"),
    ("__or__", "bitwise_or"),
    ("__xor__", "bitwise_xor"),
    ("__lshift__", "bitwise_left_shift"),
    ("__rshift__", "bitwise_right_shift"),
):
    POINTWISE[_dunder] = POINTWISE[_name]


def _div(call: Call) -> Array:
    operands = [call.values[x] for x in PAIR]
    if call.values.get("rounding_mode") is None:
        return _pointwise(call, operands, call.dtype, _arithmetic("/"))
    return _pointwise(call, operands, _common(call), _divide)


def _pow(call: Call) -> Array:
    exponent = call.values["exponent"]

    def rule(call: Call, dtype: torch.dtype, x: Expr) -> Expr:
        return call.scalars.power(dtype, x, exponent)  # type: ignore[no-any-return]

    if not isinstance(call.values["self"], Array) or isinstance(exponent, Array):
        raise Untranslatable("a power that is not a constant")
    return _pointwise(call, [call.values["self"]], call.dtype, rule)


def _clamp(call: Call) -> Array:
    limits = [
        (op, call.values[name])
        for name, op in (("min", "maximum"), ("max", "minimum"))
        if call.values.get(name) is not None
    ]

    def rule(call: Call, dtype: torch.dtype, x: Expr, *bounds: Expr) -> Expr:
        for (op, _), bound in zip(limits, bounds, strict=True):
            x = call.scalars.extremum(dtype, op, x, bound)
        return x

    operands = [call.values["self"], *(value for _, value in limits)]
    return _pointwise(call, operands, call.dtype, rule)


def _where(call: Call) -> Array:
    s, condition = call.scalars, call.values["condition"]
    sides = [call.values["self"], call.values["other"]]

    def entry(places: Places) -> Expr:
        yes, no = (s.cast(x.spread(places), x.dtype, call.dtype) for x in sides)
        holds = s.cast(condition.spread(places), condition.dtype, torch.bool)
        return s.choose(call.dtype, holds, yes, no)  # type: ignore[no-any-return]

    return Array(call.shape, call.dtype, entry)


def _masked_fill(call: Call) -> Array:
    s, x, mask, value = (call.scalars, *(call.values[name] for name in ("self", "mask", "value")))

    def entry(places: Places) -> Expr:
        if isinstance(value, Array):
            filled = s.cast(value.at(()), value.dtype, call.dtype)
        else:
            filled = s.const(value, call.dtype)
        return s.choose(call.dtype, mask.spread(places), filled, x.spread(places))  # type: ignore[no-any-return]

    return Array(call.shape, call.dtype, entry)


def _filled(value: Any) -> Callable[[Call], Array]:
    def rule(call: Call) -> Array:
        fill = call.values["fill_value"] if value is None else value
        if isinstance(fill, Array):
            raise Untranslatable("a fill value that is a tensor")
        return Array(call.shape, call.dtype, lambda places: call.scalars.const(fill, call.dtype))

    return rule


def _isin(call: Call) -> Array:
    s, elements, tests = call.scalars, call.values.get("elements"), call.values.get("test_elements")
    if not isinstance(elements, Array) or not isinstance(tests, Array):
        raise Untranslatable("isin of a number")
    if math.prod(tests.shape) > UNROLL:
        raise Untranslatable(f"isin of {math.prod(tests.shape)} values")
    dtype = torch.result_type(call.raw["elements"], call.raw["test_elements"])

    def entry(places: Places) -> Expr:
        value = s.cast(elements.at(places), elements.dtype, dtype)
        found = s.const(False, torch.bool)
        for place in itertools.product(*map(range, tests.shape)):
            same = s.compare(dtype, "==", value, s.cast(tests.at(place), tests.dtype, dtype))
            found = s.logic("|", found, same)
        return s.invert(found) if call.values["invert"] else found  # type: ignore[no-any-return]

    return Array(call.shape, torch.bool, entry)


OTHERS: dict[str, Rule] = {
    "div": _div,
    "true_divide": _div,
    "pow": _pow,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "isin": _isin,
    "new_zeros": _filled(0),
    "zeros_like": _filled(0),
    "new_ones": _filled(1),
    "ones_like": _filled(1),
    "new_full": _filled(None),
    "full_like": _filled(None),
}
