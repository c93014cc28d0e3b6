"""Every preset of `flexsparse bench`, as rows in results/ and as pictures.

    python benchmarks/harness.py               # results/attention_cpu.jsonl, or attention_cuda
    python benchmarks/harness.py --quick       # short lengths, under results/quick/
    python benchmarks/harness.py --presets duo swa

Each preset runs in a process of its own. Rows of an earlier run of a preset are replaced.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from plot import draw, read

from flexsparse.benchmark.workloads import PRESETS

RESULTS = Path(__file__).parent / "results"
BENCH = "import sys; from flexsparse.commands import main; sys.exit(main())"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    folder = RESULTS / "quick" if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = folder / f"attention_{device}.jsonl"
    status = 0
    for preset in args.presets:
        # what part of the ideal is reached is asked of both usual head_dims
        for head_dim in ("64", "128") if preset == "efficiency" else (None,):
            status |= run(preset, head_dim, path, args.quick)
    draw(path, folder)
    return status


def run(preset: str, head_dim: str | None, path: Path, quick: bool) -> int:
    """Measure a preset and put its rows in the place of those that it had."""
    with tempfile.TemporaryDirectory() as room:
        rows, picture = Path(room) / "rows.jsonl", Path(room) / "picture.png"
        command = [sys.executable, "-c", BENCH, "bench", "--preset", preset]
        command += ["--save", str(rows), "--figure", str(picture)]
        command += ["--quick"] if quick else []
        command += ["--head-dim", head_dim] if head_dim else []
        done = subprocess.run(command, check=False)
        measured = rows.read_text().splitlines() if rows.exists() else []
    dims = {row["head_dim"] for row in read(measured)}
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [
        line
        for line, row in zip(lines, read(lines), strict=True)
        if row["preset"] != preset or row["head_dim"] not in dims
    ]
    path.write_text("\n".join([*kept, *measured]) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
