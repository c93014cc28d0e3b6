"""Masks read from text. Nothing is ever evaluated.

The grammar is Python's, with Python's precedence, of these pieces alone:

    mask       or over ^ over & over comparisons:  |  ^  &  < <= > >= ==
    index      + - over * // % over unary - ~ over primaries
    primary    integer, name, name(arguments), (mask), primary.equals(index)
    arguments  any of the above, or literals: 1.5, True, None, 'text', [1, 2], (1, 2), and key=value
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NoReturn

from flexsparse.errors import MaskError
from flexsparse.expr import (
    Index,
    Mask,
    as_index,
    b,
    bit_and,
    bit_or,
    bit_xor,
    h,
    kv_idx,
    maximum,
    minimum,
    q_idx,
    where,
)
from flexsparse.heads import PerHead
from flexsparse.text import INFIX, OR, SUM, UNARY, shorten, shown
from flexsparse.tree import Expr

BUILTINS: dict[str, Any] = {
    "b": b,
    "h": h,
    "q_idx": q_idx,
    "kv_idx": kv_idx,
    "abs": abs,
    "minimum": minimum,
    "maximum": maximum,
    "where": where,
    "bit_and": bit_and,
    "bit_or": bit_or,
    "bit_xor": bit_xor,
}


def parse(text: str, names: Mapping[str, Any] | ModuleType | None = None) -> Mask:
    """Read a mask from its text, which gives back every mask of integers without tensors.

    Args:
        text: for example 'causal & (sink(64) | window(256))', or a formula of q_idx and kv_idx.
        names: the patterns the text may use: a dict, or a module such as flexsparse.masks. Only
            what is in here, but for names with a leading _, can be called (and b, h, q_idx,
            kv_idx, abs, minimum, maximum, where, bit_and, ...).

    Raises:
        MaskError: with the column, what was found there, and the nearest known name.
    """
    return _Parser(text, {**BUILTINS, **_public(names)}).mask()


def parse_heads(text: str, names: Mapping[str, Any] | ModuleType | None = None) -> Mask | PerHead:
    """Read a mask as `parse` does, or the masks of all heads: 'duo_attention([1, 0])'."""
    return _Parser(text, {**BUILTINS, **_public(names)}).masks()


def _public(names: Mapping[str, Any] | ModuleType | None) -> dict[str, Any]:
    """What a text may use of names: not a module in them, and none with a leading _."""
    if isinstance(names, ModuleType):
        names = {name: getattr(names, name) for name in getattr(names, "__all__", vars(names))}
    if not isinstance(names, Mapping | None):
        raise MaskError(
            f"parse got names of {type(names).__name__}; give a dict or a module, such as "
            "flexsparse.masks."
        )
    return {
        name: value
        for name, value in (names or {}).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+\.\d+(?:[eE][-+]?\d+)?|\d+)|(?P<name>[A-Za-z_]\w*)|(?P<string>'[^']*'|\"[^\"]*\")"
    r"|(?P<op>//|<=|>=|==|[-+*%<>&|^~()\[\],.=]))"
)
_LITERALS = {"True": True, "False": False, "None": None}
# how Python and other languages spell an operator, and how masks do
_SPELLED = {"and": "&", "or": "|", "not": "~", "/": "//", "!": "~"}
MOST_DIGITS = 100  # Python refuses to read thousands of them
MOST_NESTED = 40  # each level takes a dozen of Python's frames


def _bool_as_mask(value: Any) -> Any:
    """True and False as masks, which they are everywhere but among the options of a pattern."""
    return Mask("const", payload=value) if isinstance(value, bool) else value


def _described(value: Any) -> str:
    """What a text was read as, in one line."""
    if isinstance(value, PerHead):
        return f"the masks of {value.n_heads} heads"
    if isinstance(value, Expr):
        return "a mask" if isinstance(value, Mask) else "an index expression"
    return shorten(repr(value), 60)


def _one_of(heads: PerHead) -> str:
    return f"write the mask of one head, such as {shown(heads[0])}"


class _Parser:
    """Recursive descent over tokens (kind, text, column); columns count from 1."""

    def __init__(self, text: str, names: Mapping[str, Any]) -> None:
        self.text = text
        self.names = names
        self.tokens = self._tokens()
        self.position = 0
        self.depth = 0

    def _tokens(self) -> list[tuple[str, str, int]]:
        if not isinstance(self.text, str):
            raise MaskError(f"A mask is parsed from a str, not {type(self.text).__name__}.")
        tokens, place, end = [], 0, len(self.text.rstrip())
        while place < end:
            match = _TOKEN.match(self.text, place)
            if match is None:
                place += len(self.text[place:]) - len(self.text[place:].lstrip())
                self.refuse(self.text[place], place + 1)
            assert match.lastgroup is not None
            kind = match.lastgroup
            tokens.append((kind, match[kind], match.start(kind) + 1))
            if kind == "name" and match[kind] in _SPELLED:
                self.refuse(match[kind], match.start(kind) + 1)
            place = match.end()
        return [*tokens, ("end", "the end of the text", end + 1)]

    def refuse(self, text: str, column: int) -> NoReturn:
        fix = f"; write {_SPELLED[text]}" if text in _SPELLED else ""
        self.fail(column, f"{text!r} is not part of the mask language{fix}")

    def fail(self, column: int, reason: str) -> NoReturn:
        pointer = " " * (column - 1) + "^"
        raise MaskError(
            f"Cannot read the mask at column {column}: {reason}.\n  {self.text}\n  {pointer}"
        )

    def take(self, *texts: str) -> tuple[str, int] | None:
        kind, text, column = self.tokens[self.position]
        if kind == "op" and text in texts:
            self.position += 1
            return text, column
        return None

    def expect(self, text: str) -> None:
        if self.take(text) is None:
            self.fail_here(repr(text))

    def fail_here(self, expected: str) -> NoReturn:
        kind, found, column = self.tokens[self.position]
        what = found if kind == "end" else repr(found)
        self.fail(column, f"expected {expected} and found {what}")

    def mask(self) -> Mask:
        value = self.masks()
        if isinstance(value, PerHead):
            self.fail(1, f"the text is {_described(value)}, not one mask; {_one_of(value)}")
        return value

    def masks(self) -> Mask | PerHead:
        value = _bool_as_mask(self.comparison())
        if self.tokens[self.position][0] != "end":
            self.fail_here("an operator")
        if not isinstance(value, (Mask, PerHead)):
            fix = "write one mask: a pattern, or a comparison such as kv_idx <= q_idx"
            if isinstance(value, (Index, int)):
                fix = "compare it with < <= > >= or .equals"
            self.fail(1, f"the text is {_described(value)}, not a mask; {fix}")
        return value

    def comparison(self) -> Any:
        left = self.infix(OR)
        operator = self.take(*_COMPARISONS)
        if operator is None:
            return left
        right = self.infix(OR)
        chained = self.take(*_COMPARISONS)
        if chained:
            fix = "split a <= x < b into (a <= x) & (x < b)"
            self.fail(chained[1], f"comparisons do not chain; {fix}")
        return self.apply(_COMPARISONS[operator[0]], operator[1], Index, left, right)

    def infix(self, strength: int) -> Any:
        if strength == UNARY:
            return self.unary()
        left = self.infix(strength + 1)
        operators = tuple(op for op in _OPERATORS if INFIX[op] == strength)
        kind = Mask if strength < SUM else Index
        while (operator := self.take(*operators)) is not None:
            right = self.infix(strength + 1)
            left = self.apply(_OPERATORS[operator[0]], operator[1], kind, left, right)
        return left

    def apply(self, build: Callable[..., Any], column: int, kind: type, *operands: Any) -> Any:
        sides = []
        for side in operands:
            if kind is Mask:
                side = _bool_as_mask(side)
            elif isinstance(side, int) and not isinstance(side, bool):
                side = as_index(side)
            if not isinstance(side, kind):
                fix = "put parentheses round comparisons: (a <= b) & (c < d)"
                if isinstance(side, PerHead):
                    fix = _one_of(side)
                need = "masks" if kind is Mask else "integers and index expressions"
                self.fail(
                    column, f"this operator takes {need} and one side is {_described(side)}; {fix}"
                )
            sides.append(side)
        return self.guard(column, build, *sides)

    def guard(self, column: int, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Build, and give an error of the mask's own the place in the text where it arose."""
        try:
            return build(*args, **kwargs)
        except MaskError as error:
            self.fail(column, str(error).rstrip("."))
        except TypeError as error:
            self.fail(column, str(error))

    def unary(self) -> Any:
        operator = self.take("-", "~")
        if operator is None:
            return self.postfix()
        value = self.nested(operator[1], self.unary)
        if operator[0] == "-":
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return -value
            return self.apply(lambda a: -a, operator[1], Index, value)
        return self.apply(lambda a: ~a, operator[1], Mask, value)

    def nested(self, column: int, read: Callable[[], Any]) -> Any:
        self.depth += 1
        if self.depth > MOST_NESTED:
            self.fail(column, f"more than {MOST_NESTED} levels of nesting")
        value = read()
        self.depth -= 1
        return value

    def postfix(self) -> Any:
        value = self.primary()
        while (dot := self.take(".")) is not None:
            _, name, column = self.tokens[self.position]
            if name != "equals":
                self.fail(column, f"only .equals(...) may follow a dot, not {name!r}")
            self.position += 1
            args, kwargs = self.arguments()
            if len(args) != 1 or kwargs:
                self.fail(column, f"equals takes one index and got {len(args) + len(kwargs)}")
            value = self.apply(Index.equals, dot[1], Index, value, args[0])
        return value

    def primary(self) -> Any:
        """A number, a string, a name, or what stands in brackets."""
        kind, text, column = self.tokens[self.position]
        if kind in ("op", "end") and text not in ("(", "["):
            self.fail_here("a pattern, a number or '('")
        self.position += 1
        if kind == "number":
            if len(text) > MOST_DIGITS:
                self.fail(column, f"a number of {len(text)} digits; use at most {MOST_DIGITS}")
            return float(text) if "." in text else int(text)
        if kind == "string":
            return text[1:-1]
        if kind == "name":
            return self.name(text, column)
        if text == "(":
            values, is_tuple = self.items(")", column)
            return tuple(values) if is_tuple else values[0]
        return self.items("]", column)[0]

    def items(self, close: str, column: int) -> tuple[list[Any], bool]:
        """What stands between brackets, and whether a comma makes it a tuple."""
        values: list[Any] = []
        comma = False
        while self.take(close) is None:
            if values and not comma:
                self.expect(",")
            values.append(self.nested(column, self.comparison))
            comma = self.take(",") is not None
            if not comma:
                self.expect(close)
                return values, len(values) != 1
        return values, True

    def name(self, text: str, column: int) -> Any:
        if text in _LITERALS:
            return _LITERALS[text]
        if text not in self.names:
            if text == "lookup":
                self.fail(column, "a text holds no tables; write a mask with lookup in Python")
            near = difflib.get_close_matches(text, self.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            known = ", ".join(sorted(self.names))
            self.fail(column, f"unknown name {text!r}{hint} Known names: {known}")
        value = self.names[text]
        if callable(value) and not isinstance(value, Expr):
            _, found, place = self.tokens[self.position]
            if found != "(":
                self.fail(place, f"{text} needs its arguments: {text}(...)")
            args, kwargs = self.arguments()
            if value is BUILTINS.get(text):
                args = [_bool_as_mask(x) for x in args]
                kwargs = {key: _bool_as_mask(x) for key, x in kwargs.items()}
            return self.guard(column, value, *args, **kwargs)
        return value

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        _, _, column = self.tokens[self.position]
        self.expect("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while self.take(")") is None:
            if args or kwargs:
                self.expect(",")
            kind, name, place = self.tokens[self.position]
            if kind == "name" and self.tokens[self.position + 1][1] == "=":
                if name in kwargs:
                    self.fail(place, f"{name} is given twice")
                self.position += 2
                kwargs[name] = self.nested(column, self.comparison)
            else:
                args.append(self.nested(column, self.comparison))
        return args, kwargs


_COMPARISONS: dict[str, Callable[[Any, Any], Mask]] = {
    "<": lambda a, c: a < c,
    "<=": lambda a, c: a <= c,
    ">": lambda a, c: a > c,
    ">=": lambda a, c: a >= c,
    "==": Index.equals,
}
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "|": lambda a, c: a | c,
    "^": lambda a, c: a ^ c,
    "&": lambda a, c: a & c,
    "+": lambda a, c: a + c,
    "-": lambda a, c: a - c,
    "*": lambda a, c: a * c,
    "//": lambda a, c: a // c,
    "%": lambda a, c: a % c,
}
