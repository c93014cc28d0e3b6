"""compile_mask: a mask, or one for each head, made ready to run at given lengths."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.attention.flex_attention import BlockMask

from flexsparse import report
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import BlockClasses
from flexsparse.analysis.validate import needs_int64
from flexsparse.arguments import (
    INT32_MAX,
    block_sizes,
    check_grid,
    check_position,
    check_size,
    usable_device,
)
from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.cost import Cost
from flexsparse.default_device import cpu_by_default
from flexsparse.dispatch import attend
from flexsparse.dropout import Dropout
from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.grouping import launches
from flexsparse.heads import PerHead, as_per_head, refuse_other, refuse_other_count
from flexsparse.inputs import mismatch
from flexsparse.launch import Launch
from flexsparse.lower import LoweredMask
from flexsparse.modifiers import Modifiers
from flexsparse.tensors import MaskMod, ScoreMod
from flexsparse.uncompiled import uncompiled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# rows of blocks of one query each; fewer than hints.DECODING, so that hints hold for a query alone
ROWS_AT_ONCE = 64


@uncompiled
def compile_mask(
    mask: Mask | PerHead,
    q_len: int,
    kv_len: int,
    *,
    batch: int | None = None,
    n_heads: int | None = None,
    q_offset: int | None = None,
    device: torch.device | str | None = None,
    block_size: int | tuple[int, int] = 128,
) -> CompiledMask:
    """Decide which blocks of q_len x kv_len a mask keeps, and plan how to run it.

    Args:
        mask: one mask for all heads, or `per_head([...])`.
        q_len: queries, in tokens.
        kv_len: keys, in tokens.
        batch: batch rows; needed only if the mask reads `b`.
        n_heads: query heads; needed only if a single mask reads `h`.
        q_offset: position of query row 0; kv_len - q_len by default, so that the last query stands
            at the last key (bottom-right, as in FlashAttention).
        device: where q, k and v will be; by default where the mask's tables are, else torch's
            default device.
        block_size: tokens of a block, or (of queries, of keys).

    Raises:
        MaskError: the mask cannot be compiled for these arguments; the text says what to change.
    """
    started = time.perf_counter()
    check_grid("", q_len, kv_len, batch, n_heads, q_offset)
    refuse_other("compile_mask", mask)
    refuse_other_count("", mask, n_heads)
    masks = as_per_head(mask, n_heads or 1)
    n_heads = masks.n_heads if isinstance(mask, PerHead) else n_heads
    blocks = block_sizes("block_size", block_size)
    offset = kv_len - q_len if q_offset is None else q_offset
    place = _device(masks, device)

    heads = tuple(range(n_heads)) if n_heads else ()
    grid = Grid(q_len, kv_len, offset, blocks, batch or 0, heads)
    with cpu_by_default():
        plan = launches(masks, grid, place)
        for launch in plan:
            launch.prepare()
    seconds = time.perf_counter() - started
    return CompiledMask(masks, plan, batch, n_heads, place, seconds)


class CompiledMask:
    """A mask at given lengths: call it on q, k and v, print it, or take its BlockMask.

    masks: the mask of each head
    launches: what runs, for which heads
    q_len, kv_len, q_offset: in tokens
    """

    def __init__(
        self,
        masks: PerHead,
        launches: tuple[Launch, ...],
        batch: int | None,
        n_heads: int | None,
        device: torch.device,
        compile_seconds: float,
    ) -> None:
        grid = launches[0].grid
        self.masks = masks
        self.launches = launches
        self.q_len, self.kv_len, self.q_offset = grid.q_len, grid.kv_len, grid.q_offset
        self.block_size = grid.block_size
        self.batch = batch
        self.n_heads = n_heads
        self.device = device
        self.compile_seconds = compile_seconds
        self.tables = tuple(table for mask in masks.distinct for table in mask.tables)
        self._block_mask: BlockMask | None = None
        self._mask_mod: MaskMod | None = None
        self._rows: CompiledMask | None = None  # the queries around the last `row`

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        return_lse: bool = False,
        executor: str | None = None,
    ) -> Any:
        """Attention of q to the keys its mask keeps.

        A query row that sees no key has output 0 and LSE -inf. Under autocast q, k and v are cast
        to its dtype, which is that of the output. Hidden values must be finite: their weight is 0,
        and 0 * NaN is NaN.

        Args:
            q: [B, n_heads, q_len, D].
            k: [B, n_kv_heads, kv_len, D]; n_kv_heads divides n_heads (GQA).
            v: [B, n_kv_heads, kv_len, Dv].
            scale: of the scores, a number; 1 / sqrt(D) by default.
            score_mod: FlexAttention's, of (score, b, h, q_idx, kv_idx); q_idx is the position of
                the query, q_offset included, and h the query head. Read tables in one step,
                table[q_idx, h]: inside your own torch.compile, flex on CPU gets table[q_idx][h]
                wrong.
            dropout_p: the chance to drop each attention weight, in [0, 1); the others are divided
                by 1 - dropout_p.
            dropout_seed: of the dropout, 64 bits: the weights it drops depend on it and on (b, h,
                row of q, row of k) alone, whatever the executor. Drawn from torch's generator if
                not given.
            return_lse: also return the log of the sum of exponentials of each row's scores.
            executor: insist on "sdpa", "flash", "streaming", "gather", "flex", "blockwise" or
                "reference"; by default flexsparse chooses.

        Returns:
            out [B, n_heads, q_len, Dv], or (out, lse) with lse float32 [B, n_heads, q_len].

        Raises:
            MaskError: q, k or v do not fit the compiled mask or each other.
            ExecutorError: the executor asked for cannot run this call.
        """
        reason = mismatch(self, q, k, v)
        if reason is not None:
            raise MaskError(reason)
        if score_mod is not None and self.q_offset:
            score_mod = _at_positions(score_mod, self.q_offset, self.device)
        modifiers = Modifiers(scale, score_mod, Dropout.of(dropout_p, dropout_seed), return_lse)
        out, lse = attend(self.launches, q, k, v, modifiers, executor)
        return (out, lse) if return_lse else out

    def at(self, q_len: int, kv_len: int, q_offset: int | None = None) -> CompiledMask:
        """The same mask for other lengths, through the same kernels: prefill in chunks, decoding.

        Cost: the block analysis at the new lengths, milliseconds; no kernel is compiled again.

        >>> chunk = attend.at(512, 2048)                # queries 1536 to 2047, all keys so far
        >>> out = chunk(q[:, :, 1536:2048], k[:, :, :2048], v[:, :, :2048])

        Args:
            q_len: queries, in tokens.
            kv_len: keys, in tokens.
            q_offset: position of query row 0; kv_len - q_len by default.
        """
        return self._again(q_len=q_len, kv_len=kv_len, q_offset=q_offset)()

    def row(self, position: int) -> CompiledMask:
        """One query, at a position, over all kv_len keys: a step of decoding.

        Cost: a fraction of a millisecond for a query of this mask, since the blocks of 64 queries
        are found together; milliseconds for any other. No kernel is compiled again.

        Keys keep their places, so k and v may be a cache of kv_len tokens that is still filling up,
        if the mask hides what is not written yet, as causal does. Start from torch.zeros: what is
        hidden must be finite. For a cache that grows, take at(1, position + 1).

        A block that the query sees all of is FULL, and its kernel applies no mask there. In the
        BlockMask of at(1, ...), as in torch's, it is partial: a block of 128 queries sticks out.

        >>> out = attend.row(700)(q[:, :, 700:701], k, v)  # attend(q, k, v)[:, :, 700:701]

        Args:
            position: of the query, in tokens.

        Raises:
            MaskError: position is not an int, or too large.
        """
        check_position("row: position", position, "the query")
        place = position - self.q_offset
        if not 0 <= place < self.q_len:
            return self.at(1, self.kv_len, position)
        started = time.perf_counter()
        first = place // ROWS_AT_ONCE * ROWS_AT_ONCE
        rows = self._rows  # another thread may change it
        if rows is None or rows.q_offset != self.q_offset + first:
            rows = self._again(
                q_len=min(ROWS_AT_ONCE, self.q_len - first),
                q_offset=self.q_offset + first,
                block_size=(1, self.block_size[1]),
            )()
            self._rows = rows
        row = tuple(x.row(place - first, self.block_size) for x in rows.launches)
        seconds = time.perf_counter() - started
        return CompiledMask(self.masks, row, self.batch, self.n_heads, self.device, seconds)

    def cost(self, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """Blocks, FLOPs and bytes of a forward pass of one batch row; `print` shows each launch's.

        Of a mask for any number of heads, it is the cost of one head.

        Raises:
            MaskError: head_dim is no size, or dtype no torch.dtype.
        """
        check_size("head_dim", head_dim, INT32_MAX)
        if not isinstance(dtype, torch.dtype):
            raise MaskError(f"dtype={dtype!r}; it must be a torch.dtype, such as torch.bfloat16.")
        costs = [launch.cost(head_dim, dtype.itemsize) for launch in self.launches]
        return Cost(*(sum(numbers) for numbers in zip(*costs, strict=True)))

    @property
    def block_mask(self) -> BlockMask:
        """All heads as one torch BlockMask, usable with flex_attention as it is.

        Shape [batch or 1, n_heads or 1, q_len, kv_len]: heads have lists of their own only where
        their masks differ. Its mask_mod is exact for every element.

        Raises:
            MaskError: a table of the mask was written to since.
        """
        self._refuse_stale()
        if self._block_mask is None:
            self._block_mask = self._write_block_mask()
        return self._block_mask

    @property
    def mask_mod(self) -> MaskMod:
        """All heads as one mask_mod, exact for every element: that of `block_mask`.

        It writes no lists, for systems that make a BlockMask of their own. q_idx counts rows of q.

        Raises:
            MaskError: a table of the mask was written to since.
        """
        self._refuse_stale()
        if self._mask_mod is None:
            self._mask_mod = self._lower()
        return self._mask_mod

    def _refuse_stale(self) -> None:
        for table in self.tables:
            # a graph being compiled knows no versions of tensors
            if not is_compiling() and table.stale:
                raise MaskError(table.stale)

    @cpu_by_default()
    def _write_block_mask(self) -> BlockMask:
        classes = self._all_heads()
        return block_mask(classes.grid, write_kept_blocks(classes, self.device), self.mask_mod)

    @cpu_by_default()
    def _lower(self) -> MaskMod:
        alone = len(self.launches) == 1
        mask = self.launches[0].mask if alone else self.masks.mask(self.device)
        wide = any(needs_int64(x.mask, x.grid) for x in self.launches)
        return LoweredMask(mask, self.device, self.q_offset, wide)

    def _again(self, **changes: Any) -> Callable[[], CompiledMask]:
        """The call of compile_mask that made this mask, with some arguments changed."""
        arguments: dict[str, Any] = {
            "mask": self.masks if self.n_heads else self.masks.distinct[0],
            "q_len": self.q_len,
            "kv_len": self.kv_len,
            "batch": self.batch,
            "n_heads": self.n_heads,
            "q_offset": self.q_offset,
            "device": self.device,
            "block_size": self.block_size,
        }
        return functools.partial(compile_mask, **(arguments | changes))

    def __reduce__(self) -> tuple[Any, ...]:
        # compiling again takes milliseconds, and kernels read functions that cannot be pickled
        return self._again(), ()

    def _all_heads(self) -> BlockClasses:
        """The block classes of all heads, put together from those of the launches."""
        if len(self.launches) == 1:
            return self.launches[0].classes
        assert self.n_heads is not None
        batch = max(launch.grid.batch for launch in self.launches)
        grid = self.launches[0].grid._replace(batch=batch, heads=tuple(range(self.n_heads)))
        return BlockClasses.of_planes(
            grid, [(launch.classes, launch.heads) for launch in self.launches]
        )

    def __str__(self) -> str:
        return report.text(self)

    __repr__ = __str__

    def plot(self, **options: Any) -> Figure:
        """Draw the blocks of each distinct mask, with the work of each row and head (matplotlib).

        The options are those of `flexsparse.draw`: labels and title.
        """
        from flexsparse.drawing import draw

        return cast("Figure", draw(self, **options))

    def _repr_html_(self) -> str:
        from flexsparse.drawing import html

        return html(self)


def _device(masks: PerHead, device: torch.device | str | None) -> torch.device:
    if device is None:
        of_tables = (mask.device for mask in masks.distinct)
        return next(filter(None, of_tables), None) or torch.get_default_device()
    return usable_device(device)


def _at_positions(score_mod: ScoreMod, q_offset: int, device: torch.device) -> ScoreMod:
    """A score_mod of positions as one of row numbers, which is what kernels count."""
    # a tensor, because a number would be compiled into the kernel
    first = torch.tensor(q_offset, device=device)

    def at_positions(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, q_idx + first, kv_idx)

    return at_positions
