import collections
import copy
import functools
import operator
import os
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from oracles import grids, masks

from flexsparse import (
    MaskError,
    b,
    compile_mask,
    diff,
    everything,
    h,
    kv_idx,
    lookup,
    maximum,
    minimum,
    nothing,
    parse,
    pattern,
    per_head,
    q_idx,
    where,
)
from flexsparse.lower import lower
from flexsparse.masks import causal, sink, window
from flexsparse.tree import evaluate

TABLE = torch.arange(8)
ROWS, COLUMNS = torch.arange(8)[:, None], torch.arange(8)

# an expression and what it means, element by element
MEANINGS = [
    (q_idx + 1 <= kv_idx, ROWS + 1 <= COLUMNS),
    (1 + q_idx < kv_idx, 1 + ROWS < COLUMNS),
    (7 - q_idx > kv_idx, 7 - ROWS > COLUMNS),
    (2 * q_idx >= kv_idx * 3, 2 * ROWS >= COLUMNS * 3),
    ((q_idx // 2).equals(kv_idx // 3), ROWS // 2 == COLUMNS // 3),
    ((kv_idx - 5) // 3 < -1, (COLUMNS - 5) // 3 < -1 + 0 * ROWS),
    ((kv_idx - q_idx) % 3 <= 1, (COLUMNS - ROWS) % 3 <= 1),
    ((kv_idx - q_idx) % -3 <= -1, (COLUMNS - ROWS) % -3 <= -1),
    (20 // (q_idx + 1) < 20 % (kv_idx + 1), 20 // (ROWS + 1) < 20 % (COLUMNS + 1)),
    (-q_idx <= -kv_idx, -ROWS <= -COLUMNS),
    (abs(q_idx - kv_idx) < 2, (ROWS - COLUMNS).abs() < 2),
    (minimum(q_idx, 4) <= maximum(kv_idx, 2), ROWS.clamp(max=4) <= COLUMNS.clamp(min=2)),
    (lookup(TABLE * 3 % 8, q_idx) < kv_idx, TABLE[:, None] * 3 % 8 < COLUMNS),
    (lookup(TABLE % 2 == 0, kv_idx) ^ causal, (COLUMNS % 2 == 0) ^ (COLUMNS <= ROWS)),
    (everything & ~nothing, torch.tensor(True)),
]

EQUAL = [
    (causal & window(3), (kv_idx <= q_idx) & (q_idx - kv_idx < 3)),
    (causal.named("mine"), causal),
    (lookup(torch.arange(4), h) < kv_idx, lookup(torch.arange(4), h) < kv_idx),
    (causal.at(q_idx=q_idx + 5), kv_idx <= q_idx + 5),
    (q_idx >= kv_idx, kv_idx <= q_idx),
    ((q_idx - kv_idx).abs() < 3, abs(q_idx - kv_idx) < 3),
    (q_idx < np.int64(5), np.int64(5) > q_idx),
    (q_idx < np.uint8(5), q_idx < 5),
]
DIFFERENT = [
    (causal & window(3), causal & window(4)),
    (causal & window(3), window(3) & causal),
    (lookup(torch.arange(4), h) < kv_idx, lookup(torch.arange(4) + 1, h) < kv_idx),
    (lookup(torch.arange(4), h) < kv_idx, lookup(torch.arange(4).int(), h) < kv_idx),
    (sink(1), everything),
]

MISTAKES = [
    (lambda: causal and causal, "use & | ~, and split"),
    (lambda: not causal, "no single truth value"),
    (lambda: 0 <= q_idx <= 4, "split `a <= x < b`"),
    (lambda: bool(q_idx), "Compare it"),
    (lambda: q_idx & kv_idx <= 4, "parentheses round comparisons"),
    (lambda: causal | (q_idx == kv_idx), r"write a\.equals\(b\)"),
    (lambda: (q_idx == kv_idx) & causal, r"write a\.equals\(b\)"),
    (lambda: causal & q_idx, "one side is Index"),
    (lambda: causal & window, "Call the pattern first"),
    (lambda: q_idx / 2, "use // "),
    (lambda: q_idx + 0.5, "not float"),
    (lambda: q_idx + True, "not bool"),
    (lambda: q_idx + TABLE, r"fs\.lookup\(table"),
    (lambda: q_idx // 0, "Division by zero: q_idx // 0"),
    (lambda: q_idx % 0, "Division by zero"),
    (lambda: q_idx // np.int64(0), "Division by zero"),
    (lambda: q_idx < 2**62, r"beyond 2\*\*61"),
    (lambda: window(0), r"window\(size=0\) sees no key.*use size >= 1"),
    (lambda: window(-3), "sees no key"),
    (lambda: sink(-1), "0 or more"),
    (lambda: lookup([1, 2], q_idx), "reads a torch.Tensor, not list.*torch.as_tensor"),
    (lambda: lookup([0] * 9999, q_idx), r"list: \[0, 0, 0, 0, 0, 0, \.\.\.\]\. Make"),
    (lambda: q_idx < [0] * 9999, r"not list: \[0, 0, 0, 0, 0, 0, \.\.\.\]\. Read"),
    (lambda: lookup(torch.rand(4), q_idx), "the table is torch.float32"),
    (lambda: lookup(TABLE.to(torch.uint16), q_idx), r"is torch.uint16\. Use \.long\(\)"),
    (lambda: lookup(TABLE.to_sparse(), q_idx), r"is torch.sparse_coo; use \.to_dense\(\)"),
    (lambda: lookup(TABLE, q_idx, kv_idx), "2 indices for a table of 1 dimensions"),
    (lambda: lookup(TABLE[:0], q_idx), "empty table"),
    (lambda: [1, 2][q_idx], r"fs\.lookup\(table"),
    (lambda: int(kv_idx), "not one number"),
    (lambda: q_idx**2, r"Write x \* x"),
    (lambda: q_idx << 2, r"x \* 4"),
    (lambda: 5 >> q_idx, "x // 4"),
    (lambda: ~q_idx, "compare it first"),
    (lambda: max(q_idx, 3), r"fs\.maximum\(x, 3\)"),
    (lambda: causal + causal, r"Combine Masks with &"),
    (lambda: causal - causal, r"a & ~b is a without b"),
    (lambda: causal < 3, r"fs\.where\(mask, 1, 0\)"),
    (lambda: causal & ~(q_idx == kv_idx), r"write ~a\.equals\(b\)"),
    (lambda: where(causal, True, False), "two Masks.*bool.*fs.everything or fs.nothing for True"),
    (lambda: where(causal, 3, True), "two Masks, but one side is int"),
    (lambda: causal.named(3), r"named\(3\): a label must be a str of one line"),
    (lambda: causal.named("a\nb"), "one line"),
    (lambda: causal.to("nowhere"), "device='nowhere' cannot be used here"),
    (lambda: (lookup(TABLE, q_idx) < 3).to(3.5), r"device=3\.5 cannot be used here"),
    (lambda: causal.at(row=q_idx), r"got \['row'\]"),
    (lambda: per_head([]), "no masks"),
    (lambda: per_head(causal), "per_head got Mask; it takes a list of masks"),
    (lambda: per_head(3), "per_head got int; it takes a list of masks"),
    (lambda: per_head([causal, window]), "window"),
]


@pytest.mark.parametrize(("mask", "expected"), MEANINGS, ids=lambda x: str(x)[:40])
def test_a_mask_is_a_mask_mod(mask, expected):
    kept = mask(torch.tensor(0), torch.tensor(0), ROWS, COLUMNS)
    assert kept.dtype == torch.bool
    assert torch.equal(kept.expand(8, 8), expected.expand(8, 8))


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=str)
def test_equal_masks(one, other):
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=str)
def test_different_masks(one, other):
    assert one != other


@pytest.mark.parametrize(
    ("build", "message"), MISTAKES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_mistakes_get_a_sentence(build, message):
    with pytest.raises(MaskError, match=message):
        build()


def test_variables_and_tables():
    mask = (kv_idx < lookup(TABLE, h)) & causal
    assert mask.variables == {"h", "kv_idx", "q_idx"}
    assert [repr(t) for t in mask.tables] == ["int64[8]"]


def test_a_mask_is_where_its_tables_are():
    assert causal.device is None
    elsewhere = (lookup(TABLE, q_idx) < kv_idx).to("meta")
    assert elsewhere.device == torch.device("meta")
    with pytest.raises(MaskError, match="is on meta, where tensors have no values"):
        compile_mask(elsewhere, 8, 8, device="cpu")


def test_terms_that_do_not_move_keep_their_names():
    assert (causal & sink(64)).at(q_idx=q_idx + 1).name == "(kv_idx <= q_idx + 1) & sink(64)"


def test_a_changed_table_is_noticed():
    ids = torch.arange(8)
    mask = lookup(ids, q_idx).equals(3)
    assert not mask.tables[0].changed
    ids[2] = 3
    assert mask.tables[0].changed


def test_masks_are_shown_in_the_names_they_were_composed_from():
    mask = causal & (sink(64) | window(size=256))
    assert mask.name == "causal & (sink(64) | window(size=256))"
    assert str(mask) == "(kv_idx <= q_idx) & ((kv_idx < 64) | (q_idx - kv_idx < 256))"


def test_a_pattern_of_ones_own_is_named_after_its_call():
    @pattern
    def every(n):
        return (kv_idx % n).equals(0)

    assert (every(4) & causal).name == "every(4) & causal"


def test_a_name_is_one_line_whatever_the_arguments_are():
    @pattern
    def first_of(tables):
        return kv_idx < int(tables.min())

    assert first_of(np.arange(6).reshape(2, 3)).name == "first_of(array([[0, 1, 2], [3, 4, 5]]))"


@settings(max_examples=150)
@given(masks)
def test_text_round_trips(mask):
    if mask.tables:
        assert "lookup" in str(mask)
    else:
        assert parse(str(mask)) == mask


@settings(max_examples=100)
@given(masks, grids)
def test_lowering_changes_nothing(mask, grid):
    where = [torch.arange(2).view(-1, 1, 1, 1), torch.arange(3).view(-1, 1, 1)]
    where += [torch.arange(grid.q_len)[:, None], torch.arange(grid.kv_len)]
    lowered = lower(mask, torch.device("cpu"), grid.q_offset, wide=True)
    moved = [where[0], where[1], where[2] + grid.q_offset, where[3]]
    shape = (2, 3, grid.q_len, grid.kv_len)
    assert torch.equal(lowered(*where).expand(shape), mask(*moved).expand(shape))


def test_masks_of_one_structure_are_lowered_to_one_code_object():
    cpu = torch.device("cpu")
    codes = {
        lower(causal & (sink(s) | window(w)), cpu, offset).__code__
        for s, w, offset in [(4, 64, 0), (64, 64, 7), (0, 1, -3), (1, 2**40, 0)]
    }
    assert len(codes) == 1
    assert lower(causal & window(3), cpu).__code__ not in codes


def test_long_chains_do_not_recurse():
    mask = causal
    for i in range(5000):
        mask = mask | (kv_idx.equals(i) & b.equals(0))
    assert hash(mask) == hash(mask.named("long"))
    assert mask(0, 0, torch.tensor(3), torch.tensor(9)).item()
    assert parse(str(mask)) == pickle.loads(pickle.dumps(mask)) == mask
    assert mask.explain(3, 9)
    assert compile_mask(mask, 128, 128, batch=1).launches[0].classes.blocks


class Result:
    pass


def test_reading_a_long_mask_holds_few_results_at_once():
    alive, counts = weakref.WeakSet(), []

    def apply(*_):
        alive.add(result := Result())
        counts.append(len(alive))
        return result

    mask = functools.reduce(operator.or_, (kv_idx.equals(i) for i in range(500)))
    evaluate(mask, {"kv_idx": Result()}, collections.defaultdict(lambda: apply))
    assert len(counts) > 1000
    assert max(counts) < 8


def test_long_masks_are_compiled_compared_drawn_and_moved():
    index, mask = kv_idx, causal
    for i in range(200):
        index, mask = minimum(index + 1, index + 2), ~(mask & ~kv_idx.equals(3 * i))
    mask = (mask | (index < 5)).at(kv_idx=kv_idx + 1).to("cpu")
    attend = compile_mask(mask, 128, 256)
    assert attend.launches[0].classes.blocks
    assert "CompiledMask" in str(pickle.loads(pickle.dumps(attend)))
    assert str(mask.check(128, 256)).startswith("check of")
    assert not diff(mask, copy.deepcopy(mask), 128, 256)
    assert "<img" in mask._repr_html_()


ELSEWHERE = """
import pickle, sys, torch
from flexsparse import kv_idx, lookup, q_idx
from flexsparse.masks import causal, window
masks = [causal, causal & window(3), lookup(torch.arange(4), q_idx) < kv_idx]
hash(masks[0]), hash(masks[1]), hash(masks[2])
sys.stdout.buffer.write(pickle.dumps(masks))
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_mask_from_another_process_is_the_same_mask(seed):
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, env=environment)
    loaded = pickle.loads(done.stdout)
    assert loaded == [causal, causal & window(3), lookup(torch.arange(4), q_idx) < kv_idx]
    assert loaded[1].name == "causal & window(3)"
    assert len(per_head([causal, loaded[0]]).distinct) == 1
    assert compile_mask(loaded[0], 64, 64).launches[0].usual_executor == "sdpa"


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_keep_names_and_shared_terms(copied):
    mask = causal
    for i in range(5000):
        mask = mask ^ (mask & kv_idx.equals(i))
    again = copied(mask.named("long"))
    assert again == mask
    assert again.name == "long"


def test_per_head_finds_equal_masks():
    heads = per_head([causal, window(3), causal, (kv_idx <= q_idx)])
    assert heads.distinct == (causal, window(3))
    assert heads.which == (0, 1, 0, 0)
    assert heads[1] == window(3)
    assert "heads 0, 2-3" in str(heads)
