"""Which heads run together: the masks of the heads -> launches.

Heads with the same mask share one set of blocks. Heads whose masks differ in numbers alone share a
launch too, with blocks for each head, as long as the lists of blocks stay small: it fills the
device where single heads would not, and reads q, k and v where they are. Masks for token streaming
on CUDA always do, since they differ in numbers alone once they are in normal form. In packed
sequences, whether `varlen` packed them or the mask says itself which tokens are of one, it is the
mask inside each that is of such a form.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import BlockClasses, classify
from flexsparse.analysis.normal_form import sink_and_window
from flexsparse.analysis.sequences import Sequences, sequences_of
from flexsparse.analysis.unify import structure, unify
from flexsparse.analysis.validate import problem
from flexsparse.errors import MaskError
from flexsparse.executors import flash
from flexsparse.expr import Mask, kv_idx, q_idx
from flexsparse.heads import PerHead
from flexsparse.launch import LARGE_GRID, Launch
from flexsparse.packed.packing import Pack, PackedHeads, PackedTokens
from flexsparse.text import shown


def launches(masks: PerHead, grid: Grid, device: torch.device) -> tuple[Launch, ...]:
    """Classify each distinct mask once and put heads that can run together into launches.

    Args:
        masks: the mask of each head.
        grid: of all heads and batch rows; a batch of 0 and no heads are numbers not given.
        device: where the launches run.

    Raises:
        MaskError: a mask cannot be compiled for this grid and device.
    """
    packed = masks if isinstance(masks, PackedHeads) and masks.tokens.fill(grid) else None
    groups: dict[Hashable, list[Launch]] = {}
    for i, mask in enumerate(masks.distinct):
        packing = (packed.inside[i], packed.tokens) if packed else None
        launch = _launch(masks.heads_of(i), mask, grid, device, packing)
        groups.setdefault(_group(launch), []).append(launch)
    return tuple(
        launch
        for group in groups.values()
        for launch in ([_unified(group, grid)] if _are_small(group) else group)
    )


def _launch(
    heads: tuple[int, ...],
    mask: Mask,
    whole: Grid,
    device: torch.device,
    packing: tuple[Mask, PackedTokens] | None,
) -> Launch:
    """The heads that have one mask; `packing` is what that is inside each sequence, and these."""
    for variable, name, given in (("b", "batch", whole.batch), ("h", "n_heads", whole.heads)):
        if variable in mask.variables and not given:
            raise MaskError(
                f"The mask reads {variable}, so blocks differ: give {name}=... ({shown(mask)})"
            )
    grid = whole._replace(heads=heads).read_by(mask)
    reason = problem(mask, grid, device)
    if reason is not None:
        raise MaskError(reason)
    classes = classify(mask, grid)
    is_square = grid.q_len == grid.kv_len and grid.q_offset == 0
    sequences = sequences_of(mask, grid.kv_len) if is_square else None
    band = flash.band(mask, grid, sequences)
    inside, tokens = packing or (None, None)
    numbers = sink_and_window(mask, sequences) if inside is None else sink_and_window(inside)
    if tokens is None and sequences is not None and numbers is not None:
        tokens = _tokens(sequences, device)
    streams = None if numbers is None else (_in_reach(*numbers, grid, tokens),)
    return Launch(heads, mask, grid, device, lambda: classes, streams, band, tokens)


def _tokens(sequences: Sequences, device: torch.device) -> PackedTokens:
    pack = Pack(sequences.cu_seqlens.diff().tolist(), 1, device)
    return PackedTokens(pack, pack, [0] * len(pack.lens))


def _in_reach(sink: int, window: int, grid: Grid, tokens: PackedTokens | None) -> tuple[int, int]:
    """The same sink and window, cut off at the last key, so that kernels have room in int32."""
    return min(sink, grid.kv_len), min(window, max(_last_position(grid, tokens) + 1, 1))


def _last_position(grid: Grid, tokens: PackedTokens | None) -> int:
    return grid.q_offset + grid.q_len - 1 if tokens is None else tokens.q_range[1]


def _group(launch: Launch) -> Hashable:
    """What launches that can become one have in common."""
    executor = launch.usual_executor
    if executor == "streaming":
        assert launch.streams is not None
        # the kernels take some heads together, and then read the keys that any of them sees
        is_dense = launch.streams[0][1] > _last_position(launch.grid, launch.tokens)
        return executor, is_dense, launch.tokens and launch.tokens.sequences
    if executor in ("sdpa", "flash") or "h" in launch.mask.variables:
        return id(launch)
    return executor, structure(launch.mask)


def _are_small(group: Sequence[Launch]) -> bool:
    """Whether several launches are worth being one: lists for each head, but not many."""
    on_cpu = group[0].device.type == "cpu"
    entries = 0
    for launch in group:
        grid = launch.grid
        # on CPU the lists are as wide as the grid
        a_plane = grid.batch * grid.rows * grid.columns if on_cpu else launch.classes.blocks
        entries += len(launch.heads) * a_plane
    return len(group) > 1 and entries <= LARGE_GRID


def _unified(group: Sequence[Launch], whole: Grid) -> Launch:
    """Launches of one structure as one launch with blocks for each head."""
    masks, streams = {}, {}
    for launch in group:
        for head in launch.heads:
            masks[head] = launch.mask
            if launch.streams is not None:
                streams[head] = launch.streams[0]
    heads = tuple(sorted(masks))
    device, tokens = group[0].device, group[0].tokens
    if group[0].usual_executor == "streaming":
        of_numbers = {x: _streaming(*x, tokens) for x in dict.fromkeys(streams.values())}
        masks = {head: of_numbers[streams[head]] for head in heads}
    mask = unify({head: masks[head] for head in heads}, device)
    names = list(dict.fromkeys(shown(launch.mask) for launch in group))
    batch = whole.batch if "b" in mask.variables else 1
    grid = whole._replace(batch=batch, heads=heads)
    places = {head: place for place, head in enumerate(heads)}
    classes = BlockClasses.of_planes(
        grid, [(x.classes, [places[head] for head in x.heads]) for x in group]
    )
    mask = mask.named(", ".join(names))
    of_each = tuple(streams[head] for head in heads) if len(streams) == len(heads) else None
    return Launch(heads, mask, grid, device, lambda: classes, of_each, tokens=tokens)


def _streaming(sink: int, window: int, tokens: PackedTokens | None) -> Mask:
    mask: Mask = (kv_idx <= q_idx) & ((kv_idx < sink) | (q_idx - kv_idx < window))
    return mask if tokens is None else tokens.packed(mask)
