"""Every mask that flexsparse and attention-gym both have is equal, element by element.

Where the two differ on purpose, the difference itself is what is tested.
"""

from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from flexsparse import h, kv_idx, lookup, maximum, minimum, q_idx
from flexsparse.masks import (
    block_diffusion,
    block_sparse,
    causal,
    chunked,
    dflash,
    diagonal,
    full,
    longformer,
    neighborhood,
    packed,
    prefix,
    same_document,
    shared_prefix,
    sliding_tile,
    spatial_head,
    strided,
    temporal_head,
    window,
)

gym = pytest.importorskip("attn_gym.masks")

OFFSETS = torch.tensor([0, 3, 10, 24, 50, 97])
DOCUMENTS = torch.repeat_interleave(torch.arange(5), OFFSETS.diff())
IS_GLOBAL = torch.arange(97) % 13 == 5
PREFIX = torch.tensor([0, 0, 0, 3, 3])


def dense(mask, length, n_heads=1):
    return create_mask(mask, 1, n_heads, length, length, device="cpu")[0]


def vsa():
    """Three heads, six tiles of 16 tokens, two of them for each tile of queries."""
    picked = torch.tensor([[[0, 3], [1, 2], [5, 0], [3, 4], [4, 1], [2, 5]]]).expand(3, -1, -1)
    table = torch.zeros(3, 6, 6, dtype=torch.bool).scatter(2, picked, True)
    theirs = gym.generate_vsa_mask_mod(picked[None].int(), tile_numel=16)
    return block_sparse(table, 16), theirs, 96, 3


EQUAL = {
    "causal": (causal, gym.causal_mask, 97),
    "prefix_lm": (prefix(9), gym.generate_prefix_lm_mask(9), 97),
    "dilated_sliding_window": (
        diagonal(12) & strided(3),
        gym.generate_dilated_sliding_window(12, 3),
        97,
    ),
    "block_diffusion": (block_diffusion(48, 5), gym.generate_block_diffusion_mask(48, 5), 96),
    "jetspec, training": (
        dflash(torch.full((12,), 20), 20, 8, is_causal=True),
        gym.generate_jetspec_training_mask_mod(20, 8),
        96,
    ),
    "global_sliding_window": (
        longformer(10, IS_GLOBAL),
        gym.generate_global_sliding_window(5, IS_GLOBAL),
        97,
    ),
    "document, causal": (packed(OFFSETS), gym.generate_doc_mask_mod(gym.causal_mask, OFFSETS), 97),
    "document, causal, by intervals": (
        causal & same_document(DOCUMENTS),
        gym.generate_packed_causal_doc_mask_mod(OFFSETS),
        97,
    ),
    "document, sliding window": (
        packed(OFFSETS, inner=causal & window(5)),
        gym.generate_doc_mask_mod(gym.generate_sliding_window(4), OFFSETS),
        97,
    ),
    "batchify": (chunked(16) & causal, gym.batchify_mask_mod(gym.causal_mask, 16), 97),
    "shared_prefix": (
        shared_prefix(OFFSETS, PREFIX),
        gym.generate_shared_prefix_mask_mod(OFFSETS, PREFIX),
        97,
    ),
    "natten, square, odd": (neighborhood((9, 9), 5), gym.generate_natten(9, 9, 5, 5), 81),
    "natten, tiled": (
        neighborhood((6, 8), (3, 5), tile=(3, 4)),
        gym.generate_tiled_natten(8, 6, 5, 3, 4, 3),
        48,
    ),
    "sta, 2d": (
        sliding_tile((8, 12), (4, 6), (2, 2)),
        gym.generate_sta_mask_mod_2d((8, 12), (4, 6), (2, 2)),
        96,
    ),
    "sta, 2d, text": (
        sliding_tile((4, 6), (4, 2), (2, 2), 5),
        gym.generate_sta_mask_mod_2d((4, 6), (4, 2), (2, 2), 5),
        33,
    ),
    "sta, 3d, text": (
        sliding_tile((4, 4, 6), (2, 4, 6), (2, 2, 2), 3),
        gym.generate_sta_mask_mod_3d((4, 4, 6), (2, 4, 6), (2, 2, 2), 3),
        103,
    ),
    "svg, spatial": (
        spatial_head(5, 14, 2, round_width=4),
        gym.generate_spatial_head_mask_mod(5, 10, 14, 2, round_width=4),
        97,
    ),
    "svg, spatial, sink": (
        spatial_head(5, 14, 2, True, 4),
        gym.generate_spatial_head_mask_mod(5, 10, 14, 2, True, 4),
        97,
    ),
    "svg, temporal": (
        temporal_head(5, 10, 14, 2),
        gym.generate_temporal_head_mask_mod(5, 10, 14, 2),
        97,
    ),
    "vsa": vsa(),
}


