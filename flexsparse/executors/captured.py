"""What a score_mod does besides arithmetic on single numbers, found by calling it once.

What it reads besides its arguments: the backward calls it again and must find it. And what it makes
that is no single number: kernels may not compute that.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flexsparse.tensors import ScoreMod


class Captured(NamedTuple):
    """Tensors that a score_mod uses and did not make: those that receive gradients, and others.

    rows: what it makes of the score, q_idx or kv_idx that has a dimension, such as table[q_idx] of
        a table of two
    """

    with_gradients: list[Tensor]
    others: list[Tensor]
    rows: list[Tensor]


class _Watch(TorchFunctionMode):
    """Collects the tensors that a function uses and did not make itself, and rows that it made."""

    def __init__(self, of_pair: list[Tensor], others: list[Tensor]) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self.rows: list[Tensor] = []
        self._of_pair = {id(x): x for x in of_pair}  # other for each pair of a query and a key
        self._made = self._of_pair | {id(x): x for x in others}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.found |= {key: x for key, x in used.items() if key not in self._made}
        result = func(*args, **(kwargs or {}))
        made = {id(x): x for x in tree_leaves(result) if isinstance(x, Tensor)}
        self._made |= made
        if not used.keys().isdisjoint(self._of_pair):
            self._of_pair |= made
            self.rows += [x for x in made.values() if x.dim()]
        return result


def captured_by(score_mod: ScoreMod, q: Tensor) -> Captured:
    """What score_mod captures, and the rows it makes, found by calling it once."""
    zero = torch.zeros((), dtype=torch.long, device=q.device)
    place = torch.zeros_like(zero)
    score = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    # without a graph, of which activation checkpointing would count the tensors
    with torch.no_grad(), _Watch([score, place], [zero]) as watch:
        score_mod(score, zero, zero, place, place)
    found = watch.found.values()
    # one made in inference_mode counts no writes
    others = [x for x in found if not x.requires_grad and not x.is_inference()]
    return Captured([x for x in found if x.requires_grad], others, watch.rows)


def with_variables_of_now(function: Any, seen: dict[int, Any] | None = None) -> Any:
    """The function with the variables that it reads as they are now, whatever they become.

    A score_mod that is written in a loop over layers reads the loop's variable, which at the
    backward is that of the last layer.
    """
    if not isinstance(function, types.FunctionType):
        return function
    seen = {} if seen is None else seen
    if id(function) not in seen:
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        copy = types.FunctionType(
            function.__code__,
            dict(function.__globals__),
            function.__name__,
            function.__defaults__,
            cells,
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        seen[id(function)] = copy
        for new, old in zip(cells, function.__closure__ or (), strict=True):
            try:
                new.cell_contents = with_variables_of_now(old.cell_contents, seen)
            except ValueError:  # it has no value yet
                continue
    return seen[id(function)]
