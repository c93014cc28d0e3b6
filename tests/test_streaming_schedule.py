"""Which tiles the streaming kernels visit and mask, and that the model counts the same."""

# ruff: noqa: N803 - capitals are the habit for compile-time constants of a kernel

import importlib.util
from pathlib import Path

import pytest
import torch
from streaming_oracle import DEVICE, RUNS_HERE, here, numbers

triton = pytest.importorskip("triton", reason="the streaming kernels are written in Triton")

if RUNS_HERE:
    import triton.language as tl

    from flexsparse.executors.streaming_schedule import cuts, find_sequence, halve, schedule

    @triton.jit
    def schedule_kernel(
        out,
        p_lo,
        p_hi,
        sink,
        window,
        ROWS: tl.constexpr,
        KV: tl.constexpr,
        BLOCK_SINK: tl.constexpr,
    ):
        walk = schedule(p_lo, p_hi, sink, window, p_hi + 1, KV, BLOCK_SINK)
        _, n_tiles, _, _, _, rest = walk
        n_lower, n_seen = halve(walk, p_lo + ROWS, window, KV)
        tl.store(out, n_tiles)
        tl.store(out + 1, rest)
        tl.store(out + 2, n_lower)
        tl.store(out + 3, n_seen)

    @triton.jit
    def find_kernel(out, cu_seqlens, n_seqs, SIZE, SPARE: tl.constexpr):
        slot = tl.program_id(0)
        seq, number = find_sequence(slot, cu_seqlens, n_seqs, SIZE, SPARE)
        tl.store(out + 2 * slot, seq)
        tl.store(out + 2 * slot + 1, number)

    @triton.jit
    def cuts_kernel(
        out, start, p_lo, sink, window, limit, ROWS: tl.constexpr, KV: tl.constexpr, N: tl.constexpr
    ):
        i = tl.arange(0, N)
        start, p_lo = tl.load(start + i), tl.load(p_lo + i)
        s, w, limit = tl.load(sink + i), tl.load(window + i), tl.load(limit + i)
        at_end, at_start = cuts(start, start + KV, limit, p_lo, p_lo + ROWS - 1, s, w)
        tl.store(out + i, at_end)
        tl.store(out + N + i, at_start)


def model():
    """benchmarks/model_streaming.py, which is no package."""
    path = Path(__file__).parents[1] / "benchmarks/model_streaming.py"
    spec = importlib.util.spec_from_file_location("model_streaming", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@here
@pytest.mark.parametrize(("n_seqs", "most"), [(1, 0), (7, 90), (30, 20), (1100, 3)])
@pytest.mark.parametrize("first", [0, 5])
def test_every_tile_of_packed_sequences_has_one_slot(n_seqs, most, first):
    lens = torch.randint(most + 1, (n_seqs,))
    lens[n_seqs // 2] = 100
    ends = torch.cat([torch.tensor([first]), lens]).cumsum(0)
    total, cu_seqlens = int(ends[-1]), numbers(ends.tolist())
    # those of rows and keys, and of chunks twice as long, of sequences of several alone
    for size, spare in ((16, 1), (16, 0)):
        n_slots = total // size + spare * n_seqs
        found = numbers([-1] * 2 * n_slots)
        find_kernel[(n_slots,)](found, cu_seqlens, n_seqs, SIZE=size, SPARE=spare)
        found = [tuple(pair) for pair in found.view(-1, 2).tolist()]
        assert len(set(found)) == len(found)
        step = size if spare else 2 * size
        needed = [(s, i) for s, n in enumerate(lens.tolist()) for i in range(-(-n // step))]
        assert {x for x in needed if spare or lens[x[0]] > step} <= set(found)


@here
def test_a_tile_is_cut_only_where_one_of_its_rows_hides_one_of_its_keys():
    n, rows, kv = 512, 16, 16
    start, p_lo, limit, sink, window = (
        torch.randint(high, (n,), dtype=torch.int32) for high in (60, 80, 100, 90, 90)
    )
    out = numbers([-1] * 2 * n)
    on_device = (x.to(DEVICE) for x in (start, p_lo, sink, window, limit))
    cuts_kernel[(1,)](out, *on_device, ROWS=rows, KV=kv, N=n)
    key = start[:, None, None] + torch.arange(kv)
    p = (p_lo[:, None] + torch.arange(rows))[..., None]
    s, w, end = (x[:, None, None] for x in (sink, window, limit))
    at_end, at_start = out.cpu().bool().view(2, n)
    assert torch.equal(at_end, ((key > p) | (key >= end)).flatten(1).any(1))
    left = ((key >= s) & (p - key >= w)).flatten(1).any(1)
    assert at_start[left].all()
    # a tile that straddles the end of the sink is cut even where the window covers the rest
    straddles = (start < sink) & (sink < start + kv)
    assert not at_start[~left & ~straddles].any()
    assert (~left & ~straddles).sum() > 20


def test_the_tile_plan_meets_its_targets():
    m = model()
    for pattern, target in m.TARGETS.items():
        assert m.steady_ratio(m.PLANS["ours"], *pattern) <= target
        assert m.steady_ratio(m.PLANS["ours, 4 heads packed"], *pattern) <= target


@here
@pytest.mark.parametrize(
    ("sink", "window"),
    [(4, 64), (64, 256), (100, 30), (17, 1), (0, 5), (90, 0), (0, 130), (70, 900)],
)
@pytest.mark.parametrize("plan", ["ours", "ours, 4 heads packed", "64 rows"])
def test_the_model_counts_the_tiles_that_the_kernels_visit(plan, sink, window):
    m, out = model(), numbers([0] * 4)
    plan = m.PLANS[plan]
    rows = plan.rows * plan.halves
    for row0, n in ((0, rows), (rows, rows), (2 * rows, rows - 5), (640, rows), (641, rows)):
        last = row0 + n - 1
        schedule_kernel[(1,)](out, row0, last, sink, window, plan.rows, plan.kv, BLOCK_SINK=16)
        n_tiles, rest, n_lower, n_seen = out.tolist()
        short = 16 if rest else 0
        seen = m.visit_by_tiles(row0, last, sink, window, plan)
        assert seen.read == n_tiles * plan.kv + short
        if plan.halves == 2:
            lower, upper = n_seen * plan.kv + short, (n_tiles - n_lower) * plan.kv + short
            assert seen.visited == lower + upper
