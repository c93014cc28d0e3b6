"""Patterns of sparse transformers: one mask for all heads of a published model."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse import Mask, MaskError, kv_idx, pattern, q_idx
from flexsparse.masks.arguments import at_least, booleans, flag, tensor_of
from flexsparse.masks.positions import causal, chunked, global_tokens, strided, window


@pattern
def sparse_transformer_fixed(stride: int, c: int) -> Mask:
    """Causal, of which each query sees its own chunk and the last `c` keys of every chunk.

    sparse_transformer_fixed(3, 1), 9 x 9:                                              #........
                                                                                        ##.......
    Args:                                                                               ###......
        stride: tokens of a chunk.                                                      ..##.....
        c: last keys of a chunk that later chunks see ("expressivity"), 1 to stride.    ..###....
                                                                                        ..####...
    Source: Sparse Transformers (arXiv 1904.10509), section 4.3.                        ..#..##..
                                                                                        ..#..###.
                                                                                        ..#..####
    """
    at_least("sparse_transformer_fixed", 1, stride=stride, c=c)
    if c > stride:
        raise MaskError(
            f"sparse_transformer_fixed(stride={stride}, c={c}): a chunk has only {stride} keys; "
            "use c of at most stride."
        )
    return causal & (chunked(stride) | (kv_idx % stride >= stride - c))


@pattern
def sparse_transformer_strided(stride: int) -> Mask:
    """Causal, of which each query sees the latest `stride` keys and every `stride`-th before them.

    sparse_transformer_strided(3), 9 x 9:
        #........
        ##.......
        ###......
        ####.....
        .####....
        ..####...
        #..####..
        .#..####.
        ..#..####

    Args:
        stride: keys of the window, the query's own included, and from one older key to the next.

    Source: Sparse Transformers (arXiv 1904.10509), section 4.2.
    """
    at_least("sparse_transformer_strided", 1, stride=stride)
    return causal & (window(stride) | strided(stride))


@pattern
def longformer(
    attention_window: int, global_positions: int | Tensor | None = None, dilation: int = 1
) -> Mask:
    """Tokens see attention_window // 2 to each side; global tokens see all and are seen by all.

    A window of w sees w + 1 keys, the query's own included.

    longformer(2, 1), 6 x 6:                                                                 ######
                                                                                             ###...
    Args:                                                                                    ####..
        attention_window: tokens of the window, both sides together, even.                   #.###.
        global_positions: how many first tokens are global, or boolean [tokens], or None.    #..###
        dilation: tokens from one key of the window to the next.                             #...##

    Source: Longformer (arXiv 2004.05150), section 3.1.
    """
    at_least("longformer", 2, attention_window=attention_window)
    at_least("longformer", 1, dilation=dilation)
    if attention_window % 2:
        raise MaskError(
            f"longformer(attention_window={attention_window}): half of it lies on each side, so it "
            f"must be even; use {attention_window - 1} or {attention_window + 1}."
        )
    kept = abs(q_idx - kv_idx) <= attention_window // 2 * dilation
    if dilation > 1:
        kept = kept & strided(dilation)
    return kept if global_positions is None else kept | global_tokens(global_positions)


@pattern
def bigbird(
    n_blocks: int,
    block_size: int = 64,
    window_blocks: int = 3,
    random_blocks: Tensor | None = None,
) -> Mask:
    """A window of blocks, the first and the last block global, and random blocks.

    bigbird(5, 1), 5 x 5:                    #####
                                             ###.#
    Args:                                    #####
        n_blocks: blocks of the sequence.    #.###
        block_size: tokens of a block.       #####
        window_blocks: blocks of the window, the query's own in the middle, odd.
        random_blocks: integer [n_blocks, r], the random blocks that each block of queries sees.

    Source: BigBird (arXiv 2007.14062), its ITC construction.
    """
    at_least("bigbird", 1, n_blocks=n_blocks, block_size=block_size, window_blocks=window_blocks)
    if window_blocks % 2 == 0:
        raise MaskError(
            f"bigbird(window_blocks={window_blocks}): the query's block is in the middle, so it "
            f"must be odd; use {window_blocks - 1} or {window_blocks + 1}."
        )
    q_block, kv_block = q_idx // block_size, kv_idx // block_size
    last = n_blocks - 1
    is_global = (
        q_block.equals(0) | kv_block.equals(0) | q_block.equals(last) | kv_block.equals(last)
    )
    kept = (abs(q_block - kv_block) <= window_blocks // 2) | is_global
    if random_blocks is None:
        return kept
    tensor_of("bigbird", "random_blocks", random_blocks, "integer", {2: "[n_blocks, r]"})
    low, high = map(int, random_blocks.aminmax()) if random_blocks.numel() else (0, 0)
    if len(random_blocks) != n_blocks or low < 0 or high > last:
        raise MaskError(
            f"bigbird got random_blocks {tuple(random_blocks.shape)} of {low} to {high}; it must "
            f"have a row for each of {n_blocks} blocks, of numbers 0 to {last}."
        )
    picked = torch.zeros(n_blocks, n_blocks, dtype=torch.bool, device=random_blocks.device)
    picked.scatter_(1, random_blocks.long(), True)
    return kept | flag(picked, q_block, kv_block)


@pattern
def combiner_fixed(seq_len: int, max_seg_len: int, is_causal: bool = True) -> Mask:
    """Tokens see their own segment and one summary of each earlier segment, appended to the keys.

    Keys are the seq_len tokens and then a summary for each segment; the summaries are computed
    outside. Compile with q_offset=0.

    combiner_fixed(6, 2), 6 x 9:                                                    #........
                                                                                    ##.......
    Args:                                                                           ..#...#..
        seq_len: tokens, in front of the summaries.                                 ..##..#..
        max_seg_len: tokens of a segment.                                           ....#.##.
        is_causal: without it a token sees all of its segment and all summaries.    ....####.

    Source: Combiner (arXiv 2107.05768), Combiner-Fixed (sqrt_fixed_full).
    """
    booleans("combiner_fixed", is_causal=is_causal)
    at_least("combiner_fixed", 1, seq_len=seq_len, max_seg_len=max_seg_len)
    tokens = (kv_idx < seq_len) & chunked(max_seg_len)
    if not is_causal:
        return tokens | (kv_idx >= seq_len)
    summaries = (kv_idx >= seq_len) & (kv_idx - seq_len < q_idx // max_seg_len)
    return (tokens & causal) | summaries


@pattern
def orion_msp(
    row_num_cls: int = 4, row_num_global: int = 2, row_window: int = 4, as_released: bool = False
) -> Mask:
    """The first tokens see all and are seen by all; the others see row_window to each side.

    orion_msp(1, 0, 1), 5 x 5:                               #####
                                                             ###..
    Args:                                                    ####.
        row_num_cls: CLS tokens, which come first.           #.###
        row_num_global: global tokens, which follow them.    #..##
        row_window: tokens to each side; 2 * row_window + 1 keys are seen.
        as_released: the mask of the released code, where the window is lost and a token sees only
            itself besides the first ones. (Its random picks, if any, are a block_sparse table.)

    Source: Orion-MSP (arXiv 2511.02818), _build_block_sparse_mask.
    """
    at_least(
        "orion_msp",
        0,
        row_num_cls=row_num_cls,
        row_num_global=row_num_global,
        row_window=row_window,
    )
    booleans("orion_msp", as_released=as_released)
    near = abs(q_idx - kv_idx) <= (0 if as_released else row_window)
    special = row_num_cls + row_num_global
    return near | (q_idx < special) | (kv_idx < special)
