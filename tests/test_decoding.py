"""at() and row() against the whole run: prefill in chunks, decoding."""

import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import assert_same_lists, dense, dense_classes, grids, masks, painted

import flexsparse as fs
from flexsparse import ExecutorError, MaskError, compile_mask, h, kv_idx, lookup, per_head, q_idx
from flexsparse.analysis.classify import classify
from flexsparse.analysis.validate import problem
from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.executors import gather
from flexsparse.masks import causal, padding, sink, window

CPU = torch.device("cpu")
STREAMING = causal & (sink(4) | window(100))

HEADS = [causal, STREAMING, causal & window(30) | sink(2) & causal, STREAMING]


def test_prefill_in_chunks_and_decoding_equal_the_whole_run():
    q, k, v = (torch.randn(2, n, 300, 16) for n in (4, 2, 2))
    attend = compile_mask(per_head(HEADS), 300, 300)
    whole = attend(q, k, v, executor="reference")
    outs = []
    for start, stop in ((0, 128), (128, 129), (129, 290)):
        part = attend.at(stop - start, stop)
        keys, values = k[:, :, :stop], v[:, :, :stop]
        outs.append(part(q[:, :, start:stop], keys, values, executor="reference"))
    for position in range(290, 300):
        one = slice(position, position + 1)
        outs.append(attend.row(position)(q[:, :, one], k, v, executor="reference"))
        grown = attend.at(1, position + 1)
        keys, values = k[:, :, : position + 1], v[:, :, : position + 1]
        again = grown(q[:, :, one], keys, values, executor="reference")
        torch.testing.assert_close(again, outs[-1])
    torch.testing.assert_close(torch.cat(outs, 2), whole)


def test_at_keeps_heads_batch_and_block_size():
    mask = (kv_idx <= q_idx + h) & padding(torch.tensor([300, 40]))
    attend = compile_mask(mask, 300, 300, batch=2, n_heads=3, block_size=(64, 32))
    part = attend.at(10, 200, q_offset=50)
    assert (part.q_len, part.kv_len, part.q_offset) == (10, 200, 50)
    assert (part.batch, part.n_heads, part.block_size) == (2, 3, (64, 32))
    assert attend.at(300, 300).launches[0].classes.blocks == attend.launches[0].classes.blocks


def test_a_row_keeps_the_blocks_of_the_whole_mask():
    attend = compile_mask(STREAMING, 1000, 1000)
    columns = torch.arange(1000)
    for position in (0, 127, 128, 700, 999):
        launch = attend.row(position).launches[0]
        needed = STREAMING(0, 0, torch.tensor(position), columns).nonzero().flatten() // 128
        assert launch.classes.blocks == len(needed.unique())


def test_a_row_of_a_million_tokens_costs_its_row_of_blocks():
    attend = fs.compile_mask(causal & window(4096), 128, 1 << 20)
    start = time.perf_counter()
    row = attend.row((1 << 20) - 1)
    assert time.perf_counter() - start < 5  # milliseconds on an idle core
    assert row.launches[0].classes.blocks == 32


def one_row(grid, row, block_size):
    """The grid of one query of a grid whose blocks are one query high."""
    return grid._replace(q_len=1, q_offset=grid.q_offset + row, block_size=block_size)


@settings(max_examples=100)
@given(masks, grids, st.data())
def test_a_row_of_lists_is_the_lists_of_a_row(mask, grid, data):
    assume(problem(mask, grid, CPU) is None)
    blocks = grid._replace(block_size=(1, grid.block_size[1]))
    row = data.draw(st.integers(0, grid.q_len - 1))
    its_grid = one_row(blocks, row, grid.block_size)
    classes = classify(mask, blocks)
    of_row = classes.of_row(row, its_grid)
    assert torch.equal(painted(of_row), dense_classes(dense(mask, its_grid), (1, blocks[3][1])))
    for compact in (True, False):
        lists = block_mask(blocks, write_kept_blocks(classes, CPU, compact=compact), mask)
        exact = block_mask(its_grid, write_kept_blocks(of_row, CPU, compact=compact), mask)
        assert_same_lists(lists.row(row, its_grid, mask), exact)


