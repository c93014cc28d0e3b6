"""One mask per query head: the distinct masks, and which head has which."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexsparse.errors import MaskError
from flexsparse.expr import Mask, h, lookup
from flexsparse.text import amount, shown


@dataclass(frozen=True)
class PerHead:
    """Masks of several query heads: head i has `distinct[which[i]]`.

    distinct: the different masks, in the order in which they first occur
    which: for each query head, the place of its mask in `distinct`
    """

    distinct: tuple[Mask, ...]
    which: tuple[int, ...]

    @property
    def n_heads(self) -> int:
        """The number of query heads."""
        return len(self.which)

    def heads_of(self, place: int) -> tuple[int, ...]:
        """The heads that have the mask `distinct[place]`."""
        return tuple(head for head, i in enumerate(self.which) if i == place)

    def __getitem__(self, head: int) -> Mask:
        return self.distinct[self.which[head]]

    def mask(self, device: torch.device) -> Mask:
        """All heads as one mask that reads the head index, through a table on a device."""
        if len(self.distinct) == 1:
            return self.distinct[0]
        which = lookup(torch.tensor(self.which, device=device), h)
        parts: list[Mask] = []
        for place, mask in enumerate(self.distinct):
            if "h" in mask.variables:
                # kernels evaluate every mask at every head, and at heads that are not its own it
                # may divide by 0 or read outside its tables: there it is read at its first head
                own = self.heads_of(place)
                heads = [head if i == place else own[0] for head, i in enumerate(self.which)]
                mask = mask.at(h=lookup(torch.tensor(heads, device=device), h))
            parts.append(which.equals(place) & mask)
        return functools.reduce(Mask.__or__, parts).named(self.name)

    @property
    def name(self) -> str:
        """What messages and pictures call it."""
        return f"per_head of {amount(self.n_heads, 'head')}"

    def __str__(self) -> str:
        lines = [
            f"  {shown(mask)}   {numbered('head', self.heads_of(place))}"
            for place, mask in enumerate(self.distinct)
        ]
        heads = amount(self.n_heads, "head")
        distinct = amount(len(self.distinct), "distinct mask")
        return "\n".join([f"PerHead: {heads}, {distinct}", *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from flexsparse.drawing import html

        return html(self)


def per_head(masks: Sequence[Mask]) -> PerHead:
    """Give each query head its own mask: masks[i] is head i's; equal masks are compiled once.

    Args:
        masks: one mask for each *query* head (with GQA there are more of these than kv heads).
    """
    try:
        masks = list(masks)
    except TypeError:
        raise MaskError(
            f"per_head got {type(masks).__name__}; it takes a list of masks. Give one for each "
            "query head, or compile a mask for all heads as it is."
        ) from None
    if not masks:
        raise MaskError("per_head got no masks. Give one mask for each query head.")
    for head, mask in enumerate(masks):
        if not isinstance(mask, Mask):
            raise MaskError(
                f"per_head got {type(mask).__name__} for head {head}: {mask!r}. Give a Mask for "
                "each query head; call patterns that take arguments, and wrap a mask_mod function "
                "with flexsparse.from_mask_mod."
            )
    distinct = tuple(dict.fromkeys(masks))
    places = {mask: place for place, mask in enumerate(distinct)}
    return PerHead(distinct, tuple(places[mask] for mask in masks))


def as_per_head(mask: Mask | PerHead, n_heads: int) -> PerHead:
    """The masks of all heads: one mask is that of each."""
    return mask if isinstance(mask, PerHead) else PerHead((mask,), (0,) * n_heads)


def refuse_other(taker: str, mask: object) -> None:
    """Raise MaskError unless it is a Mask or a PerHead; `taker` is what the user called."""
    reason = not_a_mask(mask)
    if reason is not None:
        raise MaskError(f"{taker} takes a Mask or per_head([...]), not {reason}")


def refuse_other_count(where: str, mask: Mask | PerHead, n_heads: int | None) -> None:
    """Raise MaskError if masks of heads are not n_heads, where that is given."""
    if isinstance(mask, PerHead) and n_heads not in (None, mask.n_heads):
        raise MaskError(
            f"{where}per_head got {mask.n_heads} masks but n_heads={n_heads}. Give one mask for "
            "each query head, or leave n_heads out."
        )


def not_a_mask(mask: object) -> str | None:
    """What was given where a Mask or a PerHead is wanted, and the fix; None if it is one."""
    if isinstance(mask, (Mask, PerHead)):
        return None
    if isinstance(mask, (bool, int)):
        fix = "`==` compares the expressions themselves; write a.equals(b) for the mask."
    elif isinstance(mask, (list, tuple)):
        fix = "Wrap the list: per_head(masks)."
    elif callable(mask):
        fix = "Call the pattern first, or make a Mask of a mask_mod function with from_mask_mod."
    else:
        fix = "Build one from q_idx and kv_idx, or take one from flexsparse.masks."
    return f"{type(mask).__name__}. {fix}"


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as text: '0-7, 9'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{z}" if a < z else str(a) for a, z in runs)


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """What has these numbers, as text: 'heads 0-7, 9'."""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"
