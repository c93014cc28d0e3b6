"""What is said to be reached in a block is there, and blocks of usual masks need no look."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import dense, dense_classes, everywhere, grids, indices, masks, painted, unknown

from flexsparse import h, kv_idx, lookup, maximum, minimum, q_idx
from flexsparse.analysis import settle
from flexsparse.analysis.cells import Grid, all_cells, interval_reading, kept_pyramids
from flexsparse.analysis.classify import classify
from flexsparse.analysis.pyramid import Pyramid
from flexsparse.analysis.reached import block_variables, bound_blocks, reached_reading
from flexsparse.analysis.validate import problem
from flexsparse.analysis.whole import leaves_int64, whole_bounds
from flexsparse.expr import Index
from flexsparse.masks import block_sparse, causal, chunked, sink, strided, window
from flexsparse.tensors import TENSOR_READING
from flexsparse.tree import VARIABLES, evaluate

CPU = torch.device("cpu")
PLAIN = Grid(512, 512, 0, (128, 128), 1, (0,))
GENERATOR = torch.Generator().manual_seed(3)
COLUMNS = torch.rand(512, generator=GENERATOR) < 0.05
BLOCKS = torch.rand(8, 8, generator=GENERATOR) < 0.5


def reading_of(mask, grid):
    pyramid_of = kept_pyramids()
    return reached_reading(interval_reading(mask, grid, pyramid_of), pyramid_of)


def in_blocks(x, grid):
    """What an expression is in each block, element by element, in the order of all_cells."""
    shape = (grid.batch, len(grid.heads), grid.q_len, grid.kv_len)
    values = torch.as_tensor(
        evaluate(x, dict(zip(VARIABLES, everywhere(grid), strict=True)), TENSOR_READING)
    )
    for plane in values.expand(shape).flatten(0, 1):
        for rows in plane.split(grid.block_size[0]):
            yield from rows.split(grid.block_size[1], dim=1)


@settings(max_examples=200)
@given(indices, grids)
@example(q_idx // (kv_idx % 2 * 20 + 1), PLAIN)  # 0 to 6 and 0 to 127, 6 to 12 and 128 to 255
def test_what_an_index_is_said_to_reach_it_reaches(index, grid):
    if any(leaves_int64(*found) for found in whole_bounds(index, grid)):
        return
    cells = all_cells(grid, 1)
    reach = evaluate(index, block_variables(grid, cells), reading_of(index < 0, grid))
    if reach.bounds is None:
        assert reach.reached is False
        return
    claims = (*reach.bounds, reach.reached, reach.gapless)
    claims = zip(*[torch.as_tensor(x).expand(cells[0].shape).tolist() for x in claims], strict=True)
    for (lo, hi, reached, gapless), values in zip(claims, in_blocks(index, grid), strict=True):
        if reached:
            assert (lo, hi) == tuple(map(int, values.aminmax()))
        if gapless:
            assert torch.equal(values.unique(), torch.arange(lo, hi + 1))


@settings(max_examples=300)
@given(st.integers(0, 10**6), st.sampled_from([(700,), (33, 50), (5, 300), (4, 6, 40)]))
def test_bounds_of_a_table_are_said_to_be_reached_where_they_are(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    # few entries differ, so that bounds too wide are often entries all the same
    table = (torch.rand(shape, generator=generator) * 1.03).int()
    table = table.bool() if seed % 2 else table
    ends = [torch.randint(0, n, (2, 40), generator=generator).sort(0).values for n in shape]
    if seed % 3 == 0:  # one entry of the first dimension, or aligned parts of it
        ends[0][1] = ends[0][0]
    elif seed % 3 == 1:
        ends[0] = torch.stack([ends[0][0] // 4 * 4, ends[0][0] // 4 * 4 + 3]).clamp(
            max=shape[0] - 1
        )
    bounds = Pyramid(table).bounds(*zip(*ends, strict=True), ask_reached=True)
    bounds = [torch.as_tensor(x).expand(40).tolist() for x in bounds]
    for i, (lo, hi, reached) in enumerate(zip(*bounds, strict=True)):
        part = table[tuple(slice(int(e[0, i]), int(e[1, i]) + 1) for e in ends)].int()
        assert lo <= int(part.min())
        assert int(part.max()) <= hi
        assert not reached or (lo, hi) == (int(part.min()), int(part.max()))


def test_bounds_of_aligned_parts_of_a_table_are_reached():
    table = torch.randint(0, 1000, (1030, 130), generator=GENERATOR)
    first, last = torch.arange(0, 1030, 128), torch.arange(127, 1155, 128).clamp(max=1029)
    begin, end = torch.full_like(first, 0), torch.full_like(first, 127)
    lo, hi, reached = Pyramid(table).bounds([first, begin], [last, end], ask_reached=True)
    assert reached.all()
    assert hi.tolist() == [int(table[x : x + 128, :128].max()) for x in first.tolist()]
    assert lo.tolist() == [int(table[x : x + 128, :128].min()) for x in first.tolist()]


long_tables = st.integers(0, 1000).map(
    lambda seed: (
        (torch.rand(1200, generator=torch.Generator().manual_seed(seed)) * 1.02 * (1 + seed % 9))
        .int()
        .to((torch.int64, torch.int8)[seed % 2])
    )
)
places = st.sampled_from(
    [
        maximum(q_idx, 0),
        kv_idx,
        kv_idx // 2,
        abs(q_idx - kv_idx),
        maximum(q_idx - kv_idx, 0),
        maximum(minimum(q_idx + kv_idx, 700), 3),
        (q_idx + kv_idx) % 513,
        kv_idx * 2,
    ]
)
looked_up = st.builds(lookup, long_tables, places)


@settings(max_examples=200)
@given(
    st.one_of(
        st.builds(lambda x, y: x < y, looked_up, looked_up),
        st.builds(lambda x, y: x.equals(y), looked_up, looked_up),
        st.builds(lambda x, n: (x % 3).equals(n), looked_up, st.integers(0, 2)),
        st.builds(lambda x, y: (x <= 0) & (y < 1), looked_up, looked_up),
        st.builds(lambda x, y: (x <= 0) | ~(y <= 1), looked_up, looked_up),
    ),
    grids,
)
def test_masks_of_long_tables_are_classified(mask, grid):
    assert problem(mask, grid, CPU) is None
    assert torch.equal(
        painted(classify(mask, grid)), dense_classes(dense(mask, grid), grid.block_size)
    )


@settings(max_examples=200)
@given(masks, grids)
@example(unknown(kv_idx).equals(q_idx), PLAIN)
def test_what_a_mask_is_said_to_be_somewhere_it_is(mask, grid):
    if problem(mask, grid, CPU) is not None:
        return
    claims = bound_blocks(mask, reading_of(mask, grid), grid, all_cells(grid, 1))
    claims = zip(*[x.tolist() for x in claims], strict=True)
    for (always, ever, some, not_all), kept in zip(claims, in_blocks(mask, grid), strict=True):
        assert always <= bool(kept.all())
        assert ever >= bool(kept.any())
        assert some <= bool(kept.any())
        assert not_all <= bool(not kept.all())


@pytest.mark.parametrize(
    "mask",
    [
        causal,
        window(200),
        sink(70),
        causal | (q_idx < 256),
        ~causal,
        chunked(50),
        strided(7),
        (q_idx + kv_idx) % 9 < 2,
        abs(q_idx - kv_idx) < 100,
        maximum(q_idx, 100) < minimum(kv_idx, 300),
        (q_idx < 200) & (kv_idx < 300),
        lookup(COLUMNS, kv_idx) | lookup(COLUMNS, q_idx),
        lookup(COLUMNS, maximum(q_idx - kv_idx, 0)),
        q_idx - kv_idx < lookup(torch.tensor([70, 200]), h),
        kv_idx < h * 70 + 3,
        Index("narrow", (q_idx - kv_idx,), torch.int16) < 100,
        block_sparse(BLOCKS, 64),
        kv_idx < lookup(torch.arange(512) * 3 // 2, q_idx),
    ],
    ids=str,
)
def test_blocks_of_usual_masks_need_no_look(mask, monkeypatch):
    looked_at = []
    look = settle._look
    monkeypatch.setattr(
        settle, "_look", lambda m, g, cells, *x: looked_at.extend(cells[0]) or look(m, g, cells, *x)
    )
    grid = PLAIN._replace(heads=(0, 1))
    classes = classify(mask, grid)
    assert classes.partial.blocks
    assert not looked_at
    kept = dense(mask, grid)
    assert classes.full.blocks == sum(bool(x.all()) for x in in_blocks(mask, grid))
    assert classes.blocks == sum(bool(x.any()) for x in in_blocks(mask, grid))
    assert kept.any()
