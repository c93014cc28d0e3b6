"""Patterns of local blocks and stripes of blocks, heads with stripes of their own: S2-Attention."""

from __future__ import annotations

from flexsparse import Mask, MaskError, PerHead, kv_idx, pattern, per_head, q_idx
from flexsparse.masks.arguments import at_least, booleans, counts, is_int
from flexsparse.masks.positions import causal, full


@pattern
def local_stride(
    local_blocks: int, vert_stride: int, block_size: int = 64, head_offset: int = 0
) -> Mask:
    """Causal, of which a query sees its latest blocks, its own included, and stripes of blocks.

    A stripe is a block of keys with (kv_idx // block_size + head_offset) % vert_stride == 0.

    local_stride(1, 3, 1, 1), 8 x 8:
        #.......
        .#......
        ..#.....
        ..##....
        ..#.#...
        ..#..#..
        ..#..##.
        ..#..#.#

    Args:
        local_blocks: latest blocks, 1 or more: (local_blocks - 1) * block_size + 1 tokens or more.
        vert_stride: blocks from one stripe to the next; 1 is causal.
        block_size: tokens of a block.
        head_offset: blocks by which the stripes move left; `s2_attention` gives heads their own.

    Source: S2-Attention (arXiv 2407.17678), dkernel's LocalStrideSparseAttention.
    """
    at_least("local_stride", 1, local_blocks=local_blocks, vert_stride=vert_stride)
    at_least("local_stride", 1, block_size=block_size)
    at_least("local_stride", 0, head_offset=head_offset)
    q_block, kv_block = q_idx // block_size, kv_idx // block_size
    stripes = ((kv_block + head_offset % vert_stride) % vert_stride).equals(0)
    return causal & ((q_block - kv_block < local_blocks) | stripes)


@pattern
def relative_stride(
    left_blocks: int, right_blocks: int, vert_stride: int, block_size: int = 64
) -> Mask:
    """A band of blocks to both sides, and past its edges every `vert_stride`-th block.

    relative_stride(2, 2, 3, 1), 8 x 8:                                            ##..#..#
                                                                                   ###..#..
    Args:                                                                          .###..#.
        left_blocks: blocks up to the query's own, that included, 1 or more.       ..###..#
        right_blocks: blocks from the query's own on, that included, 1 or more.    #..###..
        vert_stride: blocks from one kept block to the next, past the band.        .#..###.
        block_size: tokens of a block.                                             ..#..###
                                                                                   #..#..##
    Source: dkernel's vert_position_type="relative", its default without causal.
    """
    at_least("relative_stride", 1, left_blocks=left_blocks, right_blocks=right_blocks)
    at_least("relative_stride", 1, vert_stride=vert_stride, block_size=block_size)
    ahead = q_idx // block_size - kv_idx // block_size
    band = (ahead < left_blocks) & (-right_blocks < ahead)
    past_left = (ahead >= left_blocks) & ((ahead - (left_blocks - 1)) % vert_stride).equals(0)
    past_right = (ahead <= -right_blocks) & ((ahead + (right_blocks - 1)) % vert_stride).equals(0)
    return band | past_left | past_right