def test_a_launch_of_a_row_has_its_lists_ready():
    q, k, v = (torch.randn(1, n, 700, 16) for n in (4, 2, 2))
    attend = compile_mask(per_head(HEADS), 700, 700)
    for position in (0, 63, 64, 321, 699):
        row = attend.row(position)
        for launch in row.launches:
            if launch.usual_executor == "sdpa":
                continue
            ((heads, (found, *_)),) = launch._lists.items()
            of_heads = launch.classes.of_heads(heads) if heads else launch.classes
            kept = write_kept_blocks(of_heads, CPU, q_lists=False)
            exact = block_mask(of_heads.grid, kept, found.mask_mod)
            assert torch.equal(found.to_dense(), exact.to_dense())
            assert torch.equal(found.full_kv_num_blocks, exact.full_kv_num_blocks)
        one = q[:, :, position : position + 1]
        exact = row(one, k, v, executor="reference")
        torch.testing.assert_close(row(one, k, v, executor="blockwise"), exact)


def test_one_causal_query_is_dense_attention_over_the_keys_so_far():
    q, k, v = torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 2, 300, 16)
    attend = compile_mask(causal, 300, 300)
    for position in (0, 1, 170, 299, 1000):
        row = attend.row(position)
        assert row.launches[0].usual_executor == "sdpa"
        torch.testing.assert_close(row(q, k, v), row(q, k, v, executor="reference"))
    before = attend.row(-1)  # no key is before it
    assert before.launches[0].usual_executor == "gather"
    assert before(q, k, v).abs().max() == 0


@settings(max_examples=100)
@given(masks, grids, st.data())
def test_a_query_on_cpu_reads_the_keys_it_sees(mask, grid, data):
    grid = grid._replace(batch=1, heads=(data.draw(st.sampled_from([0, 2])),))
    assume(problem(mask, grid, CPU) is None)
    row = data.draw(st.integers(0, grid.q_len - 1))
    its_grid = one_row(grid, row, grid.block_size)
    lists = block_mask(its_grid, write_kept_blocks(classify(mask, its_grid), CPU), mask)
    keys = torch.arange(grid.kv_len)[gather.keys_seen(mask, its_grid, lists)]
    assert keys.tolist() == dense(mask, its_grid)[0, 0, 0].nonzero()[:, 0].tolist()


def test_gathered_keys_are_read_without_a_kernel():
    q, k, v = torch.randn(2, 4, 1, 16), *torch.randn(2, 2, 2, 700, 16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    row = compile_mask(STREAMING, 700, 700).row(650)
    assert row.launches[0].usual_executor == "gather"
    with torch._dynamo.config.patch(disable=True):  # without a compiler
        out = row(*inputs, scale=0.3)
    exact = row(*inputs, scale=0.3, executor="reference")
    torch.testing.assert_close(out, exact)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weight).sum(), inputs) for x in (out, exact)]
    torch.testing.assert_close(*grads)


