"""A launch: the heads that share a mask, its blocks, and the executor that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.classify import BlockClasses
from flexsparse.errors import ExecutorError
from flexsparse.executors import flex, reference
from flexsparse.expr import Mask
from flexsparse.lower import lower
from flexsparse.validate import needs_int64

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Launch:
    """What one executor runs.

    heads: the query heads it computes
    mask: their mask
    classes: the class of every block; its grid has one plane where the heads share their blocks
    block_mask: the lists in the layout the device's kernels read, with an exact mask_mod
    wide: whether indices are computed in int64
    """

    heads: tuple[int, ...]
    mask: Mask
    classes: BlockClasses
    block_mask: BlockMask
    wide: bool

    @classmethod
    def of(
        cls, heads: tuple[int, ...], mask: Mask, classes: BlockClasses, device: torch.device
    ) -> Launch:
        """Write the block lists of classified blocks for a device and make the launch."""
        grid = classes.grid
        wide = needs_int64(mask, grid)
        # a kernel counts its heads from 0
        renumbered = grid.heads if grid.heads != tuple(range(len(grid.heads))) else None
        mask_mod = lower(mask, device, grid.q_offset, renumbered, wide)
        # On CPU torch wants lists as wide as the grid, and has no backward that would read q lists.
        on_cpu = device.type == "cpu"
        kept = write_kept_blocks(classes, device, compact=not on_cpu, q_lists=not on_cpu)
        return cls(heads, mask, classes, block_mask(grid, kept, mask_mod, widen=False), wide)

    def parts(
        self, n_heads: int, n_kv_heads: int
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The launch in parts that grouped-query attention can run: (heads, kv heads) each.

        A part reads each of its kv heads equally often, so that k and v are not repeated.
        """
        group_size = n_heads // n_kv_heads
        if len(self.classes.grid.heads) > 1:
            # block lists per head follow the order of the heads; give each its kv head
            return [(self.heads, tuple(head // group_size for head in self.heads))]
        of_kv: dict[int, list[int]] = {}
        for head in self.heads:
            of_kv.setdefault(head // group_size, []).append(head)
        by_count: dict[int, list[int]] = {}
        for kv_head, heads in of_kv.items():
            by_count.setdefault(len(heads), []).append(kv_head)
        return [
            (tuple(head for kv in kv_heads for head in of_kv[kv]), tuple(kv_heads))
            for kv_heads in by_count.values()
        ]


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """x[:, heads]: a view where the heads are consecutive, else a copy."""
    first, n = heads[0], len(heads)
    if tuple(heads) == tuple(range(first, first + n)):
        return x if n == x.shape[1] else x.narrow(1, first, n)
    return x[:, list(heads)]


def run(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    score_mod: ScoreMod | None,
    return_lse: bool,
    executor: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Run a launch on the executor asked for, or else on the first that can: flex, reference."""
    reason = flex.unsupported(q, k, v, return_lse=return_lse)
    if executor is None:
        executor = "flex" if reason is None else "reference"
    if executor == "reference":
        out, lse = reference.run(q, k, v, launch.block_mask.mask_mod, scale=scale, score_mod=score_mod)
        return out, lse
    if executor != "flex":
        raise ExecutorError(f"There is no executor {executor!r}; there are 'flex' and 'reference'.")
    if reason is not None:
        raise ExecutorError(
            f"executor='flex' cannot run this call: {reason}. Drop executor= to let flexsparse choose "
            "(it would choose reference)."
        )
    return flex.run(
        q, k, v, launch.block_mask, scale=scale, score_mod=score_mod, return_lse=return_lse
    )