def s2_attention(
    num_heads: int,
    local_blocks: int | tuple[int, int],
    vert_stride: int,
    block_size: int = 64,
    num_kv_heads: int | None = None,
    num_dense_heads: int = 0,
    homo_head: bool = False,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
    causal: bool = True,
) -> PerHead:
    """S2-Attention's heads: all see the same recent blocks, and each its own stripes.

    Head h is local_stride(local_blocks, vert_stride, block_size, h * step): together they see all.

    s2_attention(3, 1, 3, 1), 6 x 6:
        #..... #..... #.....
        ##.... .#.... .#....
        #.#... ..#... .##...
        #..#.. ..##.. .#.#..
        #..##. ..#.#. .#..#.
        #..#.# ..#..# .#..##

    Args:
        num_heads: query heads.
        local_blocks: latest blocks, the query's own included; without causal (left, right).
        vert_stride: blocks from one stripe to the next.
        block_size: tokens of a block.
        num_kv_heads: the query heads of a kv head share a pattern; num_heads by default.
        num_dense_heads: the last kv heads, which are dense.
        homo_head: all heads see the same stripes.
        head_sliding_step: blocks by which stripes move from a kv head to the next;
            max(1, vert_stride // num_heads) by default.
        head_sliding_offset: blocks by which the stripes of all heads are moved.
        causal: without it the pattern is `relative_stride`, the same for all heads.

    Source: S2-Attention (arXiv 2407.17678), dkernel's get_sparse_attn_mask.
    """
    name = "s2_attention"
    n_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    counts(name, num_heads=num_heads, num_kv_heads=n_kv_heads)
    at_least(name, 1, vert_stride=vert_stride)
    at_least(name, 0, num_dense_heads=num_dense_heads, head_sliding_offset=head_sliding_offset)
    step = max(1, vert_stride // num_heads) if head_sliding_step is None else head_sliding_step
    at_least(name, 0, head_sliding_step=step)
    booleans(name, homo_head=homo_head, causal=causal)
    if num_heads % n_kv_heads or num_dense_heads > n_kv_heads:
        raise MaskError(
            f"s2_attention(num_heads={num_heads}, num_kv_heads={n_kv_heads}, num_dense_heads="
            f"{num_dense_heads}): num_kv_heads must divide num_heads and be at least "
            "num_dense_heads."
        )
    if homo_head and num_dense_heads:
        raise MaskError(
            f"s2_attention(homo_head=True, num_dense_heads={num_dense_heads}): heads cannot be "
            "alike and some of them dense; drop one of the two."
        )
    is_pair = isinstance(local_blocks, (tuple, list)) and len(local_blocks) == 2
    if not (is_int(local_blocks) if causal else is_pair):
        raise MaskError(
            f"s2_attention(local_blocks={local_blocks!r}, causal={causal}): local_blocks must be "
            "an int if causal, else a pair (left, right)."
        )

    def mask_of(kv_head: int) -> Mask:
        if kv_head >= n_kv_heads - num_dense_heads:
            return _dense(causal)
        if not isinstance(local_blocks, int):
            return relative_stride(*local_blocks, vert_stride, block_size)
        offset = (0 if homo_head else kv_head * step) + head_sliding_offset
        return local_stride(local_blocks, vert_stride, block_size, offset % vert_stride)

    group_size = num_heads // n_kv_heads
    return per_head([mask_of(kv_head) for kv_head in range(n_kv_heads) for _ in range(group_size)])


def _dense(is_causal: bool) -> Mask:
    return causal if is_causal else full


def phi3_small(
    layer_idx: int,
    num_attention_heads: int = 32,
    blocksparse_block_size: int = 64,
    blocksparse_num_local_blocks: int = 16,
    blocksparse_vert_stride: int = 8,
    blocksparse_homo_head_pattern: bool = False,
    dense_attention_every_n_layers: int = 2,
) -> PerHead:
    """Phi-3-small's heads in a layer: causal in every n-th layer, else local blocks and stripes.

    Head h sees stripes with (block + h * step + 1) % vert_stride == 0: they are one block further
    left than `s2_attention`'s, and each query head (not kv head) has its own.

    phi3_small(0, 2, 64, 1, 2), 5 x 5 blocks of 64:                                  #.... #....
                                                                                     .#... ##...
    Args:                                                                            .##.. #.#..
        layer_idx: of the layer, from 0; it is causal if n divides layer_idx + 1.    .#.#. #.##.
        num_attention_heads: query heads.                                            .#.## #.#.#
        blocksparse_block_size: tokens of a block.
        blocksparse_num_local_blocks: latest blocks, the query's own included.
        blocksparse_vert_stride: blocks from one stripe to the next.
        blocksparse_homo_head_pattern: all heads see the same stripes.
        dense_attention_every_n_layers: n, layers from a causal layer to the next.

    Source: Phi-3-small (arXiv 2404.14219), its configuration; vLLM's blocksparse_attention.
    """
    at_least("phi3_small", 0, layer_idx=layer_idx)
    at_least("phi3_small", 1, dense_attention_every_n_layers=dense_attention_every_n_layers)
    counts("phi3_small", num_attention_heads=num_attention_heads)
    booleans("phi3_small", blocksparse_homo_head_pattern=blocksparse_homo_head_pattern)
    if (layer_idx + 1) % dense_attention_every_n_layers == 0:
        return per_head([causal] * num_attention_heads)
    return s2_attention(
        num_attention_heads,
        blocksparse_num_local_blocks,
        blocksparse_vert_stride,
        blocksparse_block_size,
        homo_head=blocksparse_homo_head_pattern,
        head_sliding_offset=1,
    )
