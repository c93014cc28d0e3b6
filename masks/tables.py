"""Patterns given as tensors, such as an estimator's: blocks, keys, columns and diagonals, clusters.

Tables of tokens are [tokens], [heads, tokens] or [B, heads, tokens]: the same for all heads, one
for each query head, or also one for each batch row. One head, or one batch row, stands for all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexsparse import (
    Index,
    Mask,
    MaskError,
    kv_idx,
    maximum,
    minimum,
    pattern,
    q_idx,
)
from flexsparse.masks.arguments import (
    at_least,
    booleans,
    flag,
    number,
    row_number,
    sizes,
    tensor_of,
)
from flexsparse.masks.positions import causal

PER_TOKEN = {1: "[tokens]", 2: "[heads, tokens]", 3: "[B, heads, tokens]"}
PER_LIST = {1: "[n]", 2: "[heads, n]", 3: "[B, heads, n]"}
MOST_TOKENS = 1 << 30  # a list becomes a table as long as its largest number


@pattern
def block_sparse(table: Tensor, block_size: int | tuple[int, int] = 128, q_offset: int = 0) -> Mask:
    """The blocks that a boolean table keeps: table[..., q_idx // block_size, kv_idx // block_size].

    block_sparse([[1, 0], [1, 1]], 2), 4 x 4:                                                   ##..
                                                                                                ##..
    Args:                                                                                       ####
        table: boolean [rows, columns], [heads, rows, columns] or [B, heads, rows, columns].    ####
            One head, or one batch row, stands for all: [B, 1, rows, columns].
        block_size: tokens of a block of the table, or (of queries, of keys), such as (2048, 1) for
            AnchorAttention's columns; it may differ from the compiled block_size.
        q_offset: position of query row 0, if the rows of the table count from there
            (Block-Sparse-Attention) and not from position 0.

    A boolean attn_mask of scaled_dot_product_attention is block_sparse(attn_mask, 1).

    Source: Block-Sparse-Attention's base_blockmask.
    """
    if not isinstance(table, Tensor) or table.dtype != torch.bool or table.dim() not in (2, 3, 4):
        found = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else repr(table)
        raise MaskError(
            f"block_sparse got a table of {found}; it must be boolean "
            "[rows, columns], [heads, rows, columns] or [B, heads, rows, columns]."
        )
    q_block, kv_block = sizes("block_sparse", "block_size", block_size, 2)
    return flag(table, row_number("block_sparse", q_offset) // q_block, kv_idx // kv_block)


@pattern
def kept_keys(bits: Tensor, block_size: int = 1) -> Mask:
    """Every query sees the keys whose bit is set: bits[..., kv_idx // block_size].

    kept_keys([1, 0, 0, 1, 0]), 3 x 5:    #..#.
                                          #..#.
    Args:                                 #..#.
        bits: boolean [tokens], [heads, tokens] or [B, heads, tokens].
        block_size: tokens of a bit: 64 for a table of LServe's pages, 16 for Quest's.

    Source: LServe's and Quest's pages, Double Sparsity's heavy tokens, Dynamic Mask Attention.
    """
    tensor_of("kept_keys", "bits", bits, "boolean", PER_TOKEN)
    at_least("kept_keys", 1, block_size=block_size)
    return flag(bits, kv_idx // block_size if block_size > 1 else kv_idx)


@pattern
def vertical_slash(vertical: Tensor, slash: Tensor, block_size: int = 1) -> Mask:
    """Causal, of which some columns of keys and some diagonals are kept, for every query.

    vertical_slash([1], [0, 3]), 6 x 6:
        #.....
        .#....
        .##...
        ##.#..
        .#..#.
        .##..#

    Args:
        vertical: the columns: their numbers, integer [n], [heads, n] or [B, heads, n] (negative
            numbers fill up shorter lists), or boolean, true at the columns.
        slash: the diagonals, by their distance q_idx - kv_idx; 0 is the query's own.
        block_size: 1 counts in tokens; FlexPrefill counts columns and diagonals in blocks of 128.

    Source: MInference (arXiv 2407.02490); FlexPrefill (arXiv 2502.20766).
    """
    at_least("vertical_slash", 1, block_size=block_size)
    in_columns = _members("vertical_slash", "vertical", vertical)
    in_diagonals = _members("vertical_slash", "slash", slash)
    if block_size == 1:
        q, kv = q_idx, kv_idx
    else:
        q, kv = q_idx // block_size, kv_idx // block_size
    return causal & (in_columns(kv) | in_diagonals(maximum(q - kv, 0)))


@pattern
def vertical_slash_blocks(vertical: Tensor, slash: Tensor, granularity: int = 128) -> Mask:
    """Causal, of which columns of keys are kept and the blocks of a grid that diagonals cross.

    vertical_slash_blocks([1], [3], 2), 8 x 8:
        ........
        .#......
        ##......
        ##......
        ####....
        ####....
        .#####..
        .#####..

    Args:
        vertical: the columns: their numbers, integer [n], [heads, n] or [B, heads, n] (negative
            numbers fill up shorter lists), or boolean, true at the columns.
        slash: the diagonals, by their distance q_idx - kv_idx in tokens, in the same forms.
        granularity: tokens of a block of the grid.

    Source: MTraining (arXiv 2510.18830), vertical_slash_utils.
    """
    name = "vertical_slash_blocks"
    at_least(name, 1, granularity=granularity)
    in_columns = _members(name, "vertical", vertical)
    tensor_of(name, "slash", slash, "boolean or integer", PER_LIST)
    if slash.dtype == torch.bool:
        places = torch.arange(slash.shape[-1], device=slash.device)
        slash = torch.where(slash, places, -1)
    _largest(name, "slash", slash)
    # a diagonal lies on one diagonal of blocks, and on the next one unless it is on the grid
    distance = slash // granularity
    crossed = torch.where(slash % granularity != 0, distance + 1, distance)
    blocks = torch.cat([distance, torch.where(slash < 0, -1, crossed)], -1)
    in_blocks = _members(name, "slash", blocks)
    ahead = maximum(q_idx // granularity - kv_idx // granularity, 0)
    return causal & (in_columns(kv_idx) | in_blocks(ahead))


def _members(name: str, argument: str, given: Tensor) -> Callable[[Index], Mask]:
    """Whether an index is in a set: numbers in a list, or true entries of a boolean table."""
    tensor_of(name, argument, given, "boolean or integer", PER_LIST)
    if given.dtype == torch.bool:
        return lambda index: flag(given, index)
    # the last entry stands for all numbers past the largest
    past = max(_largest(name, argument, given) + 1, 0)
    table = torch.zeros(*given.shape[:-1], past + 1, dtype=torch.bool, device=given.device)
    table.scatter_(-1, torch.where(given < 0, past, given).long(), True)
    table[..., past] = False
    return lambda index: flag(table, minimum(index, past))


def _largest(name: str, argument: str, given: Tensor) -> int:
    """The largest of the numbers of columns or diagonals; -1 if there is none."""
    largest = int(given.max()) if given.numel() else -1
    if largest >= MOST_TOKENS:
        raise MaskError(
            f"{name} got {argument} up to {largest}; its numbers must be below 2**30. Fill up "
            "shorter lists with negative numbers."
        )
    return largest


@pattern
def qk_sparse(q_keep: Tensor, k_keep: Tensor) -> Mask:
    """Causal among the queries and keys that are kept: q_keep[q_idx] & k_keep[kv_idx].

    qk_sparse([1, 0, 1, 1], [1, 1, 0, 1]), 4 x 4:                                               #...
                                                                                                ....
    Args:                                                                                       ##..
        q_keep: boolean [tokens], [heads, tokens] or [B, heads, tokens]; others see nothing.    ##.#
        k_keep: the same for keys.

    Source: QK-sparse attention of SCFA (arXiv 2306.01160).
    """
    tensor_of("qk_sparse", "q_keep", q_keep, "boolean", PER_TOKEN)
    tensor_of("qk_sparse", "k_keep", k_keep, "boolean", PER_TOKEN)
    return causal & flag(q_keep, q_idx) & flag(k_keep, kv_idx)


@pattern
def hash_sparse(q_hash: Tensor, k_hash: Tensor) -> Mask:
    """Each query sees the *earlier* keys of its own bucket, not itself: kv_idx < q_idx.

    hash_sparse([0, 1, 0, 0], [0, 0, 1, 0]), 4 x 4:
        ....
        ....
        ##..
        ##..

    Args:
        q_hash: integer [tokens], [heads, tokens] or [B, heads, tokens], the bucket of each query.
        k_hash: the same for keys.

    Source: hash-sparse attention of SCFA (arXiv 2306.01160).
    """
    tensor_of("hash_sparse", "q_hash", q_hash, "integer", PER_TOKEN)
    tensor_of("hash_sparse", "k_hash", k_hash, "integer", PER_TOKEN)
    return (kv_idx < q_idx) & number(q_hash, q_idx).equals(number(k_hash, kv_idx))


@pattern
def clusters(q_cluster: Tensor, k_cluster: Tensor | None = None, is_causal: bool = False) -> Mask:
    """Queries see the keys of their own cluster; a negative cluster is none.

    clusters([0, 1, 0, -1]), 4 x 4:                                                           #.#.
                                                                                              .#..
    Args:                                                                                     #.#.
        q_cluster: integer [tokens], [heads, tokens] or [B, heads, tokens], of each query.    ....
        k_cluster: the same for keys; the queries' by default.
        is_causal: keep only keys up to the query.

    Images in a causal text compile sooner as causal | (kv_idx < lookup(ends, q_idx)), where ends[i]
    is the end of the image of token i, and 0 outside of images.

    Source: Routing Transformer (arXiv 2003.05997), hard assignment: a token is in one cluster.
    """
    booleans("clusters", is_causal=is_causal)
    k_cluster = q_cluster if k_cluster is None else k_cluster
    tensor_of("clusters", "q_cluster", q_cluster, "integer", PER_TOKEN)
    tensor_of("clusters", "k_cluster", k_cluster, "integer", PER_TOKEN)
    mine = number(q_cluster, q_idx)
    kept = mine.equals(number(k_cluster, kv_idx)) & (mine >= 0)
    return causal & kept if is_causal else kept
