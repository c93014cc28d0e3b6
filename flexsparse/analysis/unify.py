"""Masks of one structure and different numbers -> one mask that looks its numbers up by head.

    head 0: causal & window(64)
    head 1: causal & window(256)     ->     causal & (q_idx - kv_idx < table[h]),  table = [64, 256]

so that one launch of one kernel serves them all (anti-unification of the trees).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from flexsparse.expr import Index, Mask, h, lookup
from flexsparse.tree import Expr
from flexsparse.walks import postorder, rewritten


def structure(mask: Mask) -> Hashable:
    """What masks that unify have in common: everything but the values of their numbers."""
    places: dict[int, int] = {}
    nodes = []
    for node in postorder(mask):
        places[id(node)] = len(places)
        payload = None if _is_number(node) else node.payload
        nodes.append((type(node), node.op, payload, tuple(places[id(arg)] for arg in node.args)))
    return tuple(nodes)


def unify(masks: Mapping[int, Mask], device: torch.device) -> Mask:
    """One mask that is masks[i] for head i; they must have one structure.

    Args:
        masks: of some query heads.
        device: where the tables of numbers go.
    """
    heads = list(masks)
    in_all = zip(*(postorder(mask) for mask in masks.values()), strict=True)
    alike = {id(nodes[0]): nodes for nodes in in_all}

    def unified(node: Expr, args: tuple[Expr, ...]) -> Expr:
        numbers = [other.payload for other in alike[id(node)]]
        if not _is_number(node) or len(set(numbers)) == 1:
            return node.over(args)
        table = torch.zeros(max(heads) + 1, dtype=torch.int64)
        table[heads] = torch.tensor(numbers)
        if table.abs().max() < 1 << 31:
            table = table.to(torch.int32)
        read: Index = lookup(table.to(device), h)
        return read

    return rewritten(masks[heads[0]], unified)


def _is_number(node: Expr) -> bool:
    return isinstance(node, Index) and node.op == "const"
