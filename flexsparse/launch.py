"""A launch: the heads that share a mask, its blocks, and the executor that runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.classify import BlockClasses
from flexsparse.errors import ExecutorError
from flexsparse.executors import blockwise, flex, reference, sdpa
from flexsparse.expr import Mask
from flexsparse.lower import lower
from flexsparse.tensors import Opaque
from flexsparse.validate import needs_int64

LARGE_GRID = 1 << 22  # blocks; lists of 16 MB

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Launch:
    """What one executor runs.

    heads: the query heads it computes
    mask: their mask
    classes: the class of every block; its grid has one plane where the heads share their blocks
    device: where it runs
    wide: whether indices are computed in int64
    """

    heads: tuple[int, ...]
    mask: Mask
    classes: BlockClasses
    device: torch.device
    wide: bool

    @classmethod
    def of(
        cls, heads: tuple[int, ...], mask: Mask, classes: BlockClasses, device: torch.device
    ) -> Launch:
        """Make a launch of classified blocks, with its block lists unless none are needed."""
        launch = cls(heads, mask, classes, device, needs_int64(mask, classes.grid))
        if launch.usual_executor != "sdpa":
            _ = launch.block_mask
        return launch

    @functools.cached_property
    def block_mask(self) -> BlockMask:
        """The lists in the layout the device's kernels read, with an exact mask_mod."""
        grid = self.classes.grid
        # a kernel counts its heads from 0
        renumbered = grid.heads if grid.heads != tuple(range(len(grid.heads))) else None
        mask_mod = lower(self.mask, self.device, grid.q_offset, renumbered, self.wide)
        # On CPU torch wants lists as wide as the grid, and has no backward that would read q lists.
        # Overlapping views are that wide and take no memory, but each width costs a kernel: they
        # are for grids whose lists would be large.
        on_cpu = self.device.type == "cpu"
        compact = not on_cpu or grid.planes * grid.rows * grid.columns > LARGE_GRID
        kept = write_kept_blocks(self.classes, self.device, compact=compact, q_lists=not on_cpu)
        return block_mask(grid, kept, mask_mod, widen=on_cpu)

    @property
    def usual_executor(self) -> str:
        """What runs a forward pass without a score_mod."""
        if sdpa.unsupported(self.mask, self.classes.grid) is None:
            return "sdpa"
        return "blockwise" if self._not_elementwise() else "flex"

    def _not_elementwise(self) -> str | None:
        """Why kernels cannot compile the mask, or None if they can."""
        for step in self.mask.steps:
            if isinstance(step.payload, Opaque) and not step.payload.is_elementwise:
                return f"kernels compute one element at a time, and {step.payload.name} does not"
        return None

    def choose(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        score_mod: ScoreMod | None = None,
        return_lse: bool = False,
    ) -> dict[str, str | None]:
        """Each executor, the preferred one first, with why it cannot run these inputs, or None."""
        grid = self.classes.grid
        return {
            "sdpa": sdpa.unsupported(self.mask, grid, score_mod=score_mod, return_lse=return_lse),
            "flex": self._not_elementwise() or flex.unsupported(q, k, v, return_lse=return_lse),
            "blockwise": blockwise.unsupported(q, k, v, grid.block_size),
            "reference": None,
        }

    def parts(self, n_heads: int, n_kv_heads: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
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
    """Run a launch on the executor asked for, or else on the first that can.

    sdpa runs full and causal heads, flex any mask. blockwise is plain PyTorch: slower than flex, it
    runs everywhere and has gradients and the LSE also on CPU. reference is dense, and runs only
    when it is asked for.
    """
    reasons = launch.choose(q, k, v, score_mod=score_mod, return_lse=return_lse)
    chosen = next(name for name, reason in reasons.items() if reason is None)
    if executor is not None and executor not in reasons:
        raise ExecutorError(f"There is no executor {executor!r}; there are {', '.join(reasons)}.")
    if executor is not None and reasons[executor] is not None:
        raise ExecutorError(
            f"executor={executor!r} cannot run this call: {reasons[executor]}. Drop executor= to "
            f"let flexsparse choose (it would choose {chosen})."
        )
    name = executor or chosen
    if name == "sdpa":
        return sdpa.run(q, k, v, launch.mask, scale=scale), None
    lists = launch.block_mask
    if name == "reference":
        return reference.run(q, k, v, lists.mask_mod, scale=scale, score_mod=score_mod)
    runner = flex.run if name == "flex" else blockwise.run
    return runner(q, k, v, lists, scale=scale, score_mod=score_mod, return_lse=return_lse)