@pytest.mark.parametrize("case", EQUAL)
def test_masks_of_both_are_equal(case):
    ours, theirs, length, n_heads = (*EQUAL[case], 1)[:4]
    assert torch.equal(dense(ours, length, n_heads), dense(theirs, length, n_heads))


def written_here():
    """Masks of attention-gym that the library has no pattern for, in q_idx and kv_idx."""
    intervals = torch.tensor([[0, 7], [3, 60], [60, 90]])
    first, last = (lookup(intervals[:, i], kv_idx // 32) for i in (0, 1))
    yield (
        (first <= q_idx) & (q_idx < last),
        gym.generate_vision_cross_attention_mask_mod(intervals, 32),
    )
    ancestors = gym.build_tree_ancestor_matrix([-1, 0, 0, 1, 2, *range(91)], device="cpu")
    node = minimum(maximum(kv_idx - 20, 0), 95)
    yield (
        (kv_idx < 20) | ((kv_idx < 20 + 96) & lookup(ancestors, q_idx, node)),
        gym.generate_jetspec_tree_causal_mask_mod(20, ancestors),
    )


@pytest.mark.parametrize(("ours", "theirs"), list(written_here()))
def test_masks_without_a_pattern_are_written_as_expressions(ours, theirs):
    assert torch.equal(dense(ours, 96), dense(theirs, 96))


def test_no_mask_of_theirs_is_left_out():
    source = Path(__file__).read_text()
    masks = [n for n in dir(gym) if n.startswith("generate_")] + [
        "causal_mask",
        "batchify_mask_mod",
    ]
    assert [name for name in masks if f"gym.{name}" not in source] == []


def test_any_order_of_tokens_is_a_table():
    # attention-gym writes a mask anew for tokens along a Morton curve; here the order is looked up
    from attn_gym.masks.natten import morton_decode

    x, y = morton_decode(torch.arange(64))
    place = y * 8 + x
    ours = neighborhood((8, 8), 3).at(q_idx=lookup(place, q_idx), kv_idx=lookup(place, kv_idx))
    theirs = gym.generate_morton_natten(8, 8, 3, 3)
    assert torch.equal(dense(ours, 64), dense(theirs, 64))


def test_a_window_of_theirs_sees_one_key_more():
    theirs = dense(gym.generate_sliding_window(4), 97)
    assert torch.equal(dense(causal & window(4 + 1), 97), theirs)
    assert not torch.equal(dense(causal & window(4), 97), theirs)
    assert int(theirs[0, 50].sum()) == 5


def test_their_natten_takes_rows_for_columns_on_a_canvas_that_is_not_square():
    # canvas 4 rows of 10, kernel 3 x 5 (rows x columns); every token must see 15 keys
    ours = dense(neighborhood((4, 10), (3, 5)), 40)
    theirs = dense(gym.generate_natten(canvas_w=10, canvas_h=4, kernel_w=5, kernel_h=3), 40)
    assert (ours.sum(-1) == 15).all()
    assert not torch.equal(ours, theirs)
    assert not (theirs.sum(-1) == 15).all()
    # theirs clamps the row with the width and the column with the height
    swapped = (abs_row() <= 2) & (abs_column() <= 1)
    inside = (q_idx // 10 >= 2) & (q_idx % 10 >= 1) & (q_idx % 10 <= 2)
    where = torch.arange(40)
    rows = inside(0, 0, where, 0)
    assert torch.equal(theirs[0][rows], dense(swapped, 40)[0][rows])


def abs_row():
    return abs(q_idx // 10 - kv_idx // 10)


def abs_column():
    return abs(q_idx % 10 - kv_idx % 10)


def test_an_even_kernel_of_theirs_sees_one_key_more_along_each_axis():
    ours = dense(neighborhood((8, 8), 4), 64)
    theirs = dense(gym.generate_natten(8, 8, 4, 4), 64)
    assert (ours.sum(-1) == 4 * 4).all()
    assert (theirs.sum(-1) == 5 * 5).all()


def test_a_mask_of_theirs_for_all_is_full():
    everything = gym.generate_prefix_lm_mask(97)
    assert torch.equal(dense(full, 97), dense(everything, 97))
    assert torch.equal(dense(full & (h >= 0), 97), dense(everything, 97))
