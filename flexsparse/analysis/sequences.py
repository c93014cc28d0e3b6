"""Packed sequences that a mask tells of itself: `same document & ...`, and what else it says.

Documents are told apart by a table of numbers, or by tables of where each begins or ends. Where
each is one run of tokens, kernels for packed sequences can run the mask, and the rest of it is a
mask of positions in a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.expr import Mask
from flexsparse.tensors import TENSOR_READING, Table
from flexsparse.tree import Expr, evaluate
from flexsparse.walks import conjuncts

PLACES = frozenset(("q_idx", "kv_idx"))
# of what is computed for all tokens: steps of an index expression, and comparisons of one
MOST_STEPS, MOST_BOUNDS = 16, 8


class Sequences:
    """Runs of tokens, each a sequence of its own.

    cu_seqlens: int32 [sequences + 1], where each begins, and the end
    ids: the table whose entries tell them apart, if the mask compares such
    always: conditions of the mask that every pair of one sequence meets
    """

    def __init__(self, lengths: Tensor, ids: Table | None = None) -> None:
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        self.ids = ids
        self.always: tuple[Mask, ...] = ()
        self._lengths = lengths

    @functools.cached_property
    def places(self) -> Tensor:
        """The place of each token: int64 [tokens], as the next three."""
        return torch.arange(int(self.cu_seqlens[-1]), device=self.cu_seqlens.device)

    @functools.cached_property
    def starts(self) -> Tensor:
        """The place of the first token of its sequence, for each token."""
        return self._of_tokens(self.cu_seqlens[:-1])

    @functools.cached_property
    def lasts(self) -> Tensor:
        """The place of the last token of its sequence, for each token."""
        return self._of_tokens(self.cu_seqlens[1:]) - 1

    @functools.cached_property
    def positions(self) -> Tensor:
        """The position of each token in its sequence."""
        return self.places - self.starts

    def _of_tokens(self, values: Tensor) -> Tensor:
        return values.long().repeat_interleave(self._lengths, output_size=len(self.places))


def sequences_of(mask: Mask, length: int) -> Sequences | None:
    """The sequences that tokens 0 to length - 1 are, if the mask keeps pairs of one alone.

    None if it says nothing of the kind, or if one lies in several runs.
    """
    joined = conjuncts(mask)
    ids = next(filter(None, map(documents_of, joined)), None)
    if ids is None:
        return _bounded(joined, length)
    runs, lengths = torch.unique_consecutive(ids.tensor[:length], return_counts=True)
    return Sequences(lengths, ids) if len(runs.unique()) == len(runs) else None


def documents_of(node: Expr) -> Table | None:
    """The table whose entries at q_idx and at kv_idx a comparison wants to be equal, if it does."""
    if node.op != "==" or any(len(arg.args) != 1 for arg in node.args):
        return None
    a, b = node.args
    readers = {(a.op, a.args[0].op), (b.op, b.args[0].op)}
    same = readers == {("lookup", "q_idx"), ("lookup", "kv_idx")} and a.payload == b.payload
    return a.payload if same else None


def values_at(index: Expr, places: Tensor) -> Tensor | None:
    """What an expression of q_idx alone, or of kv_idx alone, is at places: int64, or None."""
    read = index.variables
    if len(read) != 1 or not read <= PLACES or len(index.steps) > MOST_STEPS:
        return None
    values = evaluate(index, dict.fromkeys(read, places), TENSOR_READING)
    return None if values.is_floating_point() or values.dtype == torch.bool else values.long()


class Bound(NamedTuple):
    """A condition that compares one token of a pair with a number that the other has.

    of: q_idx or kv_idx, the one that is compared
    is_upper: whether it is at most that number, and not at least
    values: that number, for each token that the other may be
    """

    node: Mask
    of: str
    is_upper: bool
    values: Tensor

    def keeps_out(self, sequences: Sequences, *, earlier: bool) -> bool:
        """Whether no query sees a key of an earlier sequence than its own, or of a later one."""
        # a query that is in no later sequence than its keys sees none of an earlier one
        if (self.of == "kv_idx") == (earlier == self.is_upper):
            return False
        if self.is_upper:
            return bool((self.values <= sequences.lasts).all())
        return bool((self.values >= sequences.starts).all())

    def is_met(self, sequences: Sequences) -> bool:
        """Whether all pairs of one sequence meet it."""
        if self.is_upper:
            return bool((self.values >= sequences.lasts).all())
        return bool((self.values <= sequences.starts).all())


def _bounded(joined: Sequence[Mask], length: int) -> Sequences | None:
    """The sequences outside of which these conditions together keep nothing."""
    compared = [x for x in joined if x.op in ("<", "<=") and any(a.op in PLACES for a in x.args)]
    device = next(filter(None, (node.device for node in compared)), None)
    if device is None or len(compared) > MOST_BOUNDS:
        return None  # no table says where a sequence begins
    places = torch.arange(length, device=device)
    bounds = [*filter(None, (_bound(node, places) for node in compared))]
    for bound in bounds:
        # where a sequence begins or ends is the same number for each of its tokens
        sequences = Sequences(torch.unique_consecutive(bound.values, return_counts=True)[1])
        if all(any(x.keeps_out(sequences, earlier=side) for x in bounds) for side in (True, False)):
            sequences.always = tuple(x.node for x in bounds if x.is_met(sequences))
            return sequences
    return None


def _bound(node: Mask, places: Tensor) -> Bound | None:
    small, large = node.args
    strict = int(node.op == "<")
    for one, other, is_upper in ((small, large, True), (large, small, False)):
        if one.op in PLACES and other.variables == PLACES - {one.op}:
            values = values_at(other, places)
            if values is not None:
                return Bound(
                    node, one.op, is_upper, values - strict if is_upper else values + strict
                )
    return None
