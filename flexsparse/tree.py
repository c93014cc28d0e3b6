"""The nodes of expressions, whatever they are of: compared, hashed, pickled and read as lists.

`Expr.steps` flattens a tree to a list in which each distinct sub-expression stands once; equality,
hashing, pickling and every reading (tensors, intervals, text, lowered code) walk lists, so none of
them recurses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from flexsparse.tensors import TENSOR_READING, Opaque, Table
from flexsparse.walks import postorder

VARIABLES = ("b", "h", "q_idx", "kv_idx")

Value = TypeVar("Value")


class KeptProperty(Generic[Value]):
    """functools.cached_property without the lock it has in Python 3.11.

    torch.compile traces a mask_mod, and no lock.
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self.function = function
        self.name = function.__name__
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Value:
        if instance is None:
            return self  # type: ignore[return-value]  # of the class, as property does
        value = self.function(instance)
        # found there from now on, before this is asked
        instance.__dict__[self.name] = value
        return value


class Step(NamedTuple):
    """One distinct sub-expression: an operator over the results of earlier steps."""

    op: str
    operands: tuple[int, ...]
    payload: Any
    is_mask: bool


@dataclass(frozen=True, eq=False, repr=False)
class Expr:
    """A node: an operator, its operands, and a constant or table for the leaves that carry one."""

    op: str
    args: tuple[Expr, ...] = ()
    payload: Any = None
    label: str | None = None
    is_mask: ClassVar[bool] = False

    @KeptProperty
    def steps(self) -> tuple[Step, ...]:
        """The expression as a list of distinct steps, operands first, the whole of it last."""
        slots: dict[int, int] = {}
        numbered: dict[Step, int] = {}
        for node in postorder(self):
            operands = tuple(slots[id(arg)] for arg in node.args)
            step = Step(node.op, operands, node.payload, node.is_mask)
            slots[id(node)] = numbered.setdefault(step, len(numbered))
        return tuple(numbered)

    @KeptProperty
    def spent(self) -> tuple[tuple[int, ...], ...]:
        """For each step, the steps whose results no later one reads."""
        last_reader = {i: place for place, step in enumerate(self.steps) for i in step.operands}
        spent: list[list[int]] = [[] for _ in self.steps]
        for i, place in last_reader.items():
            spent[place].append(i)
        return tuple(map(tuple, spent))

    @KeptProperty
    def _hash(self) -> int:
        return hash(self.steps)

    @property
    def variables(self) -> frozenset[str]:
        """Which of b, h, q_idx and kv_idx the expression reads."""
        return frozenset(step.op for step in self.steps if step.op in VARIABLES)

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tensors the expression reads."""
        payloads = [step.payload for step in self.steps]
        read = [[x] if isinstance(x, Table) else x.tables for x in payloads if _reads(x)]
        return tuple(table for tables in read for table in tables)

    @property
    def device(self) -> torch.device | None:
        """Where the tensors are that the expression reads; None if it reads none."""
        return next((table.tensor.device for table in self.tables), None)

    @property
    def opaque_operators(self) -> tuple[str, ...]:
        """The operators that the analysis has no rule for: exact all the same, only slower."""
        payloads = [step.payload for step in self.steps]
        return tuple(dict.fromkeys(x.name for x in payloads if isinstance(x, Opaque)))

    def over(self, args: tuple[Expr, ...]) -> Expr:
        """The same operator over other operands; it has no label, which would name what it was."""
        if all(new is old for new, old in zip(args, self.args, strict=True)):
            return self
        return type(self)(self.op, args, self.payload)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expr):
            return NotImplemented
        return self._hash == other._hash and self.steps == other.steps

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # flat, because pickle and copy recurse; without the hash, which each process has its own of
        places: dict[int, int] = {}
        nodes = []
        for node in postorder(self):
            places[id(node)] = len(places)
            operands = tuple(places[id(arg)] for arg in node.args)
            nodes.append((type(node), node.op, operands, node.payload, node.label))
        return _from_nodes, (nodes,)

    def __str__(self) -> str:
        from flexsparse.text import formula

        return formula(self)

    def __repr__(self) -> str:
        return str(self)


def _reads(payload: Any) -> bool:
    return isinstance(payload, (Table, Opaque))


def _from_nodes(nodes: Sequence[tuple[type[Expr], str, tuple[int, ...], Any, str | None]]) -> Expr:
    """The expression that `Expr.__reduce__` took apart."""
    built: list[Expr] = []
    for kind, op, operands, payload, label in nodes:
        built.append(kind(op, tuple(built[i] for i in operands), payload, label))
    return built[-1]


def evaluate(
    expr: Expr, variables: Mapping[str, Value], reading: Mapping[str, Callable[..., Value]]
) -> Value:
    """Read an expression: `reading` says what operators mean, `variables` what b, h, ... are."""
    values: dict[int, Value] = {}
    for place, (op, operands, payload, _) in enumerate(expr.steps):
        if op in VARIABLES:
            values[place] = variables[op]
        elif payload is None:
            values[place] = reading[op](*[values[i] for i in operands])
        else:
            values[place] = reading[op](payload, *[values[i] for i in operands])
        # thousands of results would not fit in memory at once
        for i in expr.spent[place]:
            del values[i]
    return values[len(expr.steps) - 1]


def kept_at(mask: Expr, places: Mapping[str, Tensor]) -> Tensor:
    """Which places of b, h, q_idx and kv_idx a mask keeps, exactly: computed where its tables are.

    Places and result are on the CPU.
    """
    device = mask.device or torch.device("cpu")
    there = {name: place.to(device) for name, place in places.items()}
    return torch.as_tensor(evaluate(mask, there, TENSOR_READING)).cpu()
