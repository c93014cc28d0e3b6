"""Which tensors receive gradients through a score_mod."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flexsparse.tensors import ScoreMod


class _Watch(TorchFunctionMode):
    """Collects the tensors with gradients that a function uses and did not make itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in self._made:
                self.found[id(x)] = x
        result = func(*args, **(kwargs or {}))
        self._made |= {id(x): x for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


def captured_by(score_mod: ScoreMod, q: Tensor) -> list[Tensor]:
    """The tensors that receive gradients through score_mod, found by calling it once."""
    zero = torch.zeros((), dtype=torch.long, device=q.device)
    score = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    with _Watch() as watch:
        score_mod(score, zero, zero, zero, zero)
    return list(watch.found.values())
