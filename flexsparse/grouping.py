"""Which heads run together: the masks of the heads -> launches.

Heads with the same mask share one set of blocks. Heads whose masks differ in numbers alone share a
launch too, with blocks for each head, as long as the lists of blocks stay small: it fills the
device where single heads would not, and reads q, k and v where they are. Masks for token streaming
on CUDA always do, since they differ in numbers alone once they are in normal form.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from flexsparse.classify import BlockClasses, Grid, classify
from flexsparse.errors import MaskError
from flexsparse.executors import flash
from flexsparse.expr import Mask, kv_idx, q_idx
from flexsparse.heads import PerHead
from flexsparse.launch import LARGE_GRID, Launch
from flexsparse.normal_form import sink_and_window
from flexsparse.text import shown
from flexsparse.unify import structure, unify
from flexsparse.validate import problem


def launches(masks: PerHead, grid: Grid, device: torch.device) -> tuple[Launch, ...]:
    """Classify each distinct mask once and put heads that can run together into launches.

    Args:
        masks: the mask of each head.
        grid: of all heads and batch rows; a batch of 0 and no heads are numbers not given.
        device: where the launches run.

    Raises:
        MaskError: a mask cannot be compiled for this grid and device.
    """
    groups: dict[Hashable, list[Launch]] = {}
    for i, mask in enumerate(masks.distinct):
        launch = _launch(masks.heads_of(i), mask, grid, device)
        groups.setdefault(_group(launch), []).append(launch)
    return tuple(
        launch
        for group in groups.values()
        for launch in ([_unified(group, grid)] if _are_small(group) else group)
    )


def _launch(heads: tuple[int, ...], mask: Mask, whole: Grid, device: torch.device) -> Launch:
    """The heads that have one mask."""
    for variable, name, given in (("b", "batch", whole.batch), ("h", "n_heads", whole.heads)):
        if variable in mask.variables and not given:
            raise MaskError(
                f"The mask reads {variable}, so blocks differ: give {name}=... ({shown(mask)})"
            )
    grid = whole._replace(
        batch=whole.batch if "b" in mask.variables else 1,
        heads=heads if "h" in mask.variables else (0,),
    )
    reason = problem(mask, grid, device)
    if reason is not None:
        raise MaskError(reason)
    stream = sink_and_window(mask)
    if stream is not None:
        sink, window = stream
        # numbers past every key mean the same, and fit the kernels' int32
        stream = min(sink, grid.kv_len), min(window, max(grid.q_offset + grid.q_len, 1))
    streams = stream and (stream,)
    classes = classify(mask, grid)
    return Launch(heads, mask, grid, device, lambda: classes, streams, flash.band(mask, grid))


def _group(launch: Launch) -> Hashable:
    """What launches that can become one have in common."""
    executor = launch.usual_executor
    if executor == "streaming":
        return executor
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
    device = group[0].device
    if group[0].usual_executor == "streaming":
        masks = {head: _streaming(*streams[head]) for head in heads}
    mask = unify({head: masks[head] for head in heads}, device)
    names = list(dict.fromkeys(shown(launch.mask) for launch in group))
    batch = whole.batch if "b" in mask.variables else 1
    grid = whole._replace(batch=batch, heads=heads)
    places = {head: place for place, head in enumerate(heads)}
    classes = BlockClasses.of_planes(
        grid, [(x.classes, [places[head] for head in x.heads]) for x in group]
    )
    of_each = tuple(streams[head] for head in heads) if len(streams) == len(heads) else None
    return Launch(heads, mask.named(", ".join(names)), grid, device, lambda: classes, of_each)


def _streaming(sink: int, window: int) -> Mask:
    return (kv_idx <= q_idx) & ((kv_idx < sink) | (q_idx - kv_idx < window))
