"""compile_mask: a mask, or one for each head, made ready to run at given lengths."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse import report
from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.classify import BlockClasses, Grid, classify
from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.heads import PerHead
from flexsparse.inputs import mismatch
from flexsparse.launch import Launch, ScoreMod, run, take_heads
from flexsparse.lower import lower, padded
from flexsparse.validate import problem


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
    for name, n in (("q_len", q_len), ("kv_len", kv_len), ("batch", batch), ("n_heads", n_heads)):
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise MaskError(f"{name}={n!r}; it must be an int of 1 or more.")
    if q_offset is not None and (not isinstance(q_offset, int) or isinstance(q_offset, bool)):
        raise MaskError(f"q_offset={q_offset!r}; it must be an int, the position of query row 0.")
    masks = _as_per_head(mask, n_heads)
    n_heads = masks.n_heads if isinstance(mask, PerHead) else n_heads
    blocks = _block_size(block_size)
    offset = kv_len - q_len if q_offset is None else q_offset
    place = _device(masks, device)

    launches = []
    for i, distinct in enumerate(masks.distinct):
        heads = masks.heads_of(i)
        for variable, name, given in (
            ("b", "batch", batch),
            ("h", "n_heads", n_heads),
        ):
            if variable in distinct.variables and not given:
                raise MaskError(
                    f"The mask reads {variable}, so blocks differ: give {name}=... ({distinct})"
                )
        grid = Grid(
            q_len,
            kv_len,
            offset,
            blocks,
            batch if batch and "b" in distinct.variables else 1,
            heads if "h" in distinct.variables else (0,),
        )
        reason = problem(distinct, grid, place)
        if reason is not None:
            raise MaskError(reason)
        launches.append(Launch.of(heads, distinct, classify(distinct, grid), place))
    seconds = time.perf_counter() - started
    return CompiledMask(masks, tuple(launches), batch, n_heads, place, seconds)


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
        grid = launches[0].classes.grid
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

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        score_mod: ScoreMod | None = None,
        return_lse: bool = False,
        executor: str | None = None,
    ) -> Any:
        """Attention of q to the keys its mask keeps.

        A query row that sees no key has output 0 and LSE -inf.

        Args:
            q: [B, n_heads, q_len, D].
            k: [B, n_kv_heads, kv_len, D]; n_kv_heads divides n_heads (GQA).
            v: [B, n_kv_heads, kv_len, Dv].
            scale: of the scores; 1 / sqrt(D) by default.
            score_mod: FlexAttention's, of (score, b, h, q_idx, kv_idx); q_idx is the position of
                the query, q_offset included, and h the query head.
            return_lse: also return the log of the sum of exponentials of each row's scores.
            executor: insist on "flex", "blockwise" or "reference"; by default flexsparse chooses.

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
        options: dict[str, Any] = {"return_lse": return_lse, "scale": scale, "executor": executor}
        if len(self.launches) == 1:
            out, lse = run(self.launches[0], q, k, v, score_mod=score_mod, **options)
            return (out, lse) if return_lse else out
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        order: list[int] = []
        for launch in self.launches:
            for heads, kv_heads in launch.parts(q.shape[1], k.shape[1]):
                out, lse = run(
                    launch,
                    take_heads(q, heads),
                    take_heads(k, kv_heads),
                    take_heads(v, kv_heads),
                    score_mod=None if score_mod is None else _at_heads(score_mod, heads, q.device),
                    **options,
                )
                outs.append(out)
                if lse is not None:
                    lses.append(lse)
                order.extend(heads)
        out = _in_head_order(outs, order)
        return (out, _in_head_order(lses, order)) if return_lse else out

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
        return compile_mask(
            self.masks if self.n_heads else self.masks.distinct[0],
            q_len,
            kv_len,
            batch=self.batch,
            n_heads=self.n_heads,
            q_offset=q_offset,
            device=self.device,
            block_size=self.block_size,
        )

    def row(self, position: int) -> CompiledMask:
        """One query, at a position, over all kv_len keys: a step of decoding.

        Cost: the blocks of its row; no kernel is compiled again.

        Keys keep their places, so k and v may be a cache of kv_len tokens that is still filling up,
        if the mask hides what is not written yet, as causal does. For a cache that grows, take
        at(1, position + 1).

        >>> out = attend.row(700)(q[:, :, 700:701], k, v)  # attend(q, k, v)[:, :, 700:701]

        Args:
            position: of the query, in tokens.
        """
        return self.at(1, self.kv_len, position)

    @property
    def block_mask(self) -> BlockMask:
        """All heads as one torch BlockMask, usable with flex_attention as it is.

        Shape [batch or 1, n_heads or 1, q_len, kv_len]: heads have lists of their own only where
        their masks differ. Its mask_mod is exact for every element.
        """
        if self._block_mask is None:
            classes = self._all_heads()
            mask = self.masks.mask(self.device)
            wide = any(launch.wide for launch in self.launches)
            mask_mod = lower(mask, self.device, self.q_offset, wide=wide)
            kept = write_kept_blocks(classes, self.device)
            self._block_mask = block_mask(classes.grid, kept, mask_mod)
        return self._block_mask

    def _all_heads(self) -> BlockClasses:
        """The block classes of all heads, put together from those of the launches."""
        if len(self.launches) == 1:
            return self.launches[0].classes
        assert self.n_heads is not None
        batch = max(launch.classes.grid.batch for launch in self.launches)
        grid = self.launches[0].classes.grid._replace(batch=batch, heads=tuple(range(self.n_heads)))
        return BlockClasses.of_planes(
            grid, [(launch.classes, launch.heads or ()) for launch in self.launches]
        )

    def __str__(self) -> str:
        return report.text(self)

    __repr__ = __str__


