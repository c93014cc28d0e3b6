"""What a picture of a mask costs: time, and memory above what was there before.

    python benchmarks/bench_draw.py       # writes benchmarks/results/draw.json

Each case runs in a process of its own, which has imported everything and drawn a small mask before.
`wall` and `cpu` are seconds of the first drawing of the case, PNG included. `raw` is what the grid
of blocks itself would cost: matplotlib's imshow of 8,192 x 8,192 cells.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexsparse import PerHead, compile_mask, per_head
from flexsparse.drawing import draw, html
from flexsparse.drawing.paper import Sheet
from flexsparse.masks import causal, dilated, same_document, sink, window

MILLION = 1 << 20
STREAMING = causal & (sink(64) | window(256))


def four_kinds() -> PerHead:
    documents = causal & same_document(torch.arange(MILLION) // 5000)
    kinds = (causal, STREAMING, documents, causal & dilated(512, 3))
    return per_head([kind for kind in kinds for _ in range(8)])


def all_different() -> PerHead:
    return per_head([causal & (sink(64) | window(256 * i)) for i in range(1, 33)])


def png(figure: Any) -> None:
    figure.savefig(io.BytesIO(), format="png")


def raw() -> None:
    sheet = Sheet(6, 6)
    sheet.image(torch.ones(8192, 8192).tril(), 0.5, 0.5, 5, 5)
    png(sheet.figure)


# what is prepared, and what is measured on it
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "streaming, 8K": (lambda: STREAMING, lambda m: png(draw(m, 8192))),
    "streaming, 1M": (lambda: STREAMING, lambda m: png(draw(m, MILLION))),
    "causal, 1M": (lambda: causal, lambda m: png(draw(m, MILLION))),
    "32 heads of 4 kinds, 1M": (four_kinds, lambda m: png(draw(m, MILLION))),
    "32 different heads, 1M": (all_different, lambda m: png(draw(m, MILLION))),
    "32 different heads, 1M, compiled": (
        lambda: compile_mask(all_different(), MILLION, MILLION, device="cpu"),
        lambda m: png(draw(m)),
    ),
    "32 different heads, 1M, compiled, html": (
        lambda: compile_mask(all_different(), MILLION, MILLION, device="cpu"),
        html,
    ),
    "raw": (lambda: None, lambda _: raw()),
}


def kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1])


def measure(name: str) -> dict[str, Any]:
    prepare, run = CASES[name]
    png(draw(causal, 256))
    prepared = prepare()
    # the highest mark is set back to what is there now
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    result = run(prepared)
    row: dict[str, Any] = {
        "case": name,
        "wall": round(time.perf_counter() - wall, 3),
        "cpu": round(time.process_time() - cpu, 3),
        "mb": round((kilobytes("VmHWM") - before) / 1000, 1),
    }
    return {**row, "bytes": len(result)} if isinstance(result, str) else row


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = []
    for name in CASES:
        command = [sys.executable, __file__, name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(f"{name:40}", *(f"{key} {rows[-1][key]}" for key in ("wall", "cpu", "mb")), sep="  ")
    report = {
        "benchmark": "draw",
        "command": "python benchmarks/bench_draw.py",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "rows": rows,
    }
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "draw.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
