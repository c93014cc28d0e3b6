"""A workload on every backend that can run it: one row for each pass and backend.

A row is a dict that JSON can hold:

    preset, workload, pass, x_axis, x        what, and where it is in a picture
    batch, n_heads, n_kv_heads, q_len, kv_len, head_dim, dtype
    backend, kind                            kind is "ours", "dense" or "sparse"
    latency_ms, latency_q25_ms, latency_q75_ms, runs
    mask_cold_ms, mask_warm_ms, mask_bytes   from mask to block lists; null without them
    compile_ms                               the first call beyond a later one
    block_density, element_density           of the mask, as a part of q_len x kv_len
    dense_density                            of the blocks that the dense kernels compute
    tile_tflops, useful_tflops               of the blocks computed; of the elements kept
    peak_bytes                               beyond what is held before the call
    ratio_to_dense                           to the fastest dense kernel of the row's pass
    ideal_ms, ratio_to_ideal                 that kernel's time x block density / dense density
    difference                               from flexsparse's output, the largest; null where the
                                             backend computes other than the mask
    device, threads, torch, triton, flexsparse, python, date
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.benchmark.backends import DENSE, SPARSE, WITHOUT_SKIPPING
from flexsparse.benchmark.case import Attend, Case, Prepared, case
from flexsparse.benchmark.harness import Times, environment, first_call, peak_bytes, take_turns
from flexsparse.benchmark.workloads import BLOCK, Shape, Workload
from flexsparse.drawing.panels import panels
from flexsparse.drawing.planes import Lengths, planes

Row = dict[str, Any]
OURS = "flexsparse"
EXACT = (*SPARSE, "eager")  # they compute the mask, and can be compared
# matrix products: q k' and p v; with the backward pass, five more
FLOPS = {"forward": 4, "forward+backward": 14}
# how far the outputs of two kernels may be apart, of values up to about 4
ALLOWED_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


class Result(NamedTuple):
    """The rows of a workload, and why other backends have none: {backend: reason}."""

    rows: list[Row]
    missing: dict[str, str]


class Measured(NamedTuple):
    """What was measured of one backend in one pass."""

    times: Times
    compile_ms: float
    peak: int | None
    difference: float | None


def measure(workload: Workload, shape: Shape, device: torch.device, *, budget: float) -> Result:
    """Measure a workload; budget is in seconds for the timed calls of each pass."""
    prepared: dict[str, Prepared] = {}
    missing: dict[str, str] = {}
    found = case(workload, shape, device)
    for name, backend in {**SPARSE, **DENSE}.items():
        result = _attempt(partial(backend, found))
        if isinstance(result, str):
            missing[name] = result
        else:
            prepared[name] = result
    rows = []
    for direction in workload.passes:
        measured = _measure(prepared, found, direction, budget, missing)
        rows += _rows(found, direction, prepared, measured)
    return Result(rows, missing)


def _measure(
    prepared: dict[str, Prepared],
    found: Case,
    direction: str,
    budget: float,
    missing: dict[str, str],
) -> dict[str, Measured]:
    """One pass of all backends; those that fail go to `missing`."""
    inputs = _inputs(found, needs_grad=direction != "forward")
    calls: dict[str, Callable[[], Tensor]] = {}
    outs: dict[str, Tensor] = {}
    first: dict[str, float] = {}
    for name, backend in prepared.items():
        call = _call(backend.attend, inputs, direction)
        result = _attempt(partial(first_call, call, found.device))
        if isinstance(result, str):
            missing[f"{name}, {direction}"] = result
        else:
            out, first[name] = result
            calls[name] = call
            if name in EXACT:
                outs[name] = out.detach().float()
    times = take_turns(calls, found.device, budget)
    return {
        name: Measured(
            times[name],
            max(0.0, first[name] - times[name].median),
            peak_bytes(call, found.device),
            float((outs[name] - outs[OURS]).abs().max()) if {name, OURS} <= outs.keys() else None,
        )
        for name, call in calls.items()
    }


def _call(attend: Attend, inputs: list[Tensor], direction: str) -> Callable[[], Tensor]:
    """One run; its result is the output."""
    if direction == "forward":
        return lambda: attend(*inputs)
    weights = torch.randn_like(inputs[0])

    def forward_backward() -> Tensor:
        out = attend(*inputs)
        torch.autograd.grad(out, inputs, weights)
        return out

    return forward_backward


def _inputs(found: Case, needs_grad: bool) -> list[Tensor]:
    shape, workload = found.shape, found.workload
    generator = torch.Generator(found.device).manual_seed(0)
    sizes = (
        (shape.n_heads, workload.q_len),
        (shape.n_kv_heads, workload.kv_len),
        (shape.n_kv_heads, workload.kv_len),
    )
    return [
        torch.randn(
            shape.batch,
            *size,
            shape.head_dim,
            generator=generator,
            device=found.device,
            dtype=shape.dtype,
        ).requires_grad_(needs_grad)
        for size in sizes
    ]


def _attempt(make: Callable[[], Any]) -> Any:
    """What it makes, or the first line of its error: a backend that fails is not measured."""
    try:
        return make()
    except Exception as error:  # other libraries raise what they like
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _rows(
    found: Case, direction: str, prepared: dict[str, Prepared], measured: dict[str, Measured]
) -> list[Row]:
    workload, shape = found.workload, found.shape
    blocks, elements = densities(found)
    n = -(-workload.kv_len // BLOCK)
    dense_density = (n + 1) / (2 * n) if workload.is_causal else 1.0
    pairs = shape.batch * shape.n_heads * workload.q_len * workload.kv_len
    flops = FLOPS[direction] * shape.head_dim * pairs
    rows = []
    for name, one in measured.items():
        build = prepared[name].build
        tiles = 1.0 if name in WITHOUT_SKIPPING else dense_density if name in DENSE else blocks
        rows.append(
            {
                "preset": workload.preset,
                "workload": workload.name,
                "pass": direction,
                "x_axis": workload.x_axis,
                "x": workload.x,
                **shape._asdict(),
                "dtype": str(shape.dtype).removeprefix("torch."),
                "q_len": workload.q_len,
                "kv_len": workload.kv_len,
                "backend": name,
                "kind": "dense" if name in DENSE else "ours" if name == OURS else "sparse",
                "latency_ms": one.times.median,
                "latency_q25_ms": one.times.q25,
                "latency_q75_ms": one.times.q75,
                "runs": one.times.runs,
                "mask_cold_ms": build and build.cold_ms,
                "mask_warm_ms": build and build.warm_ms,
                "mask_bytes": build and build.bytes,
                "compile_ms": one.compile_ms,
                "block_density": blocks,
                "element_density": elements,
                "dense_density": dense_density,
                "tile_tflops": flops * tiles / one.times.median / 1e9,
                "useful_tflops": elements and flops * elements / one.times.median / 1e9,
                "peak_bytes": one.peak,
                "difference": one.difference,
            }
        )
    environs = environment(found.device)
    return [row | ratios(row, rows) | environs for row in rows]


def ratios(row: Row, rows: list[Row]) -> Row:
    """A row's latency beside the fastest dense kernel among rows, and beside the ideal.

    The ideal takes as much of that kernel's time as the mask has of the blocks it computes.
    """
    dense = min((r["latency_ms"] for r in rows if r["kind"] == "dense"), default=None)
    if dense is None:
        return {"ratio_to_dense": None, "ideal_ms": None, "ratio_to_ideal": None}
    ideal = dense * row["block_density"] / row["dense_density"]
    return {
        "ratio_to_dense": row["latency_ms"] / dense,
        "ideal_ms": ideal,
        "ratio_to_ideal": row["latency_ms"] / ideal,
    }


def densities(found: Case) -> tuple[float, float | None]:
    """The blocks computed and the elements kept, as parts of all, over all heads."""
    shown = panels(planes("bench", found.attend, Lengths()), most_pools=1)
    blocks = shown.weighted([panel.block_density for panel in shown.shown])
    assert blocks is not None
    return blocks, shown.weighted([panel.element_density for panel in shown.shown])


def disagreements(rows: list[Row]) -> list[str]:
    """The rows whose output is not that of flexsparse, in words."""
    return [
        f"{row['workload']}, {row['x']} {row['x_axis']}, {row['backend']}: {row['difference']:.1e}"
        for row in rows
        # a NaN is not within the limit either
        if row["difference"] is not None
        and not row["difference"] <= ALLOWED_DIFFERENCE[row["dtype"]]
    ]
