"""What a Hugging Face model itself hides, as an expression that a pattern can be ANDed to.

transformers describes causality, windows, chunks and packing by one function of (b, h, q_idx,
kv_idx), and padding by a tensor. Traced, both are a mask like any other, and analysed as one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexsparse.compiler import CompiledMask, compile_mask
from flexsparse.expr import Index, Mask, b, everything, kv_idx, lookup, maximum, q_idx
from flexsparse.heads import PerHead, per_head
from flexsparse.masks import causal
from flexsparse.tensors import Table
from flexsparse.tracing import from_mask_mod
from flexsparse.tree import Expr
from flexsparse.walks import conjuncts, rewritten

ALWAYS = q_idx >= 0  # what transformers writes for "no mask"


@dataclass(frozen=True)
class Rules:
    """What a model hides, and where in their sequences its queries and keys stand.

    own: the model's mask, of positions of queries and places of keys in the cache
    q_place, kv_place: positions counted from the start of the sequence, as patterns count them
    """

    own: Mask
    q_place: Index
    kv_place: Index

    @property
    def is_packed(self) -> bool:
        """Whether positions start again inside a row, and so are read from a table."""
        return self.q_place.op == "lookup"

    def and_also(self, mask: Mask) -> Mask:
        """What a pattern keeps of each sequence and the model does not hide."""
        stays = (self.q_place, self.kv_place) == (q_idx, kv_idx)
        moved = mask if stays else mask.at(q_idx=self.q_place, kv_idx=self.kv_place)
        said = {*conjuncts(moved), everything, ALWAYS}
        terms = [term for term in conjuncts(self.own) if term not in said]
        if mask != everything:
            terms.append(moved)
        return functools.reduce(Mask.__and__, terms) if terms else everything


def of(
    mask_mod: Callable[..., Tensor],
    padding: Tensor | None,
    lengths: tuple[int, int],
    q_offset: int,
    kv_offset: int,
    device: torch.device,
) -> Rules:
    """The rules of one forward, with tables of their own.

    Args:
        mask_mod: the model's, of positions.
        padding: boolean [batch, positions], False for padding.
        lengths: queries and keys, in tokens.
        q_offset: position of query row 0.
        kv_offset: position of key 0.
        device: of the queries.
    """
    own = _copied(from_mask_mod(mask_mod, device=device))
    place = _place_in_document(own)
    q_len, kv_len = lengths
    key = kv_idx + kv_offset if kv_offset else kv_idx
    own = own.at(kv_idx=key) if kv_offset else own
    if padding is not None:
        # a static cache has room that is not filled yet, which causality hides in any case
        filled = kv_offset + kv_len
        if causal.at(kv_idx=key) in conjuncts(own):
            filled = min(filled, q_offset + q_len)
        own = own & _without_padding(padding[:, kv_offset:filled], kv_len)
    if place is not None:
        row = (b,) if place.dim() == 2 else ()
        return _canonical(Rules(own, lookup(place, *row, q_idx), lookup(place, *row, key)))
    if padding is None:
        return _canonical(Rules(own, q_idx, key))
    first = _per_row(padding.int().argmax(1))
    if first == 0:
        return _canonical(Rules(own, q_idx, key))
    # padding stands before the first position, where no table of a pattern reaches
    return _canonical(Rules(own, maximum(q_idx - first, 0), maximum(key - first, 0)))


@functools.lru_cache(maxsize=16)
def _canonical(rules: Rules) -> Rules:
    """The equal rules of an earlier forward, if there were any: they compare faster."""
    return rules


@functools.lru_cache(maxsize=256)
def compiled(
    rules: Rules,
    masks: PerHead,
    q_len: int,
    kv_len: int,
    q_offset: int,
    batch: int,
    device: torch.device,
) -> CompiledMask:
    """The masks of a layer's heads, ANDed with the rules and compiled, for later forwards too."""
    distinct = [rules.and_also(mask) for mask in masks.distinct]
    return compile_mask(
        per_head([distinct[place] for place in masks.which]),
        q_len,
        kv_len,
        batch=batch,
        q_offset=q_offset,
        device=device,
    )


def forget() -> None:
    """Let go of everything that was compiled."""
    for cached in (compiled, _canonical):
        cached.cache_clear()


def _copied(mask: Mask) -> Mask:
    """The mask with tables of its own, so that it outlives the tensors of a forward.

    A table of one batch row loses that dimension: documents are recognised by what is left.
    """

    def copied(node: Expr, args: tuple[Expr, ...]) -> Expr:
        if not isinstance(node.payload, Table):
            return node.over(args)
        own = node.payload.tensor.clone()
        if len(args) == 2 and args[0] == b and len(own) == 1:
            own, args = own[0], args[1:]
        return replace(node, args=args, payload=Table(own))

    return rewritten(mask, copied)


def _place_in_document(own: Mask) -> Tensor | None:
    """Of each position in its packed document, int64; None if nothing is packed.

    [tokens], or of several batch rows [batch, tokens].
    """
    for term in conjuncts(own):
        tables = [side.payload for side in term.args if side.op == "lookup"]
        at = [side.args for side in term.args]
        if term.op == "==" and len(tables) == 2 and tables[0] == tables[1] and at in IN_DOCUMENT:
            ids = tables[0].tensor
            here = torch.arange(ids.shape[-1], device=ids.device)
            starts = torch.ones_like(ids, dtype=torch.bool)
            starts[..., 1:] = ids.diff(dim=-1) != 0
            return here - (here * starts).cummax(-1).values
    return None


IN_DOCUMENT = ([(q_idx,), (kv_idx,)], [(b, q_idx), (b, kv_idx)])


def _without_padding(real: Tensor, kv_len: int) -> Mask:
    """True for real keys: those of real, boolean [batch, kv_len or fewer]."""
    n_keys, n_real = real.shape[1], real.sum(1)
    first = real.int().argmax(1)
    last = n_keys - 1 - real.flip(1).int().argmax(1)
    if bool(((last - first + 1 != n_real) & (n_real > 0)).any()):
        # padding in the middle
        mask: Mask = lookup(torch.nn.functional.pad(real, (0, kv_len - n_keys)), b, kv_idx)
        return mask
    start, end = _per_row(first), _per_row(first + n_real)
    mask = everything if start == 0 else kv_idx >= start
    return mask if end == n_keys else mask & (kv_idx < end)


def _per_row(values: Tensor) -> Index | int:
    """An integer for each batch row: one number if they are all the same."""
    if bool((values == values[0]).all()):
        return int(values[0])
    read: Index = lookup(values.clone(), b)
    return read
