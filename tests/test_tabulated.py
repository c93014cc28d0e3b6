"""Masks whose divisions are tables say what they said, and kernels are as few as before."""

import pytest
import torch
from hypothesis import given, settings
from oracles import dense, grids, masks

from flexsparse import b, compile_mask, from_mask_mod, h, kv_idx, lookup, q_idx
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.validate import problem
from flexsparse.masks import causal, chunked, neighborhood, strided, window
from flexsparse.tabulated import SHORTEST, tabulated

CPU = torch.device("cpu")
GRID = Grid(300, 500, 200, (128, 128), 2, (0, 1, 2))
IDS = torch.arange(500) % 7


def tables_of(mask):
    return [table.tensor for table in mask.tables]


@settings(max_examples=300)
@given(masks, grids)
def test_a_tabulated_mask_is_the_mask(mask, grid):
    if problem(mask, grid, CPU) is not None:
        return
    assert torch.equal(dense(tabulated(mask, grid), grid), dense(mask, grid))


@pytest.mark.parametrize("q_offset", [200, 0, -70])
@pytest.mark.parametrize(
    ("mask", "n_tables"),
    [
        (causal & window(7), 0),
        (causal & (kv_idx * 3 < q_idx + lookup(IDS, kv_idx)), 0),
        (chunked(40), 2),
        (causal & strided(9), 1),
        ((q_idx // 8 % 3).equals(1) | (kv_idx < 5), 1),
        # a part of a part that is also read elsewhere
        ((kv_idx // 8 % 3 < 2) & (kv_idx // 8 <= q_idx), 2),
        # of the head, and of both: only what is in them
        ((kv_idx // 8 + h) % 4 < 2, 1),
        ((q_idx // 8 + kv_idx // 9) % 4 < b + 1, 2),
        ((q_idx - kv_idx + 1000) // 50 * 2 < abs(q_idx - kv_idx) % 37, 1),
        (lookup(IDS, kv_idx // 2) < 3, 1),
        (neighborhood((20, 25), 5), 6),
    ],
    ids=str,
)
def test_a_part_that_reads_one_number_is_one_table(mask, n_tables, q_offset):
    grid = GRID._replace(q_offset=q_offset)
    if "neighborhood" in mask.name and q_offset != 0:
        return  # it has no query past its grid
    new = tabulated(mask, grid)
    assert len([x for x in tables_of(new) if len(x) == SHORTEST]) == n_tables
    assert torch.equal(dense(new, grid), dense(mask, grid))


def test_one_query_divides_nothing_twice():
    mask = chunked(40)
    assert tabulated(mask, GRID._replace(q_len=1)) is mask


def test_floats_and_functions_stay_with_the_kernel():
    traced = from_mask_mod(lambda b, h, q, kv: (q // 3).float().sqrt() + torch.sin(kv % 5) < 2)
    new = tabulated(traced, GRID)
    assert "sqrt(float32(lookup(int32[65536]" in str(new)
    assert "opaque<aten.sin>" in str(new)
    assert torch.equal(dense(new, GRID), dense(traced, GRID))


def test_large_values_are_not_cut_off():
    mask = (q_idx // 2 * 2**40).equals(kv_idx // 2 * 2**40)
    assert {x.dtype for x in tables_of(tabulated(mask, GRID))} == {torch.int64}
    assert torch.equal(dense(tabulated(mask, GRID), GRID), dense(mask, GRID))


def test_tables_are_data_of_a_kernel():
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for q_offset in (None, 0, -41):
        for q_len, kv_len, size in ((300, 300, 40), (129, 400, 7), (1, 77, 9), (700, 260, 100)):
            mask = (q_idx // size).equals(kv_idx // size) | ((q_idx - kv_idx) % size).equals(3)
            attend = compile_mask(mask, q_len, kv_len, q_offset=q_offset)
            q = torch.randn(2, 3, q_len, 16)
            k, v = torch.randn(2, 2, 3, kv_len, 16)
            expected = attend(q, k, v, executor="reference")
            for executor in ("flex", "blockwise"):
                torch.testing.assert_close(attend(q, k, v, executor=executor), expected)
    # one query has a kernel of its own, as without tables
    assert graphs["unique_graphs"] - before <= 2