def _as_per_head(mask: Mask | PerHead, n_heads: int | None) -> PerHead:
    if isinstance(mask, PerHead):
        if n_heads is not None and n_heads != mask.n_heads:
            raise MaskError(
                f"per_head got {mask.n_heads} masks but n_heads={n_heads}. Give one mask for each "
                "query head, or leave n_heads out."
            )
        return mask
    if isinstance(mask, Mask):
        return PerHead((mask,), (0,) * (n_heads or 1))
    if isinstance(mask, (list, tuple)):
        fix = "Wrap the list: compile_mask(per_head(masks), ...)."
    elif callable(mask):
        fix = "Call the pattern first, or make a Mask of a mask_mod function with from_mask_mod."
    else:
        fix = "Build one from q_idx and kv_idx, or take one from flexsparse.masks."
    raise MaskError(
        f"compile_mask takes a Mask or per_head([...]), not {type(mask).__name__}. {fix}"
    )


def _block_size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(sizes) != 2 or any(
        not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in sizes
    ):
        raise MaskError(
            f"block_size={block_size!r}; it must be an int of 1 or more, or (of queries, of keys)."
        )
    return sizes[0], sizes[1]


def _device(masks: PerHead, device: torch.device | str | None) -> torch.device:
    if device is None:
        tables = [table for mask in masks.distinct for table in mask.tables]
        return tables[0].tensor.device if tables else torch.get_default_device()
    try:
        # "cuda" becomes "cuda:0", which is what tensors there report
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise MaskError(f"device={device!r} cannot be used here: {error}") from None


def _at_positions(score_mod: ScoreMod, q_offset: int, device: torch.device) -> ScoreMod:
    """A score_mod of positions as one of row numbers, which is what kernels count."""
    # a tensor, because a number would be compiled into the kernel
    first = torch.tensor(q_offset, device=device)

    def at_positions(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, q_idx + first, kv_idx)

    return at_positions


def _at_heads(score_mod: ScoreMod, heads: Sequence[int], device: torch.device) -> ScoreMod:
    """A score_mod of query heads as one of the heads of a launch."""
    table = padded(torch.tensor(heads, device=device))

    def at_heads(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, table[h], q_idx, kv_idx)

    return at_heads


def _in_head_order(parts: Sequence[Tensor], heads: Sequence[int]) -> Tensor:
    """Concatenate per-launch results and put head i back at place i."""
    joined = torch.cat(list(parts), 1)
    if list(heads) == sorted(heads):
        return joined
    places = torch.tensor(heads, device=joined.device).argsort()
    return joined.index_select(1, places)
