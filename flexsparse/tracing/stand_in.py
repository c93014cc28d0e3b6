"""Stand-ins for tensors that depend on an index: shapes, dtypes and devices without values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flexsparse.errors import MaskError
from flexsparse.tracing.arrays import broadcast_shape

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor")
BITS = ("bitwise_and", "bitwise_or", "bitwise_xor")
PROMOTED = ("add", "sub", "mul", "minimum", "maximum", "remainder", "floor_divide", *BITS)


class ValueNeededError(Exception):
    """The mask_mod asked for the value of what depends on an index."""


class ReadsEntries(TorchFunctionMode):
    """table[q_idx] reads an entry, where q_idx would else be asked for its value; as in torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            table, index = args
            indices = list(index) if isinstance(index, (tuple, list)) else [index]
            if all(isinstance(x, (Tensor, int)) and not isinstance(x, bool) for x in indices):
                places = [
                    x if isinstance(x, Tensor) else torch.tensor(x, device=table.device)
                    for x in indices
                ]
                return torch.ops.aten.index.Tensor(table, places)
            if any(map(_is_place, indices)):
                # each takes its dimension away, and what is left are slices, None and ...
                entries = torch.ops.aten.index.Tensor(table, _places(table, indices))
                return entries[tuple(x for x in indices if not _is_place(x))]
        return func(*args, **(kwargs or {}))


def _is_place(index: Any) -> bool:
    """Whether an index is one number, which may not be known yet."""
    masks = (torch.bool, torch.uint8)
    return isinstance(index, Tensor) and not index.dim() and index.dtype not in masks


def _places(table: Tensor, indices: Sequence[Any]) -> list[Tensor | None]:
    """The numbers among the indices of table[indices], each at its dimension."""
    consumed = [_consumed(x) for x in indices]
    result: list[Tensor | None] = []
    for index, n in zip(indices, consumed, strict=True):
        if index is Ellipsis:
            n = max(table.dim() - sum(consumed), 0)
        result += [index] if _is_place(index) else [None] * n
    return result


def _consumed(index: Any) -> int:
    """How many dimensions of a tensor an index is of; what `...` stands for is not counted."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return 0
    is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index.dim() if is_mask else 1


class StandIn(Tensor):
    """Stands for a tensor that depends on an index: it has a shape, a dtype and a device."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> StandIn:
        """A stand-in, on any device, for what a tensor without memory describes."""
        made: StandIn = Tensor._make_wrapper_subclass(
            cls, meta.shape, dtype=meta.dtype, device=device
        )
        made.meta = meta
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise MaskError("It was used after the mask_mod that was traced had returned.")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"traced({self.dtype}, {tuple(self.shape)})"


def described(name: str, arguments: dict[str, Any]) -> Tensor | None:
    """The shape and dtype that an operator gives, or None if torch is to be asked.

    torch's own rules for these would import its compiler, which takes a second.
    """
    if name == "index":
        return _indexed(arguments["self"], arguments["indices"])
    if name not in COMPARISONS and name not in PROMOTED:
        return None
    pair = [arguments["self"], arguments["other"]]
    shape = broadcast_shape([tuple(x.shape) for x in pair if isinstance(x, Tensor)])
    dtype = torch.bool if name in COMPARISONS else torch.result_type(*pair)
    return torch.empty(shape, dtype=dtype, device="meta")


def _indexed(table: Tensor, indices: list[Tensor | None]) -> Tensor:
    """A tensor of the shape that table[indices] has."""
    chosen = [i for i, x in enumerate(indices) if x is not None]
    given = [x for x in indices if x is not None]
    if len(indices) > table.dim():
        raise IndexError(f"{len(indices)} indices for a tensor of {table.dim()} dimensions")
    if any(x.dtype in (torch.bool, torch.uint8) for x in given):
        raise ValueNeededError
    if any(x.is_floating_point() for x in given):
        raise IndexError(f"tensors used as indices must be integers, not {given[0].dtype}")
    inside = broadcast_shape([tuple(x.shape) for x in given])
    first = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0
    rest = [n for i, n in enumerate(table.shape) if i not in chosen]
    shape = (*rest[:first], *inside, *rest[first:])
    return torch.empty(shape, dtype=table.dtype, device="meta")
