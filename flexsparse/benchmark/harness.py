"""Time and memory of calls: medians and quartiles, and calls that are compared take turns."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

FEWEST, MOST = 5, 50  # turns
SHORTEST_TURN = 2e-3  # seconds; a shorter call is repeated inside its turn

Result = TypeVar("Result")


class Times(NamedTuple):
    """Milliseconds of a call over its runs: the median and the quartiles."""

    median: float
    q25: float
    q75: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """The times of single calls, in seconds."""
        ms = [x * 1e3 for x in seconds]
        if len(ms) == 1:
            return cls(ms[0], ms[0], ms[0], 1)
        q25, median, q75 = statistics.quantiles(ms, n=4, method="inclusive")
        return cls(median, q25, q75, len(ms))


def take_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, budget: float
) -> dict[str, Times]:
    """The times of each call, which must have run before.

    On CPU the calls take turns, so that other work on the machine slows all of them alike. On CUDA
    each is timed by triton's do_bench, which empties the L2 cache before each run.

    Args:
        calls: what is timed, by name.
        device: where they run.
        budget: seconds for all of them together; at least 5 turns are taken in any case.
    """
    if device.type == "cuda":
        return {name: _on_cuda(call, budget / len(calls)) for name, call in calls.items()}
    repeats = {name: _repeats(call) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    collects = gc.isenabled()
    gc.disable()
    try:
        for turn in range(MOST):
            if turn >= FEWEST and time.perf_counter() - started > budget:
                break
            for name, call in calls.items():
                taken[name].append(_seconds(call, repeats[name]))
    finally:
        if collects:
            gc.enable()
    return {name: Times.of(seconds) for name, seconds in taken.items()}


def _on_cuda(call: Callable[[], object], budget: float) -> Times:
    from triton.testing import do_bench

    runs = do_bench(call, warmup=25, rep=max(100, budget * 1e3), return_mode="all")
    return Times.of([ms / 1e3 for ms in runs])


def _repeats(call: Callable[[], object]) -> int:
    return max(1, round(SHORTEST_TURN / max(_seconds(call, 1), 1e-7)))


def _seconds(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def first_call(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call returns, and its milliseconds to the end of its work on the device."""
    _synchronize(device)
    started = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, (time.perf_counter() - started) * 1e3


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a call takes beyond what is held before it, or None if it is unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # what earlier calls have freed goes back, and the highest mark is set to what is there now
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None  # not Linux, or not allowed


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device) -> dict[str, Any]:
    """What was measured on: the device, the versions and the date."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flexsparse": _version("flexsparse"),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """The model of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "a CPU")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
