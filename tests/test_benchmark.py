"""The harness: what it times, what rows hold, and how others' kernels are called."""

import json
import math
import sys
import time
import types

import pytest
import torch

from flexsparse.benchmark import backends, measure
from flexsparse.benchmark.case import case
from flexsparse.benchmark.figure import draw_rows
from flexsparse.benchmark.harness import Times, environment, peak_bytes, take_turns
from flexsparse.benchmark.table import bars, break_even, break_even_text, table_text
from flexsparse.benchmark.workloads import PRESETS, Shape, workloads
from flexsparse.commands import main

CPU = torch.device("cpu")
FIELDS = """
    preset workload pass x_axis x batch n_heads n_kv_heads q_len kv_len head_dim dtype backend kind
    latency_ms latency_q25_ms latency_q75_ms runs mask_cold_ms mask_warm_ms mask_bytes compile_ms
    block_density element_density dense_density tile_tflops useful_tflops peak_bytes difference
    ratio_to_dense ideal_ms ratio_to_ideal device threads torch triton flexsparse python date
"""
ROW = {
    "preset": "swa",
    "workload": "a window",
    "pass": "forward",
    "x_axis": "tokens",
    "x": 1024,
    "batch": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "dtype": "float32",
    "runs": 5,
    "mask_cold_ms": 2.0,
    "mask_warm_ms": 1.0,
    "mask_bytes": 576,
    "compile_ms": 3000.0,
    "block_density": 0.125,
    "dense_density": 0.5,
    "tile_tflops": 0.1,
    "useful_tflops": 0.05,
    "peak_bytes": None,
    "difference": None,
    **environment(CPU),
}


def row(backend, ms, x=1024, **others):
    kind = {"flexsparse": "ours", "sdpa": "dense", "eager": "dense"}.get(backend, "sparse")
    quartiles = {"latency_q25_ms": ms * 0.9, "latency_q75_ms": ms * 1.1}
    return {
        **ROW,
        "backend": backend,
        "kind": kind,
        "x": x,
        "latency_ms": ms,
        **quartiles,
        **others,
    }


def rated(rows):
    """Rows with their ratios to the dense kernels at the same x."""
    return [one | measure.ratios(one, [r for r in rows if r["x"] == one["x"]]) for one in rows]


@pytest.fixture
def synthetic():
    """Ours takes 2, 1 and 0.5 times as long as dense at 1K, 4K and 16K."""
    return rated(
        [
            row(backend, ms * x, x)
            for x, ratio in ((1024, 2), (4096, 1), (16384, 0.5))
            for backend, ms in (
                ("flexsparse", ratio),
                ("flex", 2 * ratio),
                ("sdpa", 1),
                ("eager", 9),
            )
        ]
    )


def test_times_are_medians_and_quartiles():
    assert Times.of([0.004, 0.001, 0.003, 0.002, 0.005]) == (3.0, 2.0, 4.0, 5)
    assert Times.of([0.002]) == (2.0, 2.0, 2.0, 1)


def test_calls_take_turns():
    order = []

    def call(name):
        order.append(name)
        time.sleep(0.003)

    times = take_turns({name: lambda name=name: call(name) for name in "ab"}, CPU, budget=0)
    assert order[2:] == ["a", "b"] * 5  # the first two find out how long a call takes
    assert {x.runs for x in times.values()} == {5}
    assert all(2.9 < x.q25 <= x.median <= x.q75 for x in times.values())


def test_a_short_call_is_repeated_within_its_turn():
    count = iter(range(10**7))
    times = take_turns({"short": lambda: next(count)}, CPU, budget=0)
    assert next(count) > 1000
    assert times["short"].median < 0.1


def test_peak_memory_is_what_a_call_takes():
    held = torch.ones(1 << 22)
    peak = peak_bytes(lambda: torch.ones(1 << 24).add_(1), CPU)  # 64 MB
    if peak is None:
        pytest.skip("this system does not tell")
    assert 60e6 < peak < 90e6
    assert peak_bytes(lambda: held.sum(), CPU) < 10e6


def test_ratios_are_to_the_fastest_dense_kernel_and_to_the_ideal():
    ours, sdpa, eager = rated([row("flexsparse", 3.0), row("sdpa", 8.0), row("eager", 20.0)])
    assert ours["ratio_to_dense"] == 3 / 8
    assert ours["ideal_ms"] == 8 * 0.125 / 0.5  # dense computes the half, ours a quarter of that
    assert ours["ratio_to_ideal"] == 3 / 2
    assert (sdpa["ratio_to_dense"], eager["ratio_to_dense"]) == (1, 20 / 8)
    assert measure.ratios(ours, [ours])["ratio_to_dense"] is None


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1024, 2.0), (4096, 0.5)], 2048),  # straight in logarithms
        ([(4096, 0.5), (1024, 2.0)], 2048),
        ([(1024, 0.9), (2048, 1.5), (8192, 1 / 1.5)], 4096),  # for good, not for once
        ([(0.0, 1.25), (0.5, 0.8)], 0.25),
        ([(1024, 0.9), (2048, 0.5)], None),
        ([(1024, 0.9), (2048, 1.5)], None),
    ],
)
def test_break_even(points, expected):
    found = break_even(points)
    assert found == expected if expected is None else math.isclose(found, expected)


