"""A workload made ready on a device: its mask compiled, and what that took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.benchmark.harness import first_call
from flexsparse.benchmark.workloads import Shape, Workload
from flexsparse.compiler import CompiledMask, compile_mask
from flexsparse.lower import lower

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
WARM_BUDGET = 0.5  # seconds


class Build(NamedTuple):
    """From mask to block lists: milliseconds of the first and of a later time, and their bytes."""

    cold_ms: float
    warm_ms: float
    bytes: int


class Prepared(NamedTuple):
    """A workload, ready to run; build is None where there are no block lists."""

    attend: Attend
    build: Build | None = None


class Case(NamedTuple):
    """A workload with the sizes and the device at which it is measured."""

    workload: Workload
    shape: Shape
    device: torch.device
    attend: CompiledMask
    build: Build

    @property
    def mask_mod(self) -> Callable[..., Tensor]:
        """The mask of all heads as a function of row numbers, for torch."""
        mask = self.attend.masks.mask(self.device)
        return lower(mask, self.device, self.attend.q_offset)


def case(workload: Workload, shape: Shape, device: torch.device) -> Case:
    """Compile the mask of a workload, and time that."""

    def make() -> CompiledMask:
        return compile_mask(workload.mask, workload.q_len, workload.kv_len, device=device)

    attend, cold, warm = built(make, device)
    lists = [
        launch.block_mask(launch.heads)
        for launch in attend.launches
        if launch.usual_executor in ("gather", "flex", "blockwise")
    ]
    return Case(workload, shape, device, attend, Build(cold, warm, bytes_of(*lists)))


def built(make: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """What it makes, and the milliseconds of the first time and of a later one, the median."""
    result, cold = first_call(make, device)
    warm: list[float] = []
    started = time.perf_counter()
    while not warm or (time.perf_counter() - started < WARM_BUDGET and len(warm) < 50):
        warm.append(first_call(make, device)[1])
    return result, cold, statistics.median(warm)


def bytes_of(*block_masks: BlockMask) -> int:
    """Memory of block lists: their storages, each once."""
    tensors = [x for lists in block_masks for x in lists.as_tuple() if isinstance(x, Tensor)]
    storages = [x.untyped_storage() for x in tensors]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())
