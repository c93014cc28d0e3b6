"""flex_attention on CPU, whose product of queries and keys is ours."""

import statistics
import time
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from flexsparse import compile_mask
from flexsparse.executors import flex_cpu
from flexsparse.masks import causal, sink, window

STREAMING = causal & (sink(4) | window(37))
OURS = "attention_tile<ROWS, COLS>"


def product(dtype):
    """What inductor writes for both products of a kernel named attention."""
    from torch._inductor.kernel.flex.flex_cpu import CppFlexAttentionTemplate as Template
    from torch._inductor.virtualized import V

    graph = types.SimpleNamespace(aot_mode=False)
    with flex_cpu._tiled_product(), V.set_graph_handler(graph):
        kernel = types.SimpleNamespace(input_dtype=dtype, accumulate_dtype=torch.float32)
        return Template.micro_gemm_define(kernel, "attention")


# 8 rows and 32 keys of AVX-512 fill a tile, 6 and 16 of AVX2; 24 leaves a register half empty
@pytest.mark.parametrize("head_dim", [24, 64])
def test_scores_are_right_whether_or_not_they_fill_tiles(head_dim):
    for length in (5, 33, 300):
        q, k, v = torch.randn(3, 1, 2, length, head_dim)
        attend = compile_mask(STREAMING, length, length)
        out = attend(q, k, v, executor="flex")
        exact = attend(q.double(), k.double(), v.double(), executor="reference")
        torch.testing.assert_close(out, exact.float(), atol=2e-6, rtol=1e-5)


def test_inductor_writes_our_product_for_float32_alone():
    assert OURS in product(torch.float32)
    assert OURS not in product(torch.float16)


def test_a_torch_with_another_product_keeps_its_own(monkeypatch):
    ours = product(torch.float32)
    monkeypatch.setattr(flex_cpu, "SIGNATURE", "(const float* A, int64_t one_more)")
    theirs = product(torch.float32)
    assert OURS not in theirs
    assert "attention_kernel_micro_gemm_transpose_b(" in theirs
    assert "attention_kernel_micro_gemm_transpose_b(" in ours


def test_inductor_is_as_it_was_after_compiling():
    from torch._inductor import config
    from torch._inductor.kernel.flex.flex_cpu import CppFlexAttentionTemplate as Template

    before = Template.micro_gemm_define, dict(config.unsafe_marked_cacheable_functions)
    q, k, v = torch.randn(3, 1, 2, 300, 64)
    compile_mask(STREAMING, 300, 300)(q, k, v, executor="flex")
    assert (Template.micro_gemm_define, config.unsafe_marked_cacheable_functions) == before


def test_a_kernel_on_disk_is_for_as_many_threads_as_compiled_it(monkeypatch):
    from torch._inductor import compile_fx, config

    settings = []
    monkeypatch.setattr(
        compile_fx,
        "compile_fx",
        lambda graph, inputs: settings.append(config.unsafe_marked_cacheable_functions),
    )
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            flex_cpu.compile_graph(None, [])
    finally:
        torch.set_num_threads(threads)
    assert settings[0] == settings[2] != settings[1]


@pytest.mark.slow
def test_our_product_saves_a_quarter_of_the_time():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whose own time is not disturbed by other work on the machine
    try:
        q, k, v = torch.randn(3, 1, 1, 4096, 64)
        attend = compile_mask(causal & window(512), 4096, 4096)
        theirs = torch.compile(flex_attention)
        calls = {
            "ours": lambda: attend(q, k, v, executor="flex"),
            "theirs": lambda: theirs(q, k, v, block_mask=attend.block_mask),
        }
        times = {name: [] for name in calls}
        for _ in range(12):
            for name, call in calls.items():
                started = time.thread_time()
                call()
                times[name].append(time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    # measured: 0.6 of the time
    assert statistics.median(times["ours"][2:]) < 0.75 * statistics.median(times["theirs"][2:])
