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

    from flexsparse.executors.streaming_kernels import needs_mask, schedule

    @triton.jit
    def schedule_kernel(
        out, p_lo, p_hi, sink, window, BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr
    ):
        _, n_tiles, _, _, _, rest = schedule(
            p_lo, p_hi, sink, window, p_hi + 1, BLOCK_KV, BLOCK_SINK
        )
        tl.store(out, n_tiles)
        tl.store(out + 1, rest)

    @triton.jit
    def needs_mask_kernel(
        out, start, p_lo, sink, window, limit, ROWS: tl.constexpr, KV: tl.constexpr, N: tl.constexpr
    ):
        i = tl.arange(0, N)
        start, p_lo = tl.load(start + i), tl.load(p_lo + i)
        s, w, limit = tl.load(sink + i), tl.load(window + i), tl.load(limit + i)
        tl.store(out + i, needs_mask(start, start + KV, limit, p_lo, p_lo + ROWS - 1, s, w))


def model():
    """benchmarks/model_streaming.py, which is no package."""
    path = Path(__file__).parents[1] / "benchmarks/model_streaming.py"
    spec = importlib.util.spec_from_file_location("model_streaming", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@here
def test_a_tile_is_masked_only_if_one_of_its_rows_hides_one_of_its_keys():
    n, rows, kv = 512, 16, 16
    start, p_lo, limit, sink, window = (
        torch.randint(high, (n,), dtype=torch.int32) for high in (60, 80, 100, 90, 90)
    )
    out = numbers([-1] * n)
    on_device = (x.to(DEVICE) for x in (start, p_lo, sink, window, limit))
    needs_mask_kernel[(1,)](out, *on_device, ROWS=rows, KV=kv, N=n)
    key = start[:, None, None] + torch.arange(kv)
    p = (p_lo[:, None] + torch.arange(rows))[..., None]
    s, w, end = (x[:, None, None] for x in (sink, window, limit))
    hidden = ~((key <= p) & ((key < s) | (p - key < w)) & (key < end)).flatten(1).all(1)
    masked = out.cpu().bool()
    assert masked[hidden].all()
    # a tile that straddles the end of the sink is masked even where the window covers the rest
    straddles = (start < sink) & (sink < start + kv)
    assert not masked[~hidden & ~straddles].any()
    assert (~hidden & ~straddles).sum() > 20


def test_the_tile_plan_meets_its_targets():
    m = model()
    for pattern, target in m.TARGETS.items():
        assert m.steady_ratio(m.PLANS["ours"], *pattern) <= target
        assert m.steady_ratio(m.PLANS["ours, 4 heads packed"], *pattern) <= target


@here
@pytest.mark.parametrize(
    ("sink", "window"), [(4, 64), (64, 256), (100, 30), (17, 1), (0, 5), (90, 0)]
)
def test_the_model_counts_the_tiles_that_the_kernels_visit(sink, window):
    m, out = model(), numbers([0, 0])
    for row0, rows in ((0, 64), (64, 64), (128, 40), (640, 64), (641, 32)):
        schedule_kernel[(1,)](out, row0, row0 + rows - 1, sink, window, BLOCK_KV=64, BLOCK_SINK=16)
        n_tiles, rest = out.tolist()
        kernel = n_tiles * 64 + (16 if rest else 0)
        assert m.visited_by_tiles(row0, row0 + rows - 1, sink, window, 64) == kernel
