"""Packed sequences that a mask tells of itself: `same document & ...`, and what else it says.

Documents are told apart by a table. Where each is one run of tokens, kernels for packed sequences
can run the mask, and the rest of it is a mask of positions in a sequence.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flexsparse.expr import Mask
from flexsparse.tensors import Table
from flexsparse.tree import Expr
from flexsparse.walks import conjuncts


class Sequences:
    """The runs of equal entries of a table, each a sequence of tokens.

    ids: the table
    cu_seqlens: int32 [sequences + 1], where each begins, and the end
    """

    def __init__(self, ids: Table, lengths: Tensor) -> None:
        self.ids = ids
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def numbers_tokens(self, table: Table) -> bool:
        """Whether a table holds the position of each token in its sequence."""
        positions, found = self._positions, table.tensor
        n = len(positions)
        return len(found) >= n and found[:n].equal(positions.to(found.device, found.dtype))

    @functools.cached_property
    def _positions(self) -> Tensor:
        starts, total = self.cu_seqlens[:-1], int(self.cu_seqlens[-1])
        starts = starts.repeat_interleave(self.cu_seqlens.diff(), output_size=total)
        return torch.arange(total, device=starts.device) - starts


def sequences_of(mask: Mask, length: int) -> Sequences | None:
    """The sequences that tokens 0 to length - 1 are, if the mask keeps pairs of one alone.

    None if it says nothing of the kind, or if one lies in several runs.
    """
    ids = next(filter(None, map(documents_of, conjuncts(mask))), None)
    if ids is None:
        return None
    runs, lengths = torch.unique_consecutive(ids.tensor[:length], return_counts=True)
    return Sequences(ids, lengths) if len(runs.unique()) == len(runs) else None


def documents_of(node: Expr) -> Table | None:
    """The table whose entries at q_idx and at kv_idx a comparison wants to be equal, if it does."""
    if node.op != "==" or any(len(arg.args) != 1 for arg in node.args):
        return None
    a, b = node.args
    readers = {(a.op, a.args[0].op), (b.op, b.args[0].op)}
    same = readers == {("lookup", "q_idx"), ("lookup", "kv_idx")} and a.payload == b.payload
    return a.payload if same else None
