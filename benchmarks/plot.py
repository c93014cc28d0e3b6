"""The pictures of measured rows: one for each preset (and head_dim) of a file of JSON lines.

    python benchmarks/plot.py benchmarks/results/attention_cpu.jsonl [--out FOLDER]

They are written beside the rows unless --out says otherwise: attention_cpu_duo.png and so on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexsparse.benchmark.figure import draw_rows
from flexsparse.benchmark.table import table_text

Row = dict[str, Any]


def read(lines: Iterable[str]) -> list[Row]:
    return [json.loads(line) for line in lines]


def draw(path: Path, folder: Path) -> list[Path]:
    """Write the pictures of a file of rows, and print its tables."""
    groups: dict[str, list[Row]] = {}
    for row in read(path.read_text().splitlines()):
        # only efficiency is measured at several head_dims
        suffix = f"_d{row['head_dim']}" if row["preset"] == "efficiency" else ""
        groups.setdefault(row["preset"] + suffix, []).append(row)
    written = []
    for name, rows in groups.items():
        print(f"{name}\n{table_text(rows)}\n")
        written.append(folder / f"{path.stem}_{name}.png")
        draw_rows(rows).savefig(written[-1])
        print(f"Picture: {written[-1]}\n")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw(args.rows, args.out or args.rows.parent)


if __name__ == "__main__":
    main()
