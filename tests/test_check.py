"""check and diff against brute force."""

import time

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from oracles import dense, dense_classes, grids, masks

from flexsparse import MaskError, b, check, diff, h, kv_idx, lookup, per_head, q_idx
from flexsparse.analysis.classify import classify
from flexsparse.analysis.validate import problem
from flexsparse.masks import causal, full, padding, sink, window
from flexsparse.questions.gaps import empty_rows, unseen_keys

STREAMING = causal & (sink(4) | window(100))
ONE_IN_THREE = ((q_idx - kv_idx) % 3).equals(0)
drawn = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def positions(ranges):
    return [x for part in ranges for x in part]


def missing(kept, offset=0):
    """Positions of the lines of each plane that keep nothing."""
    return [(~x.any(-1)).nonzero().add(offset).flatten().tolist() for x in kept.flatten(0, 1)]


@drawn
@given(masks, grids)
def test_gaps_are_those_of_the_dense_mask(mask, grid):
    assume(problem(mask, grid, torch.device("cpu")) is None)
    classes, kept = classify(mask, grid), dense(mask, grid)
    assert [*map(positions, empty_rows(mask, classes))] == missing(kept, grid.q_offset)
    assert [*map(positions, unseen_keys(mask, classes))] == missing(kept.mT)


@drawn
@given(masks, masks, grids)
def test_diff_finds_the_blocks_that_differ(left, right, grid):
    assume(problem(left & right, grid, torch.device("cpu")) is None)
    n = max(grid.heads) + 1
    grid = grid._replace(heads=tuple(range(n)))
    found = diff(
        left,
        right,
        grid.q_len,
        grid.kv_len,
        batch=grid.batch,
        n_heads=n,
        q_offset=grid.q_offset,
        block_size=grid.block_size,
    )
    kept = [dense(mask, grid) for mask in (left, right)]
    differing = dense_classes(kept[0] ^ kept[1], grid.block_size) > 0
    assert bool(found) == bool(differing.any())
    # heads and batch rows that cannot differ from each other are shown once
    assert found.blocks == int(differing.sum())
    if found.pair:
        assert all(bool(differing[block]) for block in found.first_blocks)
        place, kept_by = found.pair[:4], found.pair.kept_by
        at = (*place[:2], place[2] - grid.q_offset, place[3])
        assert [bool(x[at]) for x in kept] == [kept_by == "a", kept_by == "b"]


@pytest.mark.parametrize(
    "mask",
    [
        lookup(torch.arange(700) % 50 > 3, q_idx) & ONE_IN_THREE & causal & window(5),
        (q_idx + 1).equals(kv_idx) | (q_idx < 3),
        ((kv_idx * 7) % 700).equals(q_idx) & (kv_idx > 100),
        lookup(torch.arange(700 * 700).view(700, 700) % 997 < 2, q_idx, kv_idx),
    ],
)
def test_gaps_between_single_tokens(mask):
    found, kept = check(mask, 700, 700), mask(0, 0, torch.arange(700)[:, None], torch.arange(700))
    for parts, pairs in ((found.empty_rows, kept), (found.unseen_keys, kept.T)):
        expected = missing(pairs[None, None])[0]
        assert [x for part in parts for x in positions(part.positions)] == expected


@pytest.mark.parametrize(
    "mask", [causal & (sink(64) | window(256)), causal & window(1), STREAMING, ~causal]
)
def test_a_million_tokens_take_no_time(mask):
    start = time.perf_counter()
    found = check(mask, 1 << 20, 1 << 20)
    assert time.perf_counter() - start < 10  # 0.02 to 0.1 s on an idle core
    assert sum(x.count for x in found.empty_rows) == (mask == ~causal)


def test_a_mask_without_gaps_is_ok():
    found = STREAMING.check(1000, 1000)
    assert found
    assert found.ok
    assert str(found).endswith("every query sees a key, and every key is seen")


def test_queries_before_every_key_are_listed_by_position():
    found = causal.check(200, 100)
    assert not found
    assert found.empty_rows[0].positions == (range(-100, 0),)
    assert "100 queries see no key: q_idx -100 to -1" in str(found)


