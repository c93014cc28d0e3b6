"""Operators without a rule: functions that a mask calls, exact, and unknown to the analysis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flexsparse.tensors import Opaque, Table
from flexsparse.tracing.arrays import Array, Places
from flexsparse.tracing.scalars import FLOATS, HALVES, INTEGERS, Scalars, Untranslatable
from flexsparse.tree import VARIABLES, Expr

ENTRIES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Slot:
    """A tensor of a program, by its number; b, h, q_idx and kv_idx come first."""

    number: int


@dataclass(frozen=True)
class Operand:
    """A tensor that a program or an operator is given, by its number: what a key says of it."""

    number: int


class Step(NamedTuple):
    """One call: an operator, its arguments with Slots for tensors, and the slots of its results."""

    func: Any
    args: Any
    kwargs: Any
    results: tuple[int, ...]


class Program:
    """All calls that a mask_mod makes, in order."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._steps: list[Step] = []
        self._next = 0

    def input(self, tensor: Tensor) -> None:
        """The next argument of the program."""
        self._slots[id(tensor)] = self._next
        self._next += 1

    def alias(self, tensor: Tensor, result: Tensor) -> None:
        """Let a tensor stand for the result of a call from here on."""
        self._slots[id(tensor)] = self._slots[id(result)]

    def call(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        results: list[Tensor],
        watched: Callable[[Tensor], Table | None],
    ) -> None:
        """Add a call; the caller keeps the tensors alive, so that each is known by its id."""

        def slot(tensor: Tensor) -> Slot | Table:
            if id(tensor) in self._slots:
                return Slot(self._slots[id(tensor)])
            return watched(tensor) or Table(tensor)

        args, kwargs = pytree.tree_map_only(Tensor, slot, (args, kwargs))
        for tensor in results:
            self.input(tensor)
        numbers = tuple(self._slots[id(tensor)] for tensor in results)
        self._steps.append(Step(func, args, kwargs, numbers))

    def opaque(self, scalars: Scalars, name: str, tensor: Tensor, places: Places) -> Expr:
        """One entry of a result, as an operator over the indices that runs the program."""
        target = self._slots[id(tensor)]
        steps = self._leading_to(target)
        leaves = [x for step in steps for x in pytree.tree_leaves((step.args, step.kwargs))]
        tables = tuple(dict.fromkeys(x for x in leaves if isinstance(x, Table)))
        entries = max([tensor.numel(), *(table.tensor.numel() for table in tables)])
        slots = {x.number for x in leaves if isinstance(x, Slot)}
        inputs = [i for i in range(len(VARIABLES)) if i in slots]

        def run(*indices: Tensor) -> Tensor:
            values: dict[int, Any] = dict(zip(inputs, indices, strict=True))

            def read(x: Any) -> Any:
                return values[x.number] if isinstance(x, Slot) else getattr(x, "tensor", x)

            for func, args, kwargs, results in steps:
                args, kwargs = pytree.tree_map_only((Slot, Table), read, (args, kwargs))
                out = func(*args, **kwargs)
                made = out if isinstance(out, (tuple, list)) else [out]
                values.update(zip(results, made, strict=True))
            result: Tensor = values[target]
            return result[tuple(places)] if places else result

        def call(*indices: Any) -> Tensor:
            given = _together(indices, [torch.int64] * len(indices))
            if not given[0].dim():
                return run(*given)
            chunk = max(1, ENTRIES_AT_ONCE // entries)
            flat = torch.vmap(run, chunk_size=chunk)(*(x.flatten() for x in given))
            return flat.view(given[0].shape)

        # a Table prints as its shape alone, and the key says which of them stands where
        numbers = {table: Operand(i) for i, table in enumerate(tables)}
        written = pytree.tree_map_only(Table, numbers.__getitem__, tuple(map(tuple, steps)))
        key = (str(written), target, places)
        payload = Opaque(name, tensor.dtype, key, tables, False, call)
        return _node(scalars, payload, [scalars.variable(VARIABLES[i]) for i in inputs])

    def _leading_to(self, target: int) -> list[Step]:
        needed, steps = {target}, []
        for step in reversed(self._steps):
            if needed.intersection(step.results):
                steps.append(step)
                leaves = pytree.tree_leaves((step.args, step.kwargs))
                needed.update(x.number for x in leaves if isinstance(x, Slot))
        return steps[::-1]


def elementwise(
    scalars: Scalars, name: str, func: Any, arguments: Any, dtype: torch.dtype, places: Places
) -> Expr:
    """One entry of an operator that works entry by entry, as an operator over its operands."""
    leaves, spec = pytree.tree_flatten(arguments)
    operands = [x for x in leaves if isinstance(x, Array)]
    dtypes = [x.dtype for x in operands]
    if any(x not in (torch.bool, *INTEGERS, *FLOATS, *HALVES) for x in [*dtypes, dtype]):
        raise Untranslatable(name)
    entries = [x.spread(places) for x in operands]
    template = [None if isinstance(x, Array) else x for x in leaves]
    which = [i for i, x in enumerate(leaves) if isinstance(x, Array)]

    def call(*values: Any) -> Tensor:
        filled = list(template)
        for i, value in zip(which, _together(values, dtypes), strict=True):
            filled[i] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        result: Tensor = func(*args, **kwargs)
        return result

    numbers = iter(range(len(operands)))
    shown = [Operand(next(numbers)) if isinstance(x, Array) else x for x in leaves]
    key = (str(func), str(pytree.tree_unflatten(shown, spec)), tuple(dtypes))
    return _node(scalars, Opaque(name, dtype, key, (), True, call), entries)


def _node(scalars: Scalars, payload: Opaque, operands: list[Expr]) -> Expr:
    wide = torch.int64 if payload.dtype in INTEGERS else payload.dtype
    return scalars.node(wide, "opaque", operands, payload)  # type: ignore[no-any-return]


def _together(values: Any, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Values as tensors of one shape and device, each of the dtype it had in the mask_mod."""
    devices = [x.device for x in values if isinstance(x, Tensor)]
    device = next((x for x in devices if x.type != "cpu"), torch.device("cpu"))
    tensors = [
        torch.as_tensor(x, device=device).to(dtype) for x, dtype in zip(values, dtypes, strict=True)
    ]
    return list(torch.broadcast_tensors(*tensors))  # type: ignore[no-untyped-call]
