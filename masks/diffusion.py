"""Patterns of models that write a block of tokens at once: block diffusion, and such drafters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexsparse import Mask, b, kv_idx, pattern, q_idx
from flexsparse.masks.arguments import at_least, booleans, integers, number, tensor_of


@pattern
def block_diffusion(seq_len: int, block_size: int, clean_first: bool = False) -> Mask:
    """Every block sees itself, noised or clean as it is, and the clean blocks before it.

    The sequence is given twice, [noised | clean], in 2 * seq_len tokens.

    block_diffusion(4, 2), 8 x 8:                                                    ##......
                                                                                     ##......
    Args:                                                                            ..####..
        seq_len: tokens of each copy.                                                ..####..
        block_size: tokens of a block: of a video, those of the frames of a chunk.   ....##..
        clean_first: the order is [clean | noised], as Self Forcing has it.          ....##..
                                                                                     ....####
    When decoding, without the noised copy, it is frame_causal(block_size).          ....####

    Source: BD3-LMs (arXiv 2503.09573), block_diff_mask; Self Forcing (arXiv 2506.08009).
    """
    at_least("block_diffusion", 1, seq_len=seq_len, block_size=block_size)
    booleans("block_diffusion", clean_first=clean_first)
    noised_start, clean_start = (seq_len, 0) if clean_first else (0, seq_len)
    q_noised, kv_noised = (x >= seq_len if clean_first else x < seq_len for x in (q_idx, kv_idx))
    q_noised_block, kv_noised_block = ((x - noised_start) // block_size for x in (q_idx, kv_idx))
    q_clean_block, kv_clean_block = ((x - clean_start) // block_size for x in (q_idx, kv_idx))
    own = kv_noised & q_noised_block.equals(kv_noised_block)
    earlier = ~kv_noised & (kv_clean_block < q_noised_block)
    up_to_own = ~kv_noised & (kv_clean_block <= q_clean_block)
    return (q_noised & (own | earlier)) | (~q_noised & up_to_own)


@pattern
def dflash(
    anchors: Tensor | Sequence[int],
    context_len: int,
    block_size: int = 16,
    is_causal: bool = False,
) -> Mask:
    """Each drafted block sees itself, and the context before its anchor.

    Keys are [context | block 0 | block 1 | ...], queries the blocks alone. Compile with q_offset=0.

    dflash([1, 3], 4, 2), 4 x 8:                                                 #...##..
                                                                                 #...##..
    Args:                                                                        ###...##
        anchors: integer [blocks] or [B, blocks], the position in the context    ###...##
            at which each block starts; a negative one is of a block that sees nothing.
        context_len: tokens of the context.
        block_size: tokens of a block.
        is_causal: inside its block a token sees those up to itself, as JetSpec's draft head does.

    Source: DFlash (arXiv 2602.06036), create_dflash_block_mask; JetSpec (arXiv 2606.18394).
    """
    if isinstance(anchors, Tensor):
        tensor_of("dflash", "anchors", anchors, "integer", {1: "[blocks]", 2: "[B, blocks]"})
    else:
        anchors = integers("dflash", "anchors", anchors, "[blocks] or [B, blocks]")
    at_least("dflash", 0, context_len=context_len)
    at_least("dflash", 1, block_size=block_size)
    booleans("dflash", is_causal=is_causal)
    q_block, place = q_idx // block_size, kv_idx - context_len
    # cut at the context, so that one comparison says which keys of it are seen
    starts = anchors.long().clamp(max=context_len)
    anchor = number(starts, b, q_block) if starts.dim() == 2 else number(starts, q_block)
    own = (place >= 0) & q_block.equals(place // block_size) & (anchor >= 0)
    if is_causal:
        own = own & (place <= q_idx)
    return (kv_idx < anchor) | own
