"""Mask -> a mask that says the same on a grid, and reads from tables what takes a division.

A kernel on CPU computes `kv_idx // 64 % 8` again for every pair, and divides one integer at a time:
that takes longer than the product of the query and the key. A part of the mask that reads one
number of a pair, its query, its key or the distance between them, is a table of what it can be, and
as such data of the kernel.

    (q_idx // 64).equals(kv_idx // 64)     ->     table[q_idx].equals(another[kv_idx])
"""

from __future__ import annotations

import torch

from flexsparse.analysis.cells import Grid
from flexsparse.arguments import INT32_MAX
from flexsparse.expr import Mask, kv_idx, lookup, q_idx
from flexsparse.tensors import TENSOR_READING, Opaque, Table
from flexsparse.tree import VARIABLES, Expr, evaluate
from flexsparse.walks import postorder, rewritten

DIVISIONS = ("//", "%")
FLOATS = ("number", "float", "truncate", "/", "sqrt", "floor", "ceil")
DISTANCE = "q_idx - kv_idx"
# Kernels on CPU take tables of fixed lengths alone, powers of 2: one of them is enough up to this.
SHORTEST = 1 << 16


def tabulated(mask: Mask, grid: Grid) -> Mask:
    """The mask with a table for each part, as large as can be, that divides and reads one number.

    Args:
        mask: what a kernel on CPU evaluates.
        grid: the lengths, and the position of query row 0.
    """
    if grid.q_len == 1:
        return mask  # nothing is divided twice
    tables = {id(part): _table(part, read, grid) for part, read in _parts(mask)}

    def change(node: Expr, args: tuple[Expr, ...]) -> Expr:
        return tables[id(node)] if id(node) in tables else node.over(args)

    return rewritten(mask, change)


def _parts(mask: Mask) -> list[tuple[Expr, str]]:
    """The parts, each with what it reads: q_idx, kv_idx or their distance."""
    nodes = list(postorder(mask))
    reads: dict[int, frozenset[str]] = {}
    divides: dict[int, bool] = {}
    for node in nodes:
        operands = [id(arg) for arg in node.args]
        divides[id(node)] = node.op in DIVISIONS or any(divides[i] for i in operands)
        if _is_distance(node):
            reads[id(node)] = frozenset({DISTANCE})
            continue
        # floats and functions, which kernels may round in another way, are nothing for a table
        own = {node.op} if node.op in VARIABLES or not _is_of_integers(node) else set()
        reads[id(node)] = frozenset(own).union(*(reads[i] for i in operands))
    one = ({"q_idx"}, {"kv_idx"}, {DISTANCE})
    can = {i for i, read in reads.items() if divides[i] and read in one}
    if id(mask) in can:
        parts: list[Expr] = [mask]
    else:
        outside = (node for node in nodes if id(node) not in can)
        parts = [*{id(x): x for node in outside for x in node.args if id(x) in can}.values()]
    return [(part, next(iter(reads[id(part)]))) for part in parts]


def _is_distance(node: Expr) -> bool:
    return node.op == "-" and [arg.op for arg in node.args] == ["q_idx", "kv_idx"]


def _is_of_integers(node: Expr) -> bool:
    if isinstance(node.payload, Table):
        return not node.payload.tensor.is_floating_point()
    return node.op not in FLOATS and not isinstance(node.payload, Opaque)


def _table(part: Expr, read: str, grid: Grid) -> Expr:
    """What reads the values of a part, at all that it can be of."""
    first, end, index = {
        "q_idx": (grid.q_offset, grid.q_offset + grid.q_len, q_idx),
        "kv_idx": (0, grid.kv_len, kv_idx),
        DISTANCE: (grid.q_offset - grid.kv_len + 1, grid.q_offset + grid.q_len, q_idx - kv_idx),
    }[read]
    # with key 0, a query is its own distance
    variables = {"q_idx": torch.arange(first, end), "kv_idx": torch.arange(first, end)}
    if read == DISTANCE:
        variables["kv_idx"] = torch.tensor(0)
    found = torch.as_tensor(evaluate(part, variables, TENSOR_READING))
    if found.dtype != torch.bool and int(found.abs().max()) <= INT32_MAX:
        found = found.int()
    table = torch.nn.functional.pad(found, (0, max(SHORTEST - len(found), 0)))
    entry: Expr = lookup(table, index if read == "kv_idx" else index - first)
    return entry
