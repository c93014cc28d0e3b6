"""Packed sequences as one: what a mask or a score_mod of sequences says of packed tokens.

The sequence of a token, and what turns its place in the pack into a position, are read from tables.
The analysis bounds these as any others, so blocks are proved without a look at each token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.default_device import cpu_by_default
from flexsparse.executors.streaming import Positions
from flexsparse.expr import Index, Mask, kv_idx, lookup, maximum, minimum, q_idx
from flexsparse.heads import PerHead
from flexsparse.lower import padded
from flexsparse.tensors import ScoreMod
from flexsparse.text import shown
from flexsparse.walks import postorder

# Sequence numbers are multiples of it: padding of queries and of keys gets numbers between, so that
# it equals nothing, and a block that ends in padding is still told from those of other sequences.
OWNER = 3


class Pack:
    """Sequences of tokens laid end to end, each in a room that is a multiple of `step` tokens.

    starts: the place of each sequence's first token
    size: all places, tokens and padding
    device: where its tables are
    has_padding: whether some room is larger than its sequence
    """

    def __init__(self, lens: Sequence[int], step: int, device: torch.device) -> None:
        self.lens = torch.tensor(lens)
        self.room = -(-self.lens // step) * step
        self.starts = self.room.cumsum(0) - self.room
        self.size = int(self.room.sum())
        self.device = device
        self._places = None
        self.has_padding = self.size > sum(lens)
        if self.has_padding:
            self._places = self._is_token().nonzero().flatten().to(device)

    def spread(self, tokens: Tensor) -> Tensor:
        """[tokens, ...] -> [size, ...], zeros where there is padding."""
        if self._places is None:
            return tokens
        return tokens.new_zeros(self.size, *tokens.shape[1:]).index_copy(0, self._places, tokens)

    def gather(self, places: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return places if self._places is None else places.index_select(0, self._places)

    def of_tokens(self, values: Tensor) -> Tensor:
        """A value for each sequence -> int32 [size], the value of the sequence of each place."""
        return values.int().repeat_interleave(self.room).to(self.device)

    def owners(self, padding: int) -> Tensor:
        """OWNER times the sequence of each place, and `padding` more where it holds no token."""
        numbers = self.of_tokens(torch.arange(len(self.lens)) * OWNER)
        if self._places is None:
            return numbers
        return numbers.where(self._is_token().to(self.device), numbers + padding)

    def cu_seqlens(self, with_padding: bool) -> Tensor:
        """int32, where each sequence begins, and the end; with_padding, each one's padding too."""
        begins = torch.stack([self.starts, self.starts + self.lens], 1)
        begins = begins.flatten() if with_padding else self.starts
        return torch.nn.functional.pad(begins, (0, 1), value=self.size).int().to(self.device)

    def _is_token(self) -> Tensor:
        ends = (self.starts + self.lens).repeat_interleave(self.room)
        return torch.arange(self.size) < ends


class TokenTables(NamedTuple):
    """Tables of places in the packs, int32: of queries [size of q], of keys [size of kv].

    q_owner, kv_owner: the sequence, times OWNER; more where there is padding
    q_shift_of_q, q_shift_of_kv: what makes a place of a query a position in that sequence
    kv_shift_of_q, kv_shift_of_kv: what makes a place of a key a position in it
    """

    q_owner: Tensor
    kv_owner: Tensor
    q_shift_of_q: Tensor
    q_shift_of_kv: Tensor
    kv_shift_of_q: Tensor
    kv_shift_of_kv: Tensor