def test_gaps_are_listed_once_for_heads_that_share_them():
    found = check(per_head([causal, window(3) & ~causal, causal, ~causal]), 300, 300)
    gaps = {x.heads: x.positions for x in found.empty_rows}
    assert gaps == {(1, 3): (range(299, 300),)}
    assert {x.heads: x.positions for x in found.unseen_keys} == {(1, 3): (range(1),)}
    assert found.depends_on == ("h",)


def test_gaps_are_listed_for_batch_rows():
    found = check(padding(torch.tensor([300, 40, 40])), 300, 300, batch=3)
    assert [(x.batch, x.count) for x in found.unseen_keys] == [((1, 2), 260)]
    assert "batch rows 1-2" in str(found)


def test_a_mask_of_the_head_needs_the_number_of_heads():
    found = (causal & (kv_idx > h)).check(300, 300)
    assert found.depends_on == ("h",)
    assert "give n_heads=..." in found.broken[0]
    found = check(kv_idx > h + b, 9, 9, n_heads=2, batch=1)
    assert [x.heads for x in found.unseen_keys] == [(0,), (1,)]


def test_a_table_read_out_of_range_has_an_example():
    found = (causal & lookup(torch.ones(100).bool(), kv_idx)).check(300, 300)
    assert not found.ok
    assert "read out of range" in found.broken[0]
    assert "kv_idx=128" in found.broken[0]


def test_index_arithmetic_beyond_int32_is_listed_at_its_smallest():
    found = ((q_idx * 5_000_000 + kv_idx) % 7 < 5).check(1000, 500)
    beyond = found.beyond_int32
    assert [x.expression for x in beyond] == ["q_idx * 5000000"]
    assert beyond[0].lo == -500 * 5_000_000
    assert causal.check(1 << 20, 1 << 20).beyond_int32 == ()


def test_masks_that_are_equal_are_proved_so():
    same = diff(STREAMING, STREAMING & (kv_idx >= 0), 1 << 15, 1 << 15)
    assert not same
    assert str(same).startswith("no difference, proved in all of 65,536 blocks")


def test_a_difference_names_a_pair():
    found = diff(STREAMING, causal & (sink(4) | window(101)), 1000, 1000)
    assert found.pair == (0, 0, 104, 4, "b")
    assert "q_idx=104, kv_idx=4: b keeps the pair and a drops it" in str(found)


def test_masks_of_heads_are_compared_head_by_head():
    found = diff(per_head([causal, STREAMING, full]), causal, 300, 300)
    assert [x.h for x in found.first_blocks] == [1] * 5 + [2] * 3
    assert found.of_blocks == 27
    assert not diff(per_head([causal] * 3), causal, 300, 300)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: diff(window, causal, 9, 9), "diff takes a Mask .*, and a is function. Call the"),
        (lambda: diff(causal, kv_idx > h, 9, 9), "diff: The mask reads h, .* give n_heads="),
        (lambda: diff(per_head([causal]), per_head([causal] * 2), 9, 9), "1 heads and b for 2"),
        (lambda: diff(causal, full, 9, 9, block_size=0), "block_size=0; it must be an int"),
        (lambda: check(causal, 0, 9), "check: q_len=0; it must be an int of 1 or more"),
        (lambda: check(causal, 9, 10**11), "check: kv_len=100000000000; it must be at most"),
        (lambda: check(causal, 9, 9, q_offset=1.5), "check: q_offset=1.5; it must be an int"),
        (
            lambda: check([causal], 9, 9),
            r"check takes a Mask .*, not list. Wrap the list: per_head",
        ),
        (lambda: check(window, 9, 9), "check takes a Mask or per_head.*, not function"),
        (lambda: check(per_head([causal]), 9, 9, n_heads=2), "got 1 masks but n_heads=2"),
    ],
)
def test_bad_arguments_are_named(call, sentence):
    with pytest.raises(MaskError, match=sentence):
        call()
