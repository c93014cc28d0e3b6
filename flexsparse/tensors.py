"""What expressions mean on tensors: the exact reading, and the tables and functions it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flexsparse.errors import MaskError

# FlexAttention's functions: of (b, h, q_idx, kv_idx), and of (score, b, h, q_idx, kv_idx)
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

CASTS = ("narrow", "float", "truncate")  # operators whose payload is a dtype
# what a table may hold; torch has next to no operators for unsigned integers of more bits
READABLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Table:
    """A tensor read by `lookup`: compared by content, and watched for in-place changes.

    Args:
        tensor: what is read; kept, not copied, unless it counts no writes (see `counting_writes`).
        origins: the tensors it was computed from, watched with it and with theirs.
    """

    def __init__(self, tensor: Tensor, origins: tuple[Table, ...] = ()) -> None:
        self.tensor = counting_writes(tensor)
        # flat, and each once: a loop computes tensors from tensors that are computed
        reached = (x for origin in origins for x in (*origin.origins, origin))
        self.origins: tuple[Table, ...] = tuple({id(x): x for x in reached}.values())
        self._version = self._current_version()

    def __reduce__(self) -> tuple[Any, ...]:
        if self.stale:
            raise MaskError(self.stale)
        # the count of writes starts anew in a loaded tensor; origins know all of theirs already
        return Table, (self.tensor, tuple(Table(x.tensor) for x in self.origins))

    def _current_version(self) -> int:
        return self.tensor._version

    @property
    def changed(self) -> bool:
        """Whether the tensor was written to after the expression was made."""
        return any(x._current_version() != x._version for x in (self, *self.origins))

    @property
    def stale(self) -> str | None:
        """That the table no longer is what the mask was made from, and the fix; None if it is."""
        if not self.changed:
            return None
        return (
            f"The table {self!r} was written to after the mask was made from it. Make the mask "
            "again from the new values, or from a clone."
        )

    @property
    def without_values(self) -> str | None:
        """That the table is on meta, and the fix; None if it has values."""
        if not self.tensor.is_meta:
            return None
        return (
            f"The table {self!r} is on meta, where tensors have no values. Make the mask of one "
            "that has some, and compile it for the device of that table."
        )

    @property
    def is_copy(self) -> bool:
        """Whether it was computed from other tensors, and so will not follow them."""
        memory = self.tensor.untyped_storage().data_ptr()
        return any(x.tensor.untyped_storage().data_ptr() != memory for x in self.origins)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Table):
            return NotImplemented
        a, b = self.tensor, other.tensor
        if a is b:
            return True
        alike = a.dtype == b.dtype and a.shape == b.shape and a.device == b.device
        return alike and torch.equal(a, b)

    def __hash__(self) -> int:
        return hash((self.tensor.dtype, self.tensor.shape))

    def __repr__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        if not self.tensor.dim() and not self.tensor.is_meta:
            return f"{dtype}({self.tensor.item()})"
        return f"{dtype}[{', '.join(map(str, self.tensor.shape))}]"


def counting_writes(tensor: Tensor) -> Tensor:
    """The tensor; or, of one made in inference_mode, which counts no writes, a copy that does."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


class Number(NamedTuple):
    """A floating-point constant of a dtype."""

    value: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Opaque:
    """An operator the analysis has no rule for: exact when called, unknown to intervals.

    name: of the operator, 'aten.sin'
    dtype: of the result
    key: what it computes, so that equal functions are equal
    tables: the tensors it reads
    is_elementwise: whether kernels can compile it: not a sum, a sort or the like
    call: the function, of tensors that broadcast
    """

    name: str
    dtype: torch.dtype
    key: Any
    tables: tuple[Table, ...]
    is_elementwise: bool
    call: Callable[..., Tensor] = field(compare=False)

    def __reduce__(self) -> NoReturn:
        raise MaskError(
            f"A mask with {self.name}, which flexsparse has no rule for, cannot be pickled. Pickle "
            "the mask_mod function, and call from_mask_mod where it is loaded."
        )


def _lookup(table: Table, *indices: Any) -> Tensor:
    places = tuple(torch.as_tensor(i, device=table.tensor.device) for i in indices)
    entries = table.tensor[places] if places else table.tensor
    # arithmetic on narrow integers would wrap round
    narrow = entries.dtype != torch.bool and not entries.is_floating_point()
    return entries.long() if narrow else entries


def _extremum(
    tensor_op: Callable[..., Tensor], number_op: Callable[..., Any]
) -> Callable[..., Any]:
    def apply(a: Any, b: Any) -> Any:
        tensors = [x for x in (a, b) if isinstance(x, Tensor)]
        if not tensors:
            return number_op(a, b)
        a, b = (torch.as_tensor(x, device=tensors[0].device) for x in (a, b))
        return tensor_op(a, b)

    return apply


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def _cast(dtype: torch.dtype, x: Any) -> Tensor:
    # a number goes with tensors of any device, if it is on the CPU
    return (x if isinstance(x, Tensor) else torch.tensor(x, device="cpu")).to(dtype)


def _through_integers(dtype: torch.dtype, x: Any) -> Tensor:
    return _cast(dtype, x).long()


def _opaque(payload: Opaque, *operands: Any) -> Tensor:
    result = payload.call(*operands)
    narrow = result.dtype != torch.bool and not result.is_floating_point()
    return result.long() if narrow else result


# what the operators mean on tensors (and on plain numbers): the exact reading
TENSOR_READING: dict[str, Callable[..., Any]] = {
    "const": lambda value: value,
    "lookup": _lookup,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "abs": abs,
    "minimum": _extremum(torch.minimum, min),
    "maximum": _extremum(torch.maximum, max),
    "where": _where,
    "bit_and": lambda a, b: a & b,
    "bit_or": lambda a, b: a | b,
    "bit_xor": lambda a, b: a ^ b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "~": lambda a: (not a) if isinstance(a, bool) else ~a,
    # what only traced mask_mods hold: fixed-width integers, floats, and operators without a rule
    "narrow": _through_integers,
    "number": lambda number: torch.tensor(number.value, dtype=number.dtype, device="cpu"),
    "float": _cast,
    "truncate": _through_integers,
    "/": lambda a, b: a / b,
    "sqrt": torch.sqrt,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "opaque": _opaque,
}
