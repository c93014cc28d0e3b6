"""Which terms of a mask a kernel has to evaluate: those that can be false inside a PARTIAL block.

Kernels apply the mask_mod to PARTIAL blocks alone. Of `causal & blocks(table)`, say, the table has
decided which blocks are kept; where the diagonal cuts one, it is true throughout.
"""

from __future__ import annotations

import functools

from flexsparse.analysis.cells import bound_cells, interval_reading
from flexsparse.analysis.classify import BlockClasses
from flexsparse.expr import Mask, everything
from flexsparse.walks import conjuncts

MOST_BLOCKS = 1 << 16  # beyond so many PARTIAL blocks the proof would cost more than it saves


def needed(mask: Mask, classes: BlockClasses) -> Mask:
    """The mask without the terms of its conjunction that are true in all of its PARTIAL blocks."""
    terms = conjuncts(mask)
    if len(terms) == 1 or not 0 < classes.partial.blocks <= MOST_BLOCKS:
        return mask
    blocks = classes.partial.units()
    cells = [blocks.plane, blocks.row0, blocks.column0]
    kept = []
    for term in terms:
        always, _ = bound_cells(term, interval_reading(term, classes.grid), classes.grid, cells, 1)
        if not always.all():
            kept.append(term)
    if len(kept) == len(terms):
        return mask
    return functools.reduce(Mask.__and__, kept) if kept else everything
