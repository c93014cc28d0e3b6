"""Masks written as text: `formula` in operators, `named_text` in the names of patterns.

flexsparse.parser reads a formula back.
"""

from __future__ import annotations

from flexsparse.tensors import CASTS, Opaque
from flexsparse.tree import Expr

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
# A loop in a mask_mod may share its terms so that the text doubles with each turn: this many
# characters are written, which is more than any mask written by hand has.
MOST_WRITTEN = 1 << 18
SHOWN = 256  # characters of a mask in a message, a label or a picture

Part = str | tuple[Expr, int]  # characters, or an operand and how strongly it must bind


def formula(expr: Expr, most: int = MOST_WRITTEN) -> str:
    """The expression itself, in Python's syntax: '(kv_idx <= q_idx) & (q_idx - kv_idx < 4)'.

    Args:
        expr: what is written.
        most: characters; a longer text is cut there, at a cost that follows what is left of it.
    """
    return _write(expr, use_labels=False, most=most)


def named_text(expr: Expr, most: int = MOST_WRITTEN) -> str:
    """The expression in the names it was composed from, cut likewise: 'causal & window(4)'."""
    return _write(expr, use_labels=True, most=most)


def shown(expr: Expr) -> str:
    """The expression in its names, as short as messages, labels and pictures want it."""
    return named_text(expr, SHOWN)


def shorten(text: str, width: int) -> str:
    """A text cut to a width, with an ellipsis where something is left out."""
    return text if len(text) <= width else text[: width - 3] + "..."


def amount(n: int, one: str, more: str | None = None) -> str:
    """A number and what it counts: '1 query', '4,096 queries'; more is one + 's' by default."""
    return f"{n:,} {one if n == 1 else more or one + 's'}"


def _write(root: Expr, use_labels: bool, most: int) -> str:
    written: list[str] = []
    length = 0
    stack: list[Part] = [(root, COMPARISON)]
    while stack and length <= most:
        part = stack.pop()
        if isinstance(part, str):
            written.append(part)
            length += len(part)
            continue
        node, at_least = part
        if use_labels and node.label is not None:
            stack.append(node.label)
            continue
        strength, parts = _parts(node)
        stack += reversed(parts if strength >= at_least else ["(", *parts, ")"])
    return shorten("".join(written), most)


def _parts(node: Expr) -> tuple[int, list[Part]]:
    """How strongly a node binds, and what it is written as."""
    args = node.args
    if node.op in ("const", "number"):
        text = str(node.payload)
        return UNARY if text.startswith("-") else ATOM, [text]
    if node.op in INFIX:
        strength = INFIX[node.op]
        # operators group to the left, and comparisons do not chain
        left = (args[0], strength + (strength == COMPARISON))
        return strength, [left, f" {node.op} ", (args[1], strength + 1)]
    if node.op == "~":
        return UNARY, ["~", (args[0], UNARY)]
    if node.op == "==":
        return ATOM, [(args[0], ATOM), ".equals(", (args[1], COMPARISON), ")"]
    if not args and node.payload is None:
        return ATOM, [node.op]
    inside: list[Part] = [(arg, COMPARISON) for arg in args]
    name = node.op
    if node.op in CASTS:
        name = str(node.payload).removeprefix("torch.")
    elif isinstance(node.payload, Opaque):
        name = f"opaque<{node.payload.name}>"
    elif node.payload is not None:
        inside.insert(0, repr(node.payload))
    between: list[Part] = [part for operand in inside for part in (", ", operand)]
    return ATOM, [f"{name}(", *between[1:], ")"]
