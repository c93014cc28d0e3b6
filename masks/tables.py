"""Patterns given as tensors: block tables."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse import Mask, MaskError, b, h, kv_idx, lookup, pattern, q_idx


@pattern
def block_sparse(table: Tensor, block_size: int = 128) -> Mask:
    """The blocks that a boolean table keeps: table[..., q_idx // block_size, kv_idx // block_size].

    block_sparse([[1, 0], [1, 1]], 2), 4 x 4:       ##..
                                                    ##..
    Args:                                           ####
        table: boolean [rows, columns],             ####
            [heads, rows, columns] or [B, heads, rows, columns].
        block_size: tokens of a block of the table; it may differ from the compiled block_size.

    Source: Block-Sparse-Attention's base_blockmask.
    """
    if table.dtype != torch.bool or table.dim() not in (2, 3, 4):
        raise MaskError(
            f"block_sparse got a table of {table.dtype} {tuple(table.shape)}; it must be boolean "
            "[rows, columns], [heads, rows, columns] or [B, heads, rows, columns]."
        )
    if not isinstance(block_size, int) or block_size < 1:
        raise MaskError(f"block_sparse(block_size={block_size!r}): it must be an int of 1 or more.")
    leading = (b, h)[4 - table.dim() :]
    kept: Mask = lookup(table, *leading, q_idx // block_size, kv_idx // block_size)
    return kept
