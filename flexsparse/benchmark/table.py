"""Rows as text: a table, bars, and from where on sparse attention is faster than dense."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexsparse.benchmark.measure import OURS, Row
from flexsparse.drawing.words import tokens
from flexsparse.report import NAME_WIDTH, table
from flexsparse.text import shorten

BARS = 40  # characters of the longest


def table_text(rows: Sequence[Row]) -> str:
    """All rows, what making the block lists took, and where sparse is faster than dense."""
    lines: list[tuple[str, ...]] = [
        (
            rows[0]["x_axis"],
            "pass",
            "backend",
            "median ms",
            "quartiles",
            "time/dense",
            "time/ideal",
            "TFLOP/s",
            "useful",
            "peak MB",
        )
    ]
    for workload, group in by_workload(rows):
        lines.append((workload, *[""] * 9))
        for row in group:
            lines.append(
                (
                    x_text(row),
                    row["pass"],
                    row["backend"],
                    number(row["latency_ms"]),
                    f"{number(row['latency_q25_ms'])}-{number(row['latency_q75_ms'])}",
                    number(row["ratio_to_dense"]),
                    number(row["ratio_to_ideal"]),
                    number(row["tile_tflops"]),
                    number(row["useful_tflops"]),
                    "" if row["peak_bytes"] is None else number(row["peak_bytes"] / 1e6),
                )
            )
    return "\n".join([*_table(lines), "", *mask_lines(rows), *break_even_lines(rows)])


def _table(lines: list[tuple[str, ...]]) -> list[str]:
    """Aligned lines; the name of a workload has a line to itself and widens no column."""
    names = {i: line[0] for i, line in enumerate(lines) if not any(line[1:])}
    cells = [line for i, line in enumerate(lines) if i not in names]
    aligned = iter(table(cells))
    return [names[i] if i in names else next(aligned) for i in range(len(lines))]


def mask_lines(rows: Sequence[Row]) -> list[str]:
    """What making block lists and kernels took at the largest x of each workload, as a table."""
    lines: list[tuple[str, ...]] = [
        ("", "mask to blocks", "backend", "first ms", "later ms", "bytes", "first call, extra ms")
    ]
    for workload, group in by_workload(rows):
        largest = max(row["x"] for row in group)
        for row in group:
            if (row["x"], row["pass"]) == (largest, group[0]["pass"]) and row["mask_bytes"]:
                lines.append(
                    (
                        x_text(row),
                        shorten(workload, NAME_WIDTH),
                        row["backend"],
                        number(row["mask_cold_ms"]),
                        number(row["mask_warm_ms"]),
                        f"{row['mask_bytes']:,}",
                        number(row["compile_ms"]),
                    )
                )
    return [*table(lines), ""] if len(lines) > 1 else []


def break_even_lines(rows: Sequence[Row]) -> list[str]:
    """From where on flexsparse is faster than the fastest dense kernel, for each workload."""
    found = []
    for workload, group in by_workload(rows):
        for direction in dict.fromkeys(row["pass"] for row in group):
            ours = [row for row in group if row["backend"] == OURS and row["pass"] == direction]
            points = [(row["x"], row["ratio_to_dense"]) for row in ours if row["ratio_to_dense"]]
            if len(points) > 1:
                found.append(f"{workload}, {direction}: {break_even_text(points, ours[0])}")
    return found


def break_even_text(points: Sequence[tuple[float, float]], row: Row) -> str:
    """Where a ratio to dense time falls below 1, in words."""
    at = break_even(points)
    if at is None:
        always = max(ratio for _, ratio in points) <= 1
        return "faster than dense everywhere" if always else "slower than dense at the largest"
    where = f"{at:.0%} sparsity" if row["x_axis"] == "sparsity" else f"{at:,.0f} {row['x_axis']}"
    return f"faster than dense from {where} on"


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The x from which on the ratios of (x, ratio) stay below 1, or None if there is none.

    Between two points the logarithm of the ratio is taken as a straight line: over the logarithm of
    x where all x are above 1 (lengths), else over x (sparsities).
    """
    points = sorted(points)
    is_length = points[0][0] > 1
    last_above = max((i for i, (_, ratio) in enumerate(points) if ratio > 1), default=None)
    if last_above is None or last_above == len(points) - 1:
        return None
    (x0, r0), (x1, r1) = points[last_above], points[last_above + 1]
    part = math.log(r0) / (math.log(r0) - math.log(r1))
    return x0 * (x1 / x0) ** part if is_length else x0 + (x1 - x0) * part


def bars(rows: Sequence[Row]) -> str:
    """The latencies of the largest x as bars in characters, a group for each workload and pass."""
    lines = []
    for workload, group in by_workload(rows):
        for direction in dict.fromkeys(row["pass"] for row in group):
            ran = [row for row in group if row["pass"] == direction]
            largest = max(row["x"] for row in ran)
            ran = [row for row in ran if row["x"] == largest]
            longest = max(row["latency_ms"] for row in ran)
            lines.append(f"{workload}, {direction}, {x_text(ran[0])} {ran[0]['x_axis']}")
            for row in sorted(ran, key=lambda row: row["latency_ms"]):
                bar = "#" * max(1, round(BARS * row["latency_ms"] / longest))
                lines.append(f"  {row['backend']:24}{bar} {number(row['latency_ms'])} ms")
    return "\n".join(lines)


def by_workload(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each workload's name, in the order of their first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["workload"], []).append(row)
    return list(groups.items())


def x_text(row: Row) -> str:
    """The x of a row: '16K' or '90 %'."""
    return f"{row['x']:.0%}" if row["x_axis"] == "sparsity" else tokens(row["x"])


def number(x: float | None) -> str:
    """A number with three digits, or nothing."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