class PackedTokens:
    """What is known of two tokens of a pack of queries and one of keys.

    Args:
        q: the pack of queries.
        kv: the pack of keys, of as many sequences.
        q_offsets: position of each sequence's first query.

    sequences: each one's queries, keys, and position of its first query
    positions: where sequences begin and their first queries stand, as the streaming kernels take it
    """

    def __init__(self, q: Pack, kv: Pack, q_offsets: Sequence[int]) -> None:
        first = torch.tensor(q_offsets)
        # position = place in the pack + shift
        q_shifts, kv_shifts = first - q.starts, -kv.starts
        self._packs, self._shifts = (q, kv), (q_shifts, kv_shifts)
        self.sequences = tuple(zip(q.lens.tolist(), kv.lens.tolist(), q_offsets, strict=True))
        is_used = q.lens > 0
        self.q_range = int(first[is_used].min()), int((first + q.lens)[is_used].max()) - 1
        self.kv_range = 0, int(kv.lens.max()) - 1
        # whether two tokens of a sequence are as far apart in the pack as they are in it
        self.keeps_distances = torch.equal(q_shifts, kv_shifts)
        self._lengths = q.size, kv.size
        # padding is to these kernels a sequence of its own, of which nobody reads the output
        padded = q.has_padding or kv.has_padding
        self.positions = Positions(
            q.cu_seqlens(padded),
            kv.cu_seqlens(padded),
            first.int().repeat_interleave(1 + padded).to(q.device),
        )

    @functools.cached_property
    @cpu_by_default()
    def tables(self) -> TokenTables:
        """What is read of each place; as long as the packs, so made for who wants it."""
        (q, kv), (q_shifts, kv_shifts) = self._packs, self._shifts
        return TokenTables(
            q.owners(1),
            kv.owners(2),
            q.of_tokens(q_shifts),
            kv.of_tokens(q_shifts),
            q.of_tokens(kv_shifts),
            kv.of_tokens(kv_shifts),
        )

    def fill(self, grid: Grid) -> bool:
        """Whether a grid is that of the packs, and not of a part of them."""
        return (grid.q_len, grid.kv_len) == self._lengths and grid.q_offset == 0

    def of_heads(self, masks: PerHead) -> PackedHeads:
        """The mask of each head as one of places in the packs."""
        packed = tuple(map(self.packed, masks.distinct))
        return PackedHeads(packed, masks.which, masks.distinct, self)

    def packed(self, mask: Mask) -> Mask:
        """The mask as one of places in the packs."""
        placed: dict[int, Mask] = {}
        for node in postorder(mask):
            if not isinstance(node, Mask):
                continue
            if node.args and all(isinstance(arg, Mask) for arg in node.args):
                args = tuple(placed[id(arg)] for arg in node.args)
                placed[id(node)] = Mask(node.op, args, node.payload)
            else:
                placed[id(node)] = self._term(node)
        tables = self.tables
        mine: Mask = lookup(tables.q_owner, q_idx).equals(lookup(tables.kv_owner, kv_idx))
        return (mine & placed[id(mask)]).named(f"{shown(mask)} in {len(self.sequences)} sequences")

    def _term(self, term: Mask) -> Mask:
        """A comparison, or an entry of a table, as one of places in the packs."""
        tables = self.tables
        sequence = lookup(tables.q_owner, q_idx) // OWNER
        if self.keeps_distances and not term.tables and _reads_distance_alone(term):
            return term.at(b=sequence)
        # Each place is shifted as the sequence of the other is. Inside a sequence that is the same;
        # where sequences meet in a block, bounds are tight, as tokens of different sequences come
        # out as far apart as they are in the pack. A term that reads one side needs no such thing.
        q, kv = lookup(tables.q_shift_of_kv, kv_idx), lookup(tables.kv_shift_of_q, q_idx)
        if "kv_idx" not in term.variables:
            q = lookup(tables.q_shift_of_q, q_idx)
        elif "q_idx" not in term.variables:
            kv = lookup(tables.kv_shift_of_kv, kv_idx)
            sequence = lookup(tables.kv_owner, kv_idx) // OWNER
        q, kv = q_idx + q, kv_idx + kv
        if term.tables:
            # a table need not answer for padding, or for pairs of different sequences
            q, kv = _clamp(q, *self.q_range), _clamp(kv, *self.kv_range)
        return term.at(b=sequence, q_idx=q, kv_idx=kv)

    def score_mod(self, score_mod: ScoreMod) -> ScoreMod:
        """A score_mod of sequences and positions as one of places in the packs."""
        tables = self.tables
        q_owner, kv_owner = padded(tables.q_owner), padded(tables.kv_owner)
        q_shift, kv_shift = padded(tables.q_shift_of_q), padded(tables.kv_shift_of_kv)
        last = self.q_range[1]

        def of_places(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            owner = q_owner[q_idx]
            # what the mask hides is scored as a pair that there may be
            q = (q_idx + q_shift[q_idx]).clamp(max=last)
            kv = torch.where(owner == kv_owner[kv_idx], kv_idx + kv_shift[kv_idx], 0)
            return score_mod(score, owner // OWNER, h, q, kv)

        return of_places


@dataclass(frozen=True, repr=False)
class PackedHeads(PerHead):
    """Masks of places in packs, which know what they are inside a sequence.

    inside: `distinct` as masks of positions
    tokens: what is in the packs
    """

    inside: tuple[Mask, ...] = field(compare=False)
    tokens: PackedTokens = field(compare=False)


def _reads_distance_alone(term: Mask) -> bool:
    """Whether q_idx and kv_idx are only subtracted from, or compared with, each other."""
    for node in postorder(term):
        read = {arg.op for arg in node.args} & {"q_idx", "kv_idx"}
        if read and (len(read) == 1 or node.op not in ("-", "<", "<=", "==")):
            return False
    return True


def _clamp(index: Index, least: int, most: int) -> Index:
    return minimum(maximum(index, least), most)
