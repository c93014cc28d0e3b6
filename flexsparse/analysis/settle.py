"""Single blocks that intervals leave open: settled by looking, at as few places as it takes.

A few witnesses come first, then the border of the block. One true and one false make it PARTIAL.
Where all were alike, intervals bound its parts, and theirs; what they leave open is evaluated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse.analysis.cells import CELLS_AT_ONCE, SPLIT, Grid, batch_and_head, bound_cells, split
from flexsparse.expr import Mask
from flexsparse.tree import kept_at

ELEMENTS_AT_ONCE = 1 << 20
BLOCKS_AT_ONCE = CELLS_AT_ONCE // SPLIT**2
SMALLEST_PART = 8  # tokens; to bound a part takes as long as to look at a few dozen elements


def settle(
    mask: Mask,
    reading: dict[str, Any],
    grid: Grid,
    cells: list[Tensor],
    some: Tensor,
    not_all: Tensor,
) -> tuple[list[Tensor], list[Tensor], int]:
    """Decide single blocks.

    Args:
        mask: what to look at.
        reading: its interval_reading.
        grid: lengths and block size.
        cells: planes, rows and columns of the blocks.
        some: where the mask is known to be true somewhere.
        not_all: where it is known to be false somewhere.

    Returns:
        Those that are PARTIAL, those that are FULL, and of how many some elements had to be
        evaluated that nothing told apart.
    """
    q_all, kv_all = (torch.arange(n) for n in _sizes(grid))
    q_few, kv_few = (torch.tensor(sorted({0, 1 % n, n // 2, n - 1})) for n in _sizes(grid))
    # every line, stripe or diagonal through a block crosses its border
    looks = [(q_few, kv_few), (q_all[:: max(1, len(q_all) - 1)], kv_all)]
    looks += [(q_all, kv_all[:: max(1, len(kv_all) - 1)])]
    mixed = some & not_all
    partial = [[x[mixed] for x in cells]]
    full: list[list[Tensor]] = []
    for q_steps, kv_steps in looks:
        cells, some, not_all = [x[~mixed] for x in cells], some[~mixed], not_all[~mixed]
        found, found_all = _look(mask, grid, cells, q_steps, kv_steps)
        some, not_all = some | found, not_all | ~found_all
        mixed = some & not_all
        partial.append([x[mixed] for x in cells])
    cells = [x[~mixed] for x in cells]
    evaluated = 0
    for start in range(0, len(cells[0]), BLOCKS_AT_ONCE):
        blocks = [x[start : start + BLOCKS_AT_ONCE] for x in cells]
        ever, every, n = _part_by_part(mask, reading, grid, blocks)
        partial.append([x[ever & ~every] for x in blocks])
        full.append([x[every] for x in blocks])
        evaluated += n
    return _joined(partial), _joined(full), evaluated


def _part_by_part(
    mask: Mask, reading: dict[str, Any], grid: Grid, cells: list[Tensor]
) -> tuple[Tensor, Tensor, int]:
    """Decide blocks by their parts: (any element is true, all are, how many were evaluated)."""
    n = len(cells[0])
    some, every = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    block, parts = torch.arange(n), cells
    while all(size % SPLIT == 0 and size >= SPLIT * SMALLEST_PART for size in grid.block_size):
        # parts are the blocks of a finer grid
        q_size, kv_size = grid.block_size
        grid = grid._replace(block_size=(q_size // SPLIT, kv_size // SPLIT))
        parent, *places = split(grid, [torch.arange(len(block)), *parts[1:]], 1)
        block, parts = block[parent], [parts[0][parent], *places]
        chunks = zip(*(torch.split(x, CELLS_AT_ONCE) for x in parts), strict=True)
        bounds = [bound_cells(mask, reading, grid, list(chunk), 1) for chunk in chunks]
        always, ever = (torch.cat(x) for x in zip(*bounds, strict=True))
        some[block[always]] = True
        every[block[~ever]] = False
        is_open = ever & ~always & ~(some & ~every)[block]
        block, parts = block[is_open], [x[is_open] for x in parts]
        if not len(block):
            return some, every, 0
    found, all_found = _look(mask, grid, parts, *(torch.arange(n) for n in _sizes(grid)))
    some[block[found]] = True
    every[block[~all_found]] = False
    return some, every, int(torch.bincount(block).count_nonzero())


def _sizes(grid: Grid) -> tuple[int, int]:
    # a block may be far longer than what it holds
    return min(grid.block_size[0], grid.q_len), min(grid.block_size[1], grid.kv_len)


def _joined(parts: list[list[Tensor]]) -> list[Tensor]:
    nothing = [torch.arange(0)] * 3
    return [torch.cat(x) for x in zip(nothing, *parts, strict=True)]


def _look(
    mask: Mask, grid: Grid, cells: list[Tensor], q_steps: Tensor, kv_steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Evaluate blocks exactly at q_steps x kv_steps of each: (any is true, all are true)."""
    at_once = max(1, ELEMENTS_AT_ONCE // (len(q_steps) * len(kv_steps)))
    found_some, found_all = [torch.empty(0, dtype=torch.bool)], [torch.empty(0, dtype=torch.bool)]
    for start in range(0, len(cells[0]), at_once):
        plane, row, column = (x[start : start + at_once, None, None] for x in cells)
        # elements past a ragged end repeat the last one, which changes neither `any` nor `all`
        q = (row * grid.block_size[0] + q_steps[:, None]).clamp(max=grid.q_len - 1) + grid.q_offset
        kv = (column * grid.block_size[1] + kv_steps).clamp(max=grid.kv_len - 1)
        b, h = batch_and_head(grid, plane)
        kept = kept_at(mask, {"b": b, "h": h, "q_idx": q, "kv_idx": kv})
        kept = kept.expand(len(plane), len(q_steps), len(kv_steps)).flatten(1)
        found_some.append(kept.any(1))
        found_all.append(kept.all(1))
    return torch.cat(found_some), torch.cat(found_all)
