"""What print() shows of a compiled mask: what was decided, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexsparse.cost import bytes_text, flops_text, time_text
from flexsparse.executors import flex
from flexsparse.heads import ranges
from flexsparse.text import amount, named_text

if TYPE_CHECKING:
    from flexsparse.compiler import CompiledMask

NAME_WIDTH = 56
HEAD_DIM = 128  # a mask knows neither head_dim nor dtype; costs are shown for these
ELEMENT_SIZE = 2


def text(compiled: CompiledMask) -> str:
    """The report of a compiled mask, a line for each launch."""
    q_block, kv_block = compiled.block_size
    q_len, kv_len = compiled.q_len, compiled.kv_len
    title = (
        f"CompiledMask: {heads_text(compiled)}, {amount(q_len, 'query', 'queries')} x "
        f"{amount(kv_len, 'key')}, blocks of {q_block} x {kv_block}, {compiled.device}"
    )
    rows: list[tuple[str, ...]] = [
        ("heads", "mask", "executor", "blocks", "of them full", "of all blocks", "FLOPs", "bytes")
    ]
    for launch in compiled.launches:
        classes = launch.classes
        of_launch = launch.cost(HEAD_DIM, ELEMENT_SIZE)
        rows.append(
            (
                "all" if compiled.n_heads is None else ranges(launch.heads),
                named_text(launch.mask, NAME_WIDTH),
                launch.usual_executor,
                f"{of_launch.blocks:,}",
                f"{classes.full.blocks * of_launch.blocks // max(classes.blocks, 1):,}",
                f"{classes.density:.2%}",
                flops_text(of_launch.flops),
                bytes_text(of_launch.bytes),
            )
        )
    evaluated = sum(launch.classes.evaluated for launch in compiled.launches)
    weights = [len(launch.heads) for launch in compiled.launches]
    density = sum(
        w * launch.classes.density for w, launch in zip(weights, compiled.launches, strict=True)
    ) / sum(weights)
    proved = (
        "every block proved by intervals and witnesses"
        if not evaluated
        else f"{amount(evaluated, 'block')} evaluated element by element, the rest proved"
    )
    closing = [
        f"No rule for {', '.join(operators)}: blocks of {named_text(launch.mask, NAME_WIDTH)} "
        "are settled by looking at their elements."
        for launch in compiled.launches
        if (operators := launch.mask.opaque_operators)
    ]
    no_flex = flex.missing(compiled.device)
    if no_flex is not None:
        closing.append(f"Heads run on blockwise that would run on flex: {no_flex}.")
    if compiled.device.type == "cpu" and any(x.usual_executor == "flex" for x in compiled.launches):
        closing.append(
            "Gradients, dropout and return_lse run on blockwise: flex has none of them on CPU."
        )
    of_each = "head" if compiled.n_heads is None else "batch row"
    closing += [
        f"FLOPs and bytes: one forward pass of a {of_each}, head_dim {HEAD_DIM}, 16 bits.",
        f"All heads compute {density:.2%} of the blocks of dense attention.",
        f"Compiled in {time_text(compiled.compile_seconds)}: {proved}.",
    ]
    return "\n".join([title, *table(rows), *closing])


def heads_text(compiled: CompiledMask) -> str:
    """How many heads a compiled mask is for: '32 heads', 'any number of heads'."""
    n_heads = compiled.n_heads
    return "any number of heads" if n_heads is None else amount(n_heads, "head")


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as aligned lines, the first as their header; all but three columns align right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
