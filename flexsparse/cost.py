"""What a launch costs: blocks, floating-point operations and bytes, from its block classes."""

from __future__ import annotations

from typing import NamedTuple

from flexsparse.analysis.classify import BlockClasses
from flexsparse.text import amount


class Cost(NamedTuple):
    """The forward pass of one batch row; both sums are over heads.

    blocks: blocks computed
    flops: floating-point operations of both matrix products in these blocks
    bytes: q read and out written once, k and v read once for each block of queries that sees them
    """

    blocks: int
    flops: int
    bytes: int

    def __str__(self) -> str:
        return f"{amount(self.blocks, 'block')}, {flops_text(self.flops)}, {bytes_text(self.bytes)}"


def cost(classes: BlockClasses, n_heads: int, head_dim: int, element_size: int) -> Cost:
    """The cost of running n_heads query heads on these blocks.

    Args:
        classes: of one plane that all heads share, or of a plane for each head (and batch row,
            whose mean then counts).
        n_heads: heads that the launch computes.
        head_dim: of q, k and v.
        element_size: of q, k and v, in bytes.
    """
    grid = classes.grid
    q_block, kv_block = grid.block_size
    blocks = round(classes.blocks * n_heads / grid.planes)
    flops = 4 * head_dim * q_block * kv_block * blocks
    rows = 2 * n_heads * grid.q_len
    loaded = 2 * kv_block * blocks
    return Cost(blocks, flops, (rows + loaded) * head_dim * element_size)


def flops_text(flops: int) -> str:
    """FLOPs with a prefix: '17.2 GFLOP'."""
    return _scaled(flops, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def bytes_text(n: int) -> str:
    """Bytes with a prefix: '3.1 MiB'."""
    return _scaled(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def time_text(seconds: float) -> str:
    """A time with a unit that suits it: '0.035 ms', '12.3 ms', '1.23 s', '61 s'."""
    if seconds >= 1:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e3:.2g} ms"


def _scaled(n: float, step: int, units: tuple[str, ...]) -> str:
    place = 0
    while n >= step and place < len(units) - 1:
        n /= step
        place += 1
    return f"{n:,.0f} {units[place]}" if n >= 100 or not place else f"{n:.3g} {units[place]}"
