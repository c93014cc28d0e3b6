"""Walks over the nodes of an expression: each node object once, and none recurses.

A loop in a mask_mod makes expressions of thousands of nodes in a row, and others whose nodes share
their operands, so that a walk of every path would take exponential time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexsparse.expr import Mask
    from flexsparse.tree import Expr


def postorder(root: Expr) -> Iterator[Expr]:
    """Every node object once, operands before the node that uses them."""
    seen: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))


def written_out(root: Expr) -> tuple[int, int]:
    """Nodes where each is counted at every use, and how many at most stand in a row."""
    size: dict[int, int] = {}
    depth: dict[int, int] = {}
    for node in postorder(root):
        size[id(node)] = 1 + sum(size[id(arg)] for arg in node.args)
        depth[id(node)] = 1 + max((depth[id(arg)] for arg in node.args), default=0)
    return size[id(root)], depth[id(root)]


def rewritten(mask: Mask, change: Callable[[Expr, tuple[Expr, ...]], Expr]) -> Mask:
    """The mask with each node, operands first, replaced by change(node, its new operands)."""
    new: dict[int, Any] = {}
    for node in postorder(mask):
        new[id(node)] = change(node, tuple(new[id(arg)] for arg in node.args))
    result: Mask = new[id(mask)]
    return result


def conjuncts(mask: Mask) -> list[Mask]:
    """The masks that `&` joins, in order, each object once."""
    found: list[Mask] = []
    seen: set[int] = set()
    stack: list[Any] = [mask]
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op == "&":
            stack.extend(reversed(node.args))
        else:
            found.append(node)
    return found
