"""Rows as a picture: latency, and run time beside the fastest dense kernel with the ideal line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexsparse.benchmark.measure import OURS, Row
from flexsparse.benchmark.table import break_even, by_workload, x_text
from flexsparse.drawing.paper import INK, LINE, QUIET, Sheet, wrapped

PLOT_WIDTH, PLOT_HEIGHT = 3.6, 2.5  # inches
LEFT, TOP, GAP_X, GAP_Y, RIGHT, BOTTOM = 0.75, 0.75, 0.85, 0.85, 2.0, 0.65
# of backends, in the order of their first row: ours first, and colours that differ in grey too
COLOURS = ("#cc5a0a", "#182c60", "#6f9fd8", "#7a5c9e", "#3f7f5f", "#b0a040", "#9a9a9a", "#d08090")
MARKERS = "os^vDPX*"
MS, RATIO = "ms", "time / fastest dense"


def draw_rows(rows: Sequence[Row]) -> Any:
    """A matplotlib Figure of the rows of one preset.

    A line of panels for each workload and pass: on the left latency, on the right latency over that
    of the fastest dense kernel. The dashed line there is the ideal, dense time x blocks computed;
    a vertical line marks from where on flexsparse is faster than dense.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups = [
        (workload, direction, [row for row in group if row["pass"] == direction])
        for workload, group in by_workload(rows)
        for direction in dict.fromkeys(row["pass"] for row in group)
    ]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    width = LEFT + 2 * PLOT_WIDTH + GAP_X + RIGHT
    height = TOP + len(groups) * (PLOT_HEIGHT + GAP_Y) - GAP_Y + BOTTOM
    sheet = Sheet(width, height)
    sheet.text(0.2, 0.15, _title(rows[0]), size=9)
    for line, (workload, direction, group) in enumerate(groups):
        y = TOP + line * (PLOT_HEIGHT + GAP_Y)
        name = wrapped(f"{workload}: {direction}", 2 * PLOT_WIDTH, 8, 1)
        sheet.text(LEFT, y - 0.25, name, color=QUIET)
        left = _axes(sheet, LEFT, y, MS, group)
        right = _axes(sheet, LEFT + PLOT_WIDTH + GAP_X, y, RATIO, group)
        for backend in backends:
            ran = sorted((r for r in group if r["backend"] == backend), key=lambda r: r["x"])
            if ran:
                _lines(left, right, ran, backends.index(backend))
        _ideal(right, group)
        if line == 0:
            left.legend(
                *left.get_legend_handles_labels(),
                loc="upper left",
                bbox_to_anchor=(2 + (GAP_X + 0.15) / PLOT_WIDTH, 1.02),
                fontsize=7,
                frameon=False,
                labelcolor=INK,
            )
    return sheet.figure


def _title(row: Row) -> str:
    threads = f", {row['threads']} threads" if row["threads"] else ""
    heads = f"{row['n_heads']} heads"
    if row["n_kv_heads"] != row["n_heads"]:
        heads += f" ({row['n_kv_heads']} kv)"
    return (
        f"{row['preset']}: {row['device']}{threads}, torch {row['torch']}, batch {row['batch']}, "
        f"{heads}, D {row['head_dim']}, {row['dtype']}, {row['date']}"
    )


def _axes(sheet: Sheet, x: float, y: float, label: str, rows: Sequence[Row]) -> Any:
    axes = sheet.plot(x, y, PLOT_WIDTH, PLOT_HEIGHT)
    is_length = rows[0]["x_axis"] != "sparsity"
    if is_length:
        axes.set_xscale("log", base=2)
    if is_length or label == MS:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_ticks())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        # so that the ideal is a straight line; slow kernels may leave the picture
        shown = [row["ratio_to_dense"] or 0 for row in rows if row["kind"] != "dense"]
        axes.set_ylim(0, 1.1 * max(1, *shown))
    ticks = {row["x"]: x_text(row) for row in rows}
    if not is_length and len(ticks) > 6:
        ticks = {x: text for x, text in ticks.items() if round(x * 10) % 2 == 0}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.grid(color=LINE, linewidth=0.4, alpha=0.6)
    axes.set_xlabel(rows[0]["x_axis"], size=8, color=QUIET)
    axes.set_ylabel(label, size=8, color=QUIET)
    return axes


def _ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))


def _lines(left: Any, right: Any, rows: Sequence[Row], place: int) -> None:
    """One backend: its medians with their quartiles, and its ratios to dense."""
    x = [row["x"] for row in rows]
    style = {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.8 if rows[0]["backend"] == OURS else 1.0,
    }
    left.plot(x, [row["latency_ms"] for row in rows], label=rows[0]["backend"], **style)
    left.fill_between(
        x,
        [row["latency_q25_ms"] for row in rows],
        [row["latency_q75_ms"] for row in rows],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )
    known = [row for row in rows if row["ratio_to_dense"] is not None]
    right.plot([row["x"] for row in known], [row["ratio_to_dense"] for row in known], **style)


def _ideal(axes: Any, rows: Sequence[Row]) -> None:
    """The ideal line, and where flexsparse breaks even."""
    ours = sorted((r for r in rows if r["backend"] == OURS), key=lambda r: r["x"])
    ours = [row for row in ours if row["ratio_to_dense"] is not None]
    if not ours:
        return
    ideal = [row["block_density"] / row["dense_density"] for row in ours]
    axes.plot([row["x"] for row in ours], ideal, "--", color=QUIET, linewidth=1)
    axes.annotate("ideal", (ours[-1]["x"], ideal[-1]), size=7, color=QUIET, ha="right", va="top")
    at = break_even([(row["x"], row["ratio_to_dense"]) for row in ours])
    if at is not None:
        axes.axvline(at, color=COLOURS[0], linewidth=0.7, linestyle=":")
        where = f"{at:.0%}" if ours[0]["x_axis"] == "sparsity" else f"{at:,.0f}"
        axes.annotate(
            f"break-even {where}",
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            size=7,
            color=COLOURS[0],
            ha="center",
            va="bottom",
        )
