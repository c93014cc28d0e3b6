"""Terms of a mask that kernels need not evaluate."""

import pytest
import torch
from hypothesis import given
from oracles import dense, grids, masks

from flexsparse import compile_mask, everything, kv_idx, per_head
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import classify
from flexsparse.analysis.needed import needed
from flexsparse.masks import block_sparse, causal, same_document, sink, window

BLOCKS = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.5
GRID = Grid(600, 600, 0, (128, 128), 1, (0,))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal & window(10**6), causal),
        (window(10**6) & causal & same_document(torch.zeros(600, dtype=torch.int32)), causal),
        (causal & block_sparse(BLOCKS), causal),
        (causal & same_document(torch.arange(600) // 256), causal),
        (causal & window(200), causal & window(200)),
        (causal & (sink(3) | window(200)), causal & (sink(3) | window(200))),
        (window(10**6) & (kv_idx < 10**6), everything),
        (causal, causal),
    ],
    ids=str,
)
def test_terms_that_partial_blocks_have_no_use_for_are_dropped(mask, expected):
    assert needed(mask, classify(mask, GRID)) == expected


@given(masks, masks, grids)
def test_inside_partial_blocks_nothing_changes(a, other, grid):
    mask = a & other
    classes = classify(mask, grid)
    left = needed(mask, classes)
    whole, rest = dense(mask, grid), dense(left, grid)
    q_block, kv_block = grid.block_size
    heads = list(grid.heads)
    for plane, row0, row1, column0, column1 in zip(
        *(x.tolist() for x in classes.partial), strict=True
    ):
        place = (
            plane // len(heads),
            plane % len(heads),
            slice(row0 * q_block, row1 * q_block),
            slice(column0 * kv_block, column1 * kv_block),
        )
        assert whole[place].equal(rest[place])


def test_a_term_that_is_joined_to_itself_is_one_term():
    mask = causal & block_sparse(BLOCKS)
    for _ in range(40):
        mask = mask & mask
    assert needed(mask, classify(mask, GRID)) == causal


def test_the_public_mask_mod_stays_whole():
    mask = causal & block_sparse(BLOCKS)
    attend = compile_mask(mask, 600, 600)
    index = (torch.tensor(0), torch.tensor(0), torch.arange(600)[:, None], torch.arange(600))
    assert attend.block_mask.mask_mod(*index).equal(mask(*index))
    q, k, v = torch.randn(3, 1, 2, 600, 16)
    kept = mask(*index)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
    expected[:, :, ~kept.any(1)] = 0
    for executor in ("blockwise", "reference"):
        torch.testing.assert_close(attend(q, k, v, executor=executor), expected)


def test_heads_keep_what_any_of_them_needs():
    attend = compile_mask(per_head([causal & window(9), causal & window(10**6)]), 300, 300)
    q, k, v = torch.randn(3, 1, 2, 300, 16)
    out = attend(q, k, v, executor="blockwise")
    torch.testing.assert_close(out, attend(q, k, v, executor="reference"))
