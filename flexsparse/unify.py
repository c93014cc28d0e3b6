"""Masks of one structure and different numbers -> one mask that looks its numbers up by head.

    head 0: causal & window(64)
    head 1: causal & window(256)     ->     causal & (q_idx - kv_idx < table[h]),  table = [64, 256]

so that one launch of one kernel serves them all (anti-unification of the trees).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from flexsparse.expr import Expr, Index, Mask, h, lookup
from flexsparse.walks import postorder


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
    built: dict[int, Expr] = {}
    for nodes in zip(*(list(postorder(mask)) for mask in masks.values()), strict=True):
        node = nodes[0]
        if _is_number(node) and any(other.payload != node.payload for other in nodes):
            table = torch.zeros(max(heads) + 1, dtype=torch.int64)
            table[heads] = torch.tensor([other.payload for other in nodes])
            if table.abs().max() < 1 << 31:
                table = table.to(torch.int32)
            built[id(node)] = lookup(table.to(device), h)
        else:
            args = tuple(built[id(arg)] for arg in node.args)
            built[id(node)] = type(node)(node.op, args, node.payload)
    result = built[id(node)]
    assert isinstance(result, Mask)
    return result


def _is_number(node: Expr) -> bool:
    return isinstance(node, Index) and node.op == "const"
