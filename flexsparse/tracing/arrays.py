"""Arrays of expressions: what the tensors of a traced mask_mod become.

An Array says what stands at given coordinates and computes it when asked, so that table[b][kv_idx]
reads one entry, and a row of 131,072 is never written out. A coordinate is an int or an Index.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.errors import MaskError
from flexsparse.tensors import Table
from flexsparse.tracing.scalars import INTEGERS, Scalars, Untranslatable
from flexsparse.tree import Expr

Place = Any  # an int or an Index
Places = tuple[Place, ...]


class Array:
    """A tensor of a traced mask_mod: an expression at every place.

    Args:
        shape: of the tensor.
        dtype: torch's, which each expression keeps to.
        entry: the expression at some coordinates, of which there is one for each dimension.
        otherwise: the expression where `entry` raises Untranslatable, at coordinates that are ints.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        entry: Callable[[Places], Expr],
        otherwise: Callable[[Places, Untranslatable], Expr] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.entry = entry
        self.otherwise = otherwise
        self._made: dict[Any, Expr] = {}

    def at(self, places: Places) -> Expr:
        """The expression at coordinates."""
        key = tuple(x if isinstance(x, int) else ("at", id(x)) for x in places)
        if key not in self._made:
            try:
                self._made[key] = self.entry(places)
            except Untranslatable as reason:
                if self.otherwise is None or not all(isinstance(x, int) for x in places):
                    raise
                self._made[key] = self.otherwise(places, reason)
        return self._made[key]

    def spread(self, places: Places) -> Expr:
        """The expression at coordinates of a shape that this one is broadcast to."""
        own = places[len(places) - len(self.shape) :]
        return self.at(tuple(0 if n == 1 else x for x, n in zip(own, self.shape, strict=True)))


class Call(NamedTuple):
    """One call of an operator: its arguments by name, and the shape and dtype of what it returns.

    values: tensors are Arrays
    raw: tensors are fake ones, which know their dtype for promotion
    """

    scalars: Scalars
    values: dict[str, Any]
    raw: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype


def broadcast_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that tensors of these shapes have together."""
    # torch.broadcast_shapes imports sympy, which takes a third of a second
    result: list[int] = []
    for sizes in itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        distinct = {n for n in sizes if n != 1} or {1}
        if len(distinct) > 1:
            raise IndexError(f"the shapes {', '.join(map(str, shapes))} do not broadcast")
        result.insert(0, distinct.pop())
    return tuple(result)


def constant(scalars: Scalars, tensor: Tensor, table: Table | None) -> Array:
    """An Array of a tensor that no index has a part in.

    Args:
        scalars: makes the nodes.
        tensor: the entries.
        table: the tensor as a table to be read and watched; None if nothing else can write to it,
            so that single entries may become numbers.
    """
    tables: dict[Any, Table] = {}

    def entry(places: Places) -> Expr:
        kind = tensor.dtype
        if kind not in (torch.bool, *INTEGERS) and not kind.is_floating_point:
            raise Untranslatable(str(kind))
        which = tuple(x if isinstance(x, int) else None for x in places)
        fixed = tuple(slice(None) if x is None else x for x in which)
        read = [x for x in places if not isinstance(x, int)]
        if not read and table is None:
            return scalars.const(tensor[fixed].item(), kind)  # type: ignore[no-any-return]
        if tensor.numel() == 0:
            raise MaskError(f"The mask_mod reads an empty tensor of shape {tuple(tensor.shape)}.")
        if which not in tables:
            if table is not None and len(read) == tensor.dim():
                tables[which] = table
            else:
                origins = () if table is None else (table,)
                tables[which] = Table(tensor[fixed].detach(), origins)
        wide = torch.int64 if kind in INTEGERS else kind
        return scalars.node(wide, "lookup", read, tables[which])  # type: ignore[no-any-return]

    return Array(tensor.shape, tensor.dtype, entry)


Rule = Callable[[Call], "Array | list[Array]"]
