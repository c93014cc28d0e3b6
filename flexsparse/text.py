"""Masks written as text: `formula` in operators, `named_text` in the names of patterns.

flexsparse.parser reads a formula back.
"""

from __future__ import annotations

from flexsparse.expr import (
    Expr,
    postorder,
)
from flexsparse.tensors import Opaque

# binding strength, as in Python: a comparison binds more loosely than & | ^
COMPARISON, OR, XOR, AND, SUM, PRODUCT, UNARY, ATOM = range(8)
INFIX = {
    "<": COMPARISON,
    "<=": COMPARISON,
    "|": OR,
    "^": XOR,
    "&": AND,
    "+": SUM,
    "-": SUM,
    "*": PRODUCT,
    "//": PRODUCT,
    "%": PRODUCT,
    "/": PRODUCT,
}
CASTS = ("narrow", "float", "truncate")


def formula(expr: Expr) -> str:
    """The expression itself, in Python's syntax: '(kv_idx <= q_idx) & (q_idx - kv_idx < 4)'."""
    return _write(expr, use_labels=False)


def named_text(expr: Expr) -> str:
    """The expression in the names it was composed from: 'causal & window(4)'."""
    return _write(expr, use_labels=True)


def _write(root: Expr, use_labels: bool) -> str:
    written: dict[int, tuple[str, int]] = {}
    for node in postorder(root):
        if use_labels and node.label is not None:
            written[id(node)] = (node.label, ATOM)
        else:
            written[id(node)] = _write_node(node, [written[id(arg)] for arg in node.args])
    return written[id(root)][0]


def _write_node(node: Expr, args: list[tuple[str, int]]) -> tuple[str, int]:
    def operand(i: int, at_least: int) -> str:
        text, strength = args[i]
        return text if strength >= at_least else f"({text})"

    if node.op in ("const", "number"):
        return str(node.payload), UNARY if str(node.payload).startswith("-") else ATOM
    if node.op in INFIX:
        strength = INFIX[node.op]
        # operators group to the left, and comparisons do not chain
        left = operand(0, strength + (strength == COMPARISON))
        return f"{left} {node.op} {operand(1, strength + 1)}", strength
    if node.op == "~":
        return f"~{operand(0, UNARY)}", UNARY
    if node.op == "==":
        return f"{operand(0, ATOM)}.equals({args[1][0]})", ATOM
    if not node.args and node.payload is None:
        return node.op, ATOM
    texts = ", ".join(text for text, _ in args)
    if node.op in CASTS:
        return f"{str(node.payload).removeprefix('torch.')}({texts})", ATOM
    if isinstance(node.payload, Opaque):
        return f"opaque<{node.payload.name}>({texts})", ATOM
    inside = ([repr(node.payload)] if node.payload is not None else []) + [text for text, _ in args]
    return f"{node.op}({', '.join(inside)})", ATOM