def test_a_query_that_sees_no_key_has_gradients_of_zero():
    q, k, v = (torch.randn(2, n, length, 16) for n, length in ((4, 1), (2, 300), (2, 300)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = compile_mask(causal & window(64), 300, 300).row(-1)(*inputs, executor="gather")
    assert out.shape == q.shape
    assert out.eq(0).all()
    assert all(x.eq(0).all() for x in torch.autograd.grad(out.sum(), inputs))


def test_many_keys_are_gathered_only_where_they_follow_each_other():
    length = 3 * gather.MOST_COPIED
    q, k, v = torch.randn(1, 2, 1, 16), *torch.randn(2, 1, 2, length, 16)
    row = compile_mask(causal & window(2 * gather.MOST_COPIED), length, length).row(length - 1)
    assert row.launches[0].keys_seen == slice(gather.MOST_COPIED, length)
    torch.testing.assert_close(row(q, k, v), row(q, k, v, executor="reference"))
    mask = causal & ((kv_idx % 2).equals(1) | window(300))
    row = compile_mask(mask, length, length).row(length - 1)
    assert row.launches[0].usual_executor == "flex"
    with pytest.raises(ExecutorError, match=r"sees 918 keys in pieces; at most 512 are copied"):
        row(q, k, v, executor="gather")


def test_what_gather_cannot_do_is_done_by_others():
    q, k, v = torch.randn(1, 2, 1, 16), *torch.randn(2, 1, 2, 300, 16)
    row = compile_mask(per_head([causal & window(9), causal & window(70)]), 300, 300).row(200)
    with pytest.raises(ExecutorError, match="keys of their own"):
        row(q, k, v, executor="gather")
    row = compile_mask(STREAMING, 300, 300).row(200)
    with pytest.raises(ExecutorError, match="returns no LSE"):
        row(q, k, v, executor="gather", return_lse=True)
    out, lse = row(q, k, v, return_lse=True)
    exact, exact_lse = row(q, k, v, return_lse=True, executor="reference")
    torch.testing.assert_close((out, lse), (exact, exact_lse))
    with pytest.raises(ExecutorError, match="for one query, and there are 2"):
        compile_mask(STREAMING, 2, 300)(torch.randn(1, 2, 2, 16), k, v, executor="gather")


def test_full_blocks_of_a_row_need_no_mask():
    launch = compile_mask(STREAMING, 1000, 1000).row(999).launches[0]
    assert launch.classes.full.blocks == 0
    launch = compile_mask(causal, 1000, 1000).row(999).launches[0]
    assert (launch.classes.full.blocks, launch.classes.partial.blocks) == (7, 1)


def test_a_query_outside_of_the_mask_is_analysed_for_itself():
    attend = compile_mask(STREAMING, 200, 1000)
    for position in (0, 799, 1000, 5000):
        row, exact = attend.row(position), attend.at(1, 1000, position)
        assert_same_lists(row.block_mask, exact.block_mask)


@pytest.mark.parametrize("position", [3.0, "7", True, None, torch.tensor(5)])
def test_a_position_that_is_no_int_is_refused(position):
    attend = compile_mask(causal, 100, 100)
    attend.row(5)
    with pytest.raises(MaskError, match=r"row: position=.*; it must be an int"):
        attend.row(position)


def test_rows_read_no_table_past_its_end():
    ids = torch.arange(100) // 30
    attend = compile_mask(causal & lookup(ids, q_idx).equals(lookup(ids, kv_idx)), 100, 100)
    assert [int(attend.row(p).block_mask.kv_num_blocks) for p in (0, 63, 64, 99)] == [1, 1, 1, 1]


def test_a_row_may_become_any_other_and_be_pickled():
    attend = compile_mask(STREAMING, 1000, 1000, block_size=64)
    row = attend.row(500)
    assert (row.q_len, row.q_offset, row.block_size) == (1, 500, (64, 64))
    again = pickle.loads(pickle.dumps(row))
    assert str(again).splitlines()[0] == str(row).splitlines()[0]
    assert_same_lists(row.row(700).block_mask, attend.at(1, 1000, 700).block_mask)


@pytest.mark.slow
def test_decoding_compiles_one_kernel():
    q, k, v = (torch.randn(1, n, 700, 16) for n in (4, 2, 2))
    attend = compile_mask(STREAMING, 700, 700)
    torch._dynamo.utils.counters.clear()
    for position in (130, 150, 191, 192, 300, 511, 699):
        row = attend.row(position)
        one = q[:, :, position : position + 1]
        out = row(one, k, v, executor="flex")
        torch.testing.assert_close(out, row(one, k, v, executor="reference"))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_the_example_runs():
    script = Path(__file__).parent.parent / "examples" / "decoding.py"
    sizes = ["--tokens", "700", "--steps", "5", "--chunk", "300", "--head-dim", "16"]
    done = subprocess.run(
        [sys.executable, script, *sizes], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    difference = re.search(r"one run over 700 tokens: (\S+)", done.stdout)
    assert float(difference[1]) < 1e-5
