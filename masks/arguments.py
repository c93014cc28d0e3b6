"""The arguments that patterns take: checked, each broken rule a MaskError, and read as tables."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse import Index, Mask, MaskError, b, h, lookup, q_idx

MOST_HEADS = 1 << 16  # or layers: each is made by itself
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # of which torch can do next to nothing


def is_int(value: object) -> bool:
    """Whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def at_least(name: str, least: int, /, **values: object) -> None:
    """Refuse what is not an int of `least` or more."""
    for argument, value in values.items():
        if not is_int(value) or value < least:  # type: ignore[operator]
            raise MaskError(
                f"{name}({argument}={value!r}): {argument} must be an int of {least} or more."
                + _conversion(argument, value)
            )


def _conversion(argument: str, value: object) -> str:
    """How to make an int of what holds one: a number of numpy's, a tensor without dimensions."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return ""
    return "" if isinstance(value, int) else f" Write int({argument})."


def counts(name: str, /, **values: object) -> None:
    """Refuse what is not a number of heads or layers: an int of 1 to 65,536."""
    at_least(name, 1, **values)
    for argument, value in values.items():
        if value > MOST_HEADS:  # type: ignore[operator]
            raise MaskError(
                f"{name}({argument}={value!r}): {argument} must be an int of 1 to {MOST_HEADS}."
            )


def booleans(name: str, /, **values: object) -> None:
    """Refuse what is not True or False."""
    for argument, value in values.items():
        if not isinstance(value, bool):
            raise MaskError(f"{name}({argument}={value!r}): {argument} must be True or False.")


def entries(values: Any) -> list[Any]:
    """What a tensor or a sequence holds, as a list; nothing of what is neither."""
    try:
        return list(values.tolist() if isinstance(values, Tensor) else values)
    except TypeError:
        return []


def sizes(name: str, argument: str, value: int | Sequence[int], n_axes: int = 0) -> tuple[int, ...]:
    """A size for each axis, as a tuple of ints of 1 or more; an int stands for all n_axes."""
    axes = tuple(value) if isinstance(value, Sequence) else (value,) * max(n_axes, 1)
    if not axes or not all(is_int(n) and n >= 1 for n in axes):
        raise MaskError(
            f"{name}({argument}={value!r}): {argument} must be an int of 1 or more, or one for "
            "each axis."
        )
    if n_axes and len(axes) != n_axes:
        raise MaskError(
            f"{name}({argument}={value!r}): {argument} has {len(axes)} axes and the tokens have "
            f"{n_axes}; give one number, or one for each axis."
        )
    return axes


def one_of(name: str, argument: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a word that is not in a list."""
    if value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise MaskError(f"{name}({argument}={value!r}): {argument} must be one of {words}.")


def tensor_of(name: str, argument: str, value: Any, kind: str, dims: dict[int, str]) -> None:
    """Refuse what is not a tensor of a kind ('boolean', 'integer') and of an allowed shape.

    Args:
        name: the pattern.
        argument: the name of the tensor.
        value: what was given.
        kind: 'boolean', 'integer', or 'boolean or integer'.
        dims: each number of dimensions allowed, with its shape in words: {1: "[tokens]"}.
    """
    shapes = list(dims.values())
    text = shapes[0] if len(shapes) == 1 else f"{', '.join(shapes[:-1])} or {shapes[-1]}"
    fix = ""
    if isinstance(value, Tensor):
        is_number = value.is_floating_point() or value.is_complex() or value.is_quantized
        found = "number" if is_number else "boolean" if value.dtype == torch.bool else "integer"
        is_dense = value.layout == torch.strided
        is_known = is_dense and value.dtype not in UNSIGNED
        if is_known and found in kind and value.dim() in dims:
            return
        shown = f"{value.dtype} {tuple(value.shape)}" + f" ({value.layout})" * (not is_dense)
        if found in kind and not is_known:
            fix = " Use .long()." if is_dense else " Use .to_dense()."
    else:
        shown = f"{type(value).__name__}: {reprlib.repr(value)}"
        fix = " Make one with torch.as_tensor." if isinstance(value, (list, tuple)) else ""
    article = "an" if kind.startswith("integer") else "a"
    raise MaskError(
        f"{name} got {argument} = {shown}; it must be {article} {kind} tensor {text}.{fix}"
    )


def integers(name: str, argument: str, value: Any, shape: str) -> Tensor:
    """A list of ints as a tensor, and a tensor of integers of one dimension as it is."""
    if isinstance(value, (list, tuple)) and all(is_int(n) and abs(n) < 2**63 for n in value):
        return torch.tensor(value, dtype=torch.int64, device="cpu")  # whatever the default is
    tensor_of(name, argument, value, "integer", {1: shape})
    tensor: Tensor = value
    return tensor


def row_number(name: str, q_offset: int) -> Index:
    """The number of a query's row, where that of row 0 stands at position q_offset."""
    if not is_int(q_offset):
        raise MaskError(f"{name}(q_offset={q_offset!r}): q_offset must be an int.")
    return q_idx - q_offset if q_offset else q_idx


def number(table: Tensor, *indices: Index) -> Index:
    """An entry of an integer table; dimensions before those of the indices as in `_entry`."""
    entry: Index = _entry(table, indices)
    return entry


def flag(table: Tensor, *indices: Index) -> Mask:
    """An entry of a boolean table; dimensions before those of the indices as in `_entry`."""
    entry: Mask = _entry(table, indices)
    return entry


def _entry(table: Tensor, indices: tuple[Index, ...]) -> Any:
    """An entry of a table of heads, or of batch rows and heads, if it has more dimensions.

    Where it has one of them, that stands for all: the mask does not read the head, or batch row.
    """
    more = table.dim() - len(indices)
    indices = ((), (h,), (b, h))[more] + indices
    one = [i for i, x in enumerate(indices) if (x is b or x is h) and table.shape[i] == 1]
    return lookup(table.squeeze(one), *(x for i, x in enumerate(indices) if i not in one))
