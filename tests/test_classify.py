import pytest
import torch
from hypothesis import given, settings
from oracles import dense, dense_classes, everywhere, grids, indices, masks, painted

from flexsparse import b, from_mask_mod, h, kv_idx, lookup, q_idx
from flexsparse.analysis import classify as classify_module
from flexsparse.analysis import validate
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import CELLS_TO_BEGIN_WITH, classify
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.analysis.validate import find, problem
from flexsparse.analysis.whole import leaves_int64, whole_bounds
from flexsparse.expr import Mask
from flexsparse.masks import causal, full, sink, window
from flexsparse.tensors import TENSOR_READING
from flexsparse.tree import VARIABLES, evaluate

CPU = torch.device("cpu")


@settings(max_examples=200)
@given(masks, grids)
def test_empty_and_full_are_proofs(mask, grid):
    if problem(mask, grid, CPU) is not None:
        return  # beyond int64; refused when compiling
    expected = dense_classes(dense(mask, grid), grid.block_size)
    assert torch.equal(painted(classify(mask, grid)), expected)


@settings(max_examples=150)
@given(indices, grids)
def test_an_interval_holds_every_value(index, grid):
    every = list(whole_bounds(index, grid))
    if any(leaves_int64(*found) for found in every):
        return
    lo, hi = every[-1][1]
    places = dense_index(index, grid)
    assert lo <= int(places.min())
    assert int(places.max()) <= hi


def dense_index(index, grid):
    return torch.as_tensor(
        evaluate(index, dict(zip(VARIABLES, everywhere(grid), strict=True)), TENSOR_READING)
    )


@settings(max_examples=100)
@given(masks, grids)
def test_find_finds_a_place_exactly_when_there_is_one(mask, grid):
    if problem(mask, grid, CPU) is not None:
        return
    place = find(mask, grid)
    assert (place is not None) == bool(dense(mask, grid).any())
    if place is not None:
        assert bool(mask(*map(torch.tensor, place)))


def test_find_looks_along_what_a_mask_reads(monkeypatch):
    grids = []
    monkeypatch.setattr(validate, "classify", lambda m, g: grids.append(g) or classify(m, g))
    grid = Grid(300, 200, 7, (16, 16), 2, (0, 3))
    assert find((kv_idx * 3).equals(150), grid) == (0, 0, 7, 50)
    assert find((q_idx * 3).equals(150) & h.equals(3), grid) == (0, 3, 50, 0)
    assert [(x.q_len, x.kv_len, x.planes) for x in grids] == [(1, 200, 1), (300, 1, 2)]


@pytest.mark.parametrize("n", [1 << 16, 1 << 20])
def test_the_cost_follows_the_boundary(n):
    classes = classify(causal & (sink(64) | window(256)), Grid(n, n, 0, (128, 128), 1, (0,)))
    rows = n // 128
    # three blocks of the band (the first and last of a row cut) and the sink's block
    assert classes.full.blocks == rows - 1
    assert classes.partial.blocks == (rows - 2) + rows + (rows - 3)
    assert classes.evaluated == 0


