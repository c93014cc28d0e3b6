"""`flexsparse bench`: sparse attention beside dense attention and other sparse kernels."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from flexsparse.benchmark.figure import draw_rows
from flexsparse.benchmark.measure import Row, disagreements, measure
from flexsparse.benchmark.table import bars, table_text, x_text
from flexsparse.benchmark.workloads import PRESETS, Shape, Workload, workloads
from flexsparse.commands.arguments import (
    CommandError,
    check_picture,
    check_writable,
    device_here,
    device_text,
    free_bytes,
    positive,
)
from flexsparse.progress import Progress

COPIES = 12  # of q, k or v that a forward and backward pass may hold at once, all backends' outputs
BUDGET, QUICK_BUDGET = 10.0, 2.0  # seconds


def add_to(commands: Any) -> None:
    """Add this command to those of the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure sparse attention beside dense attention on this machine",
        description="Measure a workload of the published figures on the device that is there: "
        "flexsparse, torch's dense kernels, torch's flex_attention, and FlashAttention where it is "
        "installed.",
    )
    parser.add_argument(
        "--preset",
        choices=[*PRESETS, "all"],
        default="duo",
        help="duo: half of the heads streaming (default); bsa: random blocks at many sparsities; "
        "swa: sliding window; documents: packed; natten: 2-D neighbourhoods; decode, prefill: a "
        "query, a chunk of queries over a cache; efficiency: what part of the ideal is reached",
    )
    parser.add_argument("--quick", action="store_true", help="short lengths, two minutes or less")
    parser.add_argument("--len", type=positive, nargs="+", default=[], help="tokens; several")
    parser.add_argument("--batch", type=positive, help="batch rows (default: 1)")
    parser.add_argument("--heads", type=positive, help="query heads (default: 8; on CUDA 32)")
    parser.add_argument("--kv-heads", type=positive, help="kv heads (default: as many)")
    parser.add_argument("--head-dim", type=positive, help="(default: 64; on CUDA 128)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--save", metavar="FILE.jsonl", help="append the rows, as JSON lines")
    parser.add_argument("--figure", metavar="FILE.png", help="(default: flexsparse-PRESET.png)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and draw the picture; 1 if two backends disagree."""
    device = device_here()
    shape = _shape(args, device)
    presets = PRESETS if args.preset == "all" else (args.preset,)
    if args.figure and len(presets) > 1:
        raise CommandError("--figure is one picture, and --preset all draws one for each preset.")
    reason = _too_large(max(args.len, default=0), shape, device)
    if reason is not None:
        raise CommandError(f"--len {max(args.len):,}: {reason}; make it or --heads smaller.")
    check_writable(args.save)
    check_picture(args.figure)
    found = [
        workload
        for preset in presets
        for workload in workloads(preset, device, shape.n_heads, quick=args.quick, lengths=args.len)
    ]
    heads = f"{shape.n_heads} heads, head_dim {shape.head_dim}, {shape.dtype}"
    print(f"On {device_text(device)}: {heads.replace('torch.', '')}.", flush=True)
    rows, notes = _measure(found, shape, device, args)
    for preset in presets:
        mine = [row for row in rows if row["preset"] == preset]
        if mine:
            print(f"\n{preset}\n{table_text(mine)}\n{_picture(mine, args.figure)}")
    if notes:
        print("\nNot measured:", *_by_reason(notes), sep="\n  ")
    wrong = disagreements(rows)
    if wrong:
        print("\nDO NOT AGREE with flexsparse:", *wrong, sep="\n  ")
    return 1 if wrong else 0


def _shape(args: argparse.Namespace, device: torch.device) -> Shape:
    usual = Shape.usual(device)
    n_heads = args.heads or usual.n_heads
    shape = Shape(
        args.batch or usual.batch,
        n_heads,
        args.kv_heads or n_heads,
        args.head_dim or usual.head_dim,
        getattr(torch, args.dtype) if args.dtype else usual.dtype,
    )
    if n_heads % shape.n_kv_heads:
        raise CommandError(f"--kv-heads {shape.n_kv_heads} must divide --heads {n_heads}.")
    if n_heads < 2 and args.preset in ("duo", "all"):
        raise CommandError("the preset duo has heads of two kinds; give --heads 2 or more.")
    return shape


def _measure(
    found: list[Workload], shape: Shape, device: torch.device, args: argparse.Namespace
) -> tuple[list[Row], dict[str, str]]:
    """The rows of all workloads, saved as they come, and what was not measured and why."""
    rows: list[Row] = []
    notes: dict[str, str] = {}
    budget = QUICK_BUDGET if args.quick else BUDGET
    with Progress("Measuring", len(found)) as progress:
        for workload in found:
            at = x_text({"x": workload.x, "x_axis": workload.x_axis})
            what = f"{workload.preset}, {workload.name}, {at} {workload.x_axis}"
            progress.step(what)
            reason = _too_large(workload.kv_len, shape, device)
            if reason is not None:
                notes[what] = reason
                continue
            result = measure(workload, shape, device, budget=budget)
            rows += result.rows
            notes |= result.missing
            if args.save:
                with open(args.save, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in result.rows)
    return rows, notes


def _by_reason(notes: dict[str, str]) -> list[str]:
    """Who was not measured and why, those of one reason together."""
    who: dict[str, list[str]] = {}
    for name, reason in notes.items():
        who.setdefault(reason, []).append(name)
    return [f"{'; '.join(names)}: {reason}" for reason, names in who.items()]


def _too_large(tokens: int, shape: Shape, device: torch.device) -> str | None:
    """Why so many tokens do not fit, or None."""
    size = shape.batch * shape.n_heads * tokens * shape.head_dim * shape.dtype.itemsize * COPIES
    free = free_bytes(device)
    if size <= free:
        return None
    return f"it takes up to {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _picture(rows: list[Row], path: str | None) -> str:
    """Where the picture was written, or bars where matplotlib is not installed."""
    path = path or f"flexsparse-{rows[0]['preset']}.png"
    try:
        draw_rows(rows).savefig(path)
    except ImportError as error:
        return f"\n{bars(rows)}\n\n{error}"
    return f"Picture: {path}"