def test_break_even_in_words():
    assert (
        break_even_text([(1024, 2.0), (4096, 0.5)], ROW) == "faster than dense from 2,048 tokens on"
    )
    assert break_even_text([(1024, 0.5), (4096, 0.4)], ROW) == "faster than dense everywhere"
    assert break_even_text([(1024, 0.5), (4096, 4.0)], ROW) == "slower than dense at the largest"


def test_the_table_names_what_was_measured(synthetic):
    text = table_text(synthetic)
    header, *_, last = (line.split() for line in text.split("\n\n")[0].splitlines())
    assert header[:3] == ["tokens", "pass", "backend"]
    assert header[3:8] == ["median", "ms", "quartiles", "time/dense", "time/ideal"]
    assert last[:7] == ["16K", "forward", "eager", "147,456", "132,710-162,202", "9", "36"]
    masks = [line.split() for line in text.split("\n\n")[1].splitlines()]
    assert ["16K", "a", "window", "flexsparse", "2", "1", "576", "3,000"] in masks
    assert "a window, forward: faster than dense from 4,096 tokens on" in text


def test_bars_are_of_the_largest_and_as_long_as_their_times(synthetic):
    lines = bars(synthetic).splitlines()
    assert lines[0] == "a window, forward, 16K tokens"
    assert [(line.split()[0], line.count("#")) for line in lines[1:]] == [
        ("flexsparse", 2),
        ("flex", 4),
        ("sdpa", 4),
        ("eager", 40),
    ]


def test_a_picture_has_latency_the_ratio_and_the_ideal(synthetic):
    pytest.importorskip("matplotlib")
    figure = draw_rows(synthetic)
    latency, ratio = (axes for axes in figure.axes if axes.lines)
    lines = {line.get_label(): line for line in latency.lines}
    assert list(lines["flexsparse"].get_ydata()) == [2048, 4096, 8192]
    assert list(lines["flexsparse"].get_xdata()) == [1024, 4096, 16384]
    ours, ideal, mark = ratio.lines[0], ratio.lines[-2], ratio.lines[-1]
    assert list(ours.get_ydata()) == [2, 1, 0.5]
    assert list(ideal.get_ydata()) == [0.25, 0.25, 0.25]
    assert math.isclose(mark.get_xdata()[0], 4096)


def test_another_result_is_noticed():
    rows = [row("flex", 1.0, difference=x) for x in (1e-6, 1e-2, math.nan)]
    assert [text.rsplit(" ", 1)[1] for text in measure.disagreements(rows)] == ["1.0e-02", "nan"]


@pytest.mark.parametrize("preset", PRESETS)
def test_workloads_can_be_compiled_and_say_what_they_are(preset):
    for workload in workloads(preset, CPU, 4, quick=True):
        shape = Shape(1, 4, 2, 16, torch.float32)
        found = case(workload, shape, CPU)
        blocks, elements = measure.densities(found)
        assert 0 < elements <= blocks <= 1
        if workload.is_causal:
            n = workload.kv_len
            assert blocks <= (n // 128 + 1) / (n // 128) / 2 + 1e-9
            assert elements <= (n + 1) / n / 2


def test_attention_gym_is_given_the_same_masks():
    pytest.importorskip("attn_gym")
    zero = torch.zeros((), dtype=torch.int64)
    compared = []
    for preset in ("swa", "documents", "natten"):
        for workload in workloads(preset, CPU, 4, lengths=[600]):
            if workload.gym is not None:
                n = workload.q_len
                at = zero, zero, torch.arange(n)[:, None], torch.arange(n)
                theirs, ours = (mask(*at).expand(n, n) for mask in (workload.gym, workload.mask))
                assert theirs.equal(ours)
                compared.append(preset)
    assert compared == ["swa", "documents", "natten"]


def dense_by(q, k, v, ends, left):
    """Causal attention inside documents, and `left` keys back, of [tokens, heads, D]."""
    tokens = torch.arange(len(q))
    document = torch.searchsorted(ends, tokens, right=True)
    back = tokens[:, None] - tokens
    kept = (document[:, None] == document) & (back >= 0)
    kept &= (back <= left) | (left < 0)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=kept
    ).transpose(0, 1)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size
):
    assert causal
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q == max_seqlen_k
    return dense_by(q, k, v, cu_seqlens_k, window_size[0])


def flash_attn_func(q, k, v, causal):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2), "the LSE"


def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa=False):
    assert window_size[1] == 0
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return dense_by(q, k, v, cu_k, window_size[0])


