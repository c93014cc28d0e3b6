"""Radial Attention, whose blocks are those that the bands of its paper cover for the most part."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse import Mask, MaskError, kv_idx, minimum, pattern, q_idx
from flexsparse.masks.arguments import at_least, flag, one_of

MOST_BLOCKS = 1 << 12  # of a video, or frames: their pairs are looked at one by one


@pattern
def radial_attention(
    num_frame: int,
    token_per_frame: int,
    decay_factor: float = 1.0,
    model_type: str = "hunyuan",
    block_size: int = 128,
) -> Mask:
    """Tokens see about the same place of other frames, half as wide where these are twice as far.

    Where that is less than a block, a block is seen, of only every second, fourth, ... frame. All
    see the first frame. The mask consists of the blocks that such bands cover for the most part.

    radial_attention(8, 2, block_size=2), 9 x 9 blocks of 2:
        ###.#...#
        ####.#..#
        #####.#.#
        ######.##
        #.#####.#
        ##.######
        #.#.#####
        #..#.####
        #########

    Args:
        num_frame: frames of the video; the text after it sees all and is seen by all.
        token_per_frame: tokens of a frame.
        decay_factor: what the widths are multiplied by.
        model_type: "hunyuan" sees the next frame whole, "wan" half a frame to each side.
        block_size: tokens of a block; 128 as published.

    Source: Radial Attention (arXiv 2506.19852), gen_log_mask_shrinked.
    """
    name = "radial_attention"
    at_least(name, 1, num_frame=num_frame, token_per_frame=token_per_frame, block_size=block_size)
    one_of(name, "model_type", model_type, ("hunyuan", "wan"))
    is_number = isinstance(decay_factor, (int, float)) and not isinstance(decay_factor, bool)
    if not is_number or not 0 <= decay_factor < float("inf"):
        raise MaskError(
            f"{name}(decay_factor={decay_factor!r}): decay_factor must be a number of 0 or more."
        )
    # the last row and column stand for the text, and for the block that it shares with the video
    last = num_frame * token_per_frame // block_size
    if max(num_frame, last) > MOST_BLOCKS:
        raise MaskError(
            f"{name} got {num_frame} frames, in {last} blocks; there may be {MOST_BLOCKS} of each."
        )
    kept = torch.zeros(last + 1, last + 1, dtype=torch.bool, device="cpu")
    for q_frame in range(num_frame):
        for kv_frame in range(num_frame):
            # the first frame is seen by all, as by itself
            distance = abs(q_frame - kv_frame) if kv_frame > 0 else 0
            width = _radial_width(distance, token_per_frame, decay_factor, model_type, block_size)
            if width is None:
                continue
            row, q_inside = divmod(q_frame * token_per_frame, block_size)
            column, kv_inside = divmod(kv_frame * token_per_frame, block_size)
            blocks = _covered(width, token_per_frame, block_size, q_inside, kv_inside)
            place = kept[row : row + len(blocks), column : column + len(blocks)]
            place |= blocks[: len(place), : place.shape[1]]
    kept[last], kept[:, last] = True, True
    q_block, kv_block = (minimum(x // block_size, last) for x in (q_idx, kv_idx))
    return flag(kept, q_block, kv_block)


def _radial_width(
    distance: int, tokens: int, decay_factor: float, model_type: str, block_size: int
) -> int | None:
    """Tokens to each side that are seen of a frame so far away; None if it is not seen."""
    halved = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if halved < block_size and distance % int(block_size / halved):
        return None
    if distance == 0 or (distance == 1 and model_type == "hunyuan"):
        return tokens
    if distance == 1:
        return tokens // 2
    return int(max(halved * decay_factor, block_size))


def _covered(width: int, tokens: int, size: int, q_inside: int, kv_inside: int) -> Tensor:
    """Which blocks a band covers: of a frame of queries that starts inside a block, and of keys.

    Of the columns that it touches in a block, over six tenths are covered over a third of their
    height.
    """
    first = torch.arange(-(-tokens // size), device="cpu") * size
    top, left = ((first - inside).clamp(min=0) for inside in (q_inside, kv_inside))
    bottom, right = ((first - inside + size).clamp(max=tokens) for inside in (q_inside, kv_inside))
    top, bottom = top.unsqueeze(1), bottom.unsqueeze(1)

    def columns(height: int) -> Tensor:
        """How many columns of each block are covered by more than `height` rows."""
        ends = torch.minimum(right, bottom + width - height)
        count = ends - torch.maximum(left, top - width + height)
        return count.clamp(min=0) * ((bottom - top > height) & (2 * width + 1 > height))

    return columns(size // 3) * 5 > columns(0) * 3
