"""Facts about a mask that torch's Triton kernels take as hints (kernel_options of flex_attention).

A hint is given only where it is proved. CPU kernels take none.
"""

from __future__ import annotations

import torch

from flexsparse.analysis.cells import bound_cells, interval_reading
from flexsparse.analysis.classify import BlockClasses
from flexsparse.blocks import BlockLists, KeptBlocks
from flexsparse.expr import Mask, kv_idx

DECODING = 128  # queries: below, torch splits the keys of a row, and each part has a first block


def kernel_options(mask: Mask, classes: BlockClasses, kept: KeptBlocks) -> dict[str, bool]:
    """The hints that hold for these block lists.

    ROWS_GUARANTEED_SAFE: no row of a tile is still without a key after the first tile computed for
        it. It is proved by the first key of the first block, whatever the tile's width.
    BLOCKS_ARE_CONTIGUOUS: the blocks of every line are consecutive, in each of the lists.
    """
    hints = {
        "ROWS_GUARANTEED_SAFE": _rows_are_safe(mask, classes, kept),
        "BLOCKS_ARE_CONTIGUOUS": all(
            _is_contiguous(lists)
            for lists in (kept.kv, kept.full_kv, kept.q, kept.full_q)
            if lists is not None
        ),
    }
    return {name: True for name, holds in hints.items() if holds}


def _rows_are_safe(mask: Mask, classes: BlockClasses, kept: KeptBlocks) -> bool:
    grid = classes.grid
    if grid.q_len < DECODING or grid.q_len % grid.block_size[0]:
        return False
    # kernels take the PARTIAL blocks of a row first
    first = torch.where(
        kept.kv.counts > 0,
        kept.kv.indices[..., 0],
        torch.where(kept.full_kv.counts > 0, kept.full_kv.indices[..., 0], -1),
    ).cpu()
    if (first < 0).any():
        return False  # a row of blocks with no key
    first = first.flatten(0, 1)  # [planes, rows]
    plane, row = torch.cartesian_prod(torch.arange(first.shape[0]), torch.arange(first.shape[1])).T
    # all queries of a row of blocks against one key: a block of one key
    at_first_key = mask.at(kv_idx=kv_idx * grid.block_size[1])
    single = grid._replace(kv_len=grid.columns, block_size=(grid.block_size[0], 1))
    cells = [plane, row, first.flatten().long()]
    always, _ = bound_cells(at_first_key, interval_reading(at_first_key, single), single, cells, 1)
    return bool(always.all())


def _is_contiguous(lists: BlockLists) -> bool:
    """Whether the last block of each line is as many after the first as there are others."""
    last = (lists.counts.long() - 1).clamp(min=0)[..., None]
    span = lists.indices.gather(-1, last)[..., 0] - lists.indices[..., 0]
    return bool(((span == last[..., 0]) | (lists.counts == 0)).all())