@pytest.mark.parametrize("preset", ["swa", "documents"])
def test_flash_attention_is_called_as_its_packages_ask(preset, monkeypatch):
    package = types.SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(backends, "_not_cuda", lambda case: None)
    (workload,) = workloads(preset, CPU, 4, lengths=[1500])
    found = case(workload, Shape(2, 4, 2, 16, torch.float32), CPU)
    q, k, v = (torch.randn(2, n, 1500, 16) for n in (4, 2, 2))
    expected = found.attend(q, k, v, executor="reference")
    for name in ("varlen_attn", "flash-attn 2 varlen"):
        torch.testing.assert_close(backends.SPARSE[name](found).attend(q, k, v), expected)
    dense = backends.DENSE["flash-attn 2"](found).attend(q, k, v)
    sdpa = backends.DENSE["sdpa"](found).attend(q, k, v)
    torch.testing.assert_close(dense, sdpa)
    assert backends.SPARSE["flash-attn 3 varlen"](found) == "flash_attn_interface is not installed"


def test_a_backend_that_fails_is_left_out_with_its_reason(monkeypatch):
    def fails(case):
        raise ValueError("no such kernel\nand more")

    monkeypatch.setattr(measure, "SPARSE", {"flexsparse": backends.flexsparse, "odd": fails})
    monkeypatch.setattr(measure, "DENSE", {"sdpa": backends.sdpa})
    (workload, *_) = workloads("duo", CPU, 2, lengths=[256])
    shape = Shape(1, 2, 2, 16, torch.float32)
    result = measure.measure(workload, shape, CPU, budget=0)
    assert result.missing == {"odd": "ValueError: no such kernel"}
    assert [r["backend"] for r in result.rows] == ["flexsparse", "sdpa"] * 2


@pytest.mark.slow
def test_bench_measures_saves_and_draws(tmp_path, capsys):
    rows_at, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    sizes = ["--len", "300", "--heads", "2", "--kv-heads", "1", "--head-dim", "16"]
    command = ["bench", "--preset", "swa", "--quick", *sizes]
    assert main([*command, "--save", str(rows_at), "--figure", str(picture)]) == 0
    rows = [json.loads(line) for line in rows_at.read_text().splitlines()]
    for one in rows:
        assert set(one) == set(FIELDS.split())
        assert one["latency_q25_ms"] <= one["latency_ms"] <= one["latency_q75_ms"]
        assert one["runs"] >= 5
        unknown = {name for name, value in one.items() if value is None}
        assert unknown <= {
            "mask_cold_ms", "mask_warm_ms", "mask_bytes", "difference", "peak_bytes", "triton"
        }  # fmt: skip
    measured = {(one["backend"], one["pass"]) for one in rows}
    assert {("flexsparse", "forward"), ("flexsparse", "forward+backward")} <= measured
    assert {("sdpa", "forward"), ("eager", "forward+backward")} <= measured
    assert ("flex, torch's blocks", "forward") in measured
    ours = next(one for one in rows if one["kind"] == "ours")
    assert ours["mask_bytes"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr()
    assert "Measuring 1/1: swa" in out.err
    assert f"Picture: {picture}" in out.out
    assert "\n  eager" not in out.out.split("Not measured:")[1]
    assert "sdpa flash: on CPU it is what sdpa chooses" in out.out


def test_without_matplotlib_bench_prints_bars(monkeypatch, capsys, synthetic):
    def refuse(rows):
        raise ImportError("Pictures need matplotlib. Install it: pip install 'flexsparse[viz]'")

    result = measure.Result(synthetic, {})
    monkeypatch.setattr("flexsparse.commands.bench.draw_rows", refuse)
    monkeypatch.setattr("flexsparse.commands.bench.measure", lambda *_, **__: result)
    assert main(["bench", "--preset", "swa", "--len", "1024"]) == 0
    out = capsys.readouterr().out
    assert "a window, forward, 16K tokens\n  flexsparse              ## 8,192 ms" in out
    assert "pip install 'flexsparse[viz]'" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--heads", "4", "--kv-heads", "3"], "--kv-heads 3 must divide --heads 4"),
        (["--heads", "1"], "heads of two kinds"),
        (["--preset", "all", "--figure", "x.png"], "--figure is one picture"),
        (["--preset", "bsa", "--len", "99,999,999,999"], "are free; make it or --heads smaller"),
        (["--save", "/nowhere/rows.jsonl"], "cannot write /nowhere/rows.jsonl"),
    ],
)
def test_bad_arguments_are_one_message(argv, message, capsys):
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("flexsparse: ")
    assert message in error


def test_what_does_not_fit_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr("flexsparse.commands.bench.free_bytes", lambda device: 1 << 20)
    assert main(["bench", "--preset", "prefill", "--quick"]) == 0
    assert "2K keys: it takes up to 0.0 GiB, and 0.0 GiB are free" in capsys.readouterr().out