def test_full_cells_stay_whole():
    n = 1 << 20
    classes = classify(full, Grid(n, n, 0, (128, 128), 1, (0,)))
    assert len(classes.full.plane) <= CELLS_TO_BEGIN_WITH
    assert classes.full.blocks == (n // 128) ** 2


def test_planes_may_be_more_than_cells_to_begin_with():
    grid = Grid(60, 200, 0, (16, 16), 2 * CELLS_TO_BEGIN_WITH, (0, 5))
    mask = (kv_idx <= q_idx + b) & (kv_idx > h)
    assert torch.equal(painted(classify(mask, grid)), dense_classes(dense(mask, grid), (16, 16)))


def test_a_ragged_last_block_is_at_most_partial():
    classes = classify(full, Grid(200, 300, 100, (128, 128), 1, (0,)))
    assert painted(classes)[0, 0].tolist() == [[2, 2, 1], [1, 1, 1]]


def test_a_block_may_be_far_longer_than_the_tokens():
    mask = q_idx.equals(37) & kv_idx.equals(85)
    classes = classify(mask, Grid(100, 100, 0, (2**30, 2**30), 1, (0,)))
    assert painted(classes)[0, 0].tolist() == [[1]]


def test_blocks_without_witnesses_are_evaluated():
    # the one true element of block (0, 0) lies where no witness looks
    mask = q_idx.equals(37) & kv_idx.equals(85)
    classes = classify(mask, Grid(256, 256, 0, (128, 128), 1, (0,)))
    assert painted(classes)[0, 0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("block_size", [(128, 128), (64, 256), (32, 32), (96, 100), (1, 128)])
@pytest.mark.parametrize("n", [1000, 1024])
def test_blocks_that_no_border_tells_apart_are_settled_by_their_parts(block_size, n):
    # rectangles inside of blocks, their holes, and a diagonal of which bounds know nothing
    table = torch.arange(n)
    inside = (q_idx % 128 > 40) & (q_idx % 128 < 90) & (kv_idx % 128 > 50) & (kv_idx % 128 < 60)
    dots = (lookup(table, q_idx) * 7 - q_idx * 7 + q_idx % 64).equals(kv_idx % 64 + 1)
    grid = Grid(n, n, 0, block_size, 1, (0,))
    for mask in (inside, ~inside, inside & dots, (kv_idx < 640) & (inside | ~dots)):
        expected = dense_classes(dense(mask, grid), block_size)
        assert torch.equal(painted(classify(mask, grid)), expected)


def test_a_table_that_cancels_itself_is_settled_by_looking():
    table = torch.arange(512)
    same = lookup(table, kv_idx).equals(kv_idx)
    classes = classify(same & causal, Grid(512, 512, 0, (128, 128), 1, (0,)))
    assert torch.equal(painted(classes), painted(classify(causal, classes.grid)))
    assert classes.evaluated > 0


HEADS = {
    "bits": lambda h: (0b1010 >> h) & 1,
    "power": lambda h: (2**h) % 5,
    "wide remainder": lambda h: (h * 636413622384679 + 7) % 8,
    "narrow": lambda h: ((h.to(torch.int8) * 100).long() + 128) % 256,
}


@pytest.mark.parametrize("row", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("of_batch", [False, True])
def test_a_table_read_at_a_function_of_the_head(row, of_batch):
    table = torch.arange(256) * 90 % 400
    mask = from_mask_mod(lambda b, h, q, k: k <= q - table[row(b if of_batch else h)])
    grid = Grid(256, 256, 0, (64, 64), *((4, (0,)) if of_batch else (1, (0, 1, 2, 3))))
    assert torch.equal(painted(classify(mask, grid)), dense_classes(dense(mask, grid), (64, 64)))


def test_a_float_that_may_be_anything_somewhere_overflows_nowhere(monkeypatch):
    # divided by 0 where q is 40, and up to 2**61 elsewhere, which the product wraps round
    monkeypatch.setattr(classify_module, "CELLS_AT_ONCE", 64)  # else the 0 is among the cells
    mask = from_mask_mod(lambda b, h, q, k: (k * 1e17 / (q - 40)).long() * 1000003 > 0)
    grid = Grid(512, 512, 0, (16, 16), 1, (0,))
    assert torch.equal(painted(classify(mask, grid)), dense_classes(dense(mask, grid), (16, 16)))


def test_constant_masks():
    grid = Grid(256, 256, 0, (128, 128), 1, (0,))
    assert classify(Mask("const", payload=True), grid).full.blocks == 4
    assert classify(Mask("const", payload=False), grid).blocks == 0


def test_rectangles_are_cut_into_rows_and_blocks():
    rectangles = Rectangles(*torch.tensor([[0, 2, 4, 1, 3], [1, 5, 6, 0, 2]]).T)
    rows = [[0, 2, 3, 1, 3], [0, 3, 4, 1, 3], [1, 5, 6, 0, 2]]
    assert torch.stack(rectangles.rows()).T.tolist() == rows
    blocks = [(0, 2, 1), (0, 2, 2), (0, 3, 1), (0, 3, 2), (1, 5, 0), (1, 5, 1)]
    units = rectangles.units()
    found = zip(*(x.tolist() for x in (units.plane, units.row0, units.column0)), strict=True)
    assert list(found) == blocks
    assert (units.blocks, rectangles.blocks, rectangles.of_plane(1).blocks) == (6, 6, 2)
    again = Rectangles.joined([rectangles.of_plane(0), rectangles.where(slice(1, 2))])
    assert torch.equal(torch.stack(again), torch.stack(rectangles))
    assert rectangles.where(slice(0)).units().blocks == 0
