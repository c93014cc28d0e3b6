"""Numbers are data: masks of one structure share a compiled kernel, and structures do not meet."""

import functools
import operator
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._inductor.exc import CppCompileError, InductorError
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import scaled_dot_product_attention

from flexsparse import ExecutorError, compile_mask, kv_idx, per_head, q_idx
from flexsparse.executors import flex_kernels
from flexsparse.masks import causal, chunked, dilated, sink, strided, window

TOKENS = torch.arange(300)


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs dynamo has compiled so far; flex running dense is an error."""
    # it warns of that once in a process
    monkeypatch.setattr(torch_flex, "_WARNINGS_SHOWN", set(), raising=False)
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unfused")
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_running_dense_would_be_noticed(graphs):
    with pytest.raises(UserWarning, match="unfused"):
        torch_flex.flex_attention(*inputs(1))


def inputs(n_heads):
    return [torch.randn(2, n_heads, 300, 16) for _ in range(3)]


def dense(mask, q, k, v):
    kept = mask(0, 0, TOKENS[:, None], TOKENS)
    return scaled_dot_product_attention(q, k, v, attn_mask=kept)


def test_a_hundred_windows_are_one_compilation(graphs):
    q, k, v = inputs(3)
    for n, size in enumerate(range(2, 300, 3)):
        mask = causal & window(size)
        out = compile_mask(mask, 300, 300)(q, k, v, executor="flex")
        assert graphs() == 1, f"window {size}, the {n + 1}th"
        if n % 10 == 0:
            torch.testing.assert_close(out, dense(mask, q, k, v))
    assert n + 1 == 100


def test_the_windows_of_heads_are_one_compilation(graphs):
    q, k, v = inputs(5)
    for first in (3, 40, 111):
        masks = [causal & window(first + 30 * head) for head in range(5)]
        out = compile_mask(per_head(masks), 300, 300)(q, k, v, executor="flex")
        for head in (0, 4):
            one = [x[:, [head]] for x in (q, k, v)]
            torch.testing.assert_close(out[:, [head]], dense(masks[head], *one))
    assert graphs() == 1


def test_eleven_scales_are_one_compilation(graphs):
    q, k, v = inputs(3)
    attend = compile_mask(causal & window(70), 300, 300)
    for scale in torch.linspace(0.1, 2, 11).tolist():
        out = attend(q, k, v, scale=scale, executor="flex")
        assert graphs() == 1
        expected = attend(q, k, v, scale=scale, executor="reference")
        torch.testing.assert_close(out, expected)


@pytest.fixture
def traced(monkeypatch):
    """Kernels are traced by dynamo, with its limit, and run as they are: to compile takes long."""
    monkeypatch.setattr(flex_kernels, "_kernels", {})
    monkeypatch.setattr(flex_kernels.flex_cpu, "compile_graph", lambda graph, _: graph.forward)


def softcap(c):
    return lambda score, b, h, q_idx, kv_idx: c * torch.tanh(score / c)


class Applied:
    """A score_mod by a function, which dynamo compiles and no key knows; it cannot be hashed."""

    __hash__ = None

    def __init__(self, function):
        self.function = function

    def __call__(self, score, b, h, q_idx, kv_idx):
        return self.function(score)


FUNCTIONS = [torch.tanh, torch.sin, torch.cos, torch.atan, torch.erf, torch.abs, torch.neg]
FUNCTIONS += [torch.relu, torch.sigmoid, torch.square, torch.floor]


@pytest.mark.parametrize(
    "kind", [Applied, lambda f: functools.partial(Applied.__call__, Applied(f))]
)
def test_eleven_score_mods_pass_the_limit_of_dynamo(traced, graphs, kind):
    q, k, v = inputs(3)
    attend = compile_mask(causal & window(70), 300, 300)
    for function in FUNCTIONS:
        out = attend(q, k, v, score_mod=kind(function), executor="flex")
        expected = attend(q, k, v, score_mod=kind(function), executor="reference")
        torch.testing.assert_close(out, expected)
    assert graphs() == 11


def test_numbers_of_score_mods_are_compiled_once_each(traced, graphs):
    q, k, v = inputs(3)
    attend = compile_mask(causal & window(70), 300, 300)
    for _ in range(2):  # as the layers of a model do, which come again at each step
        for c in range(1, 12):
            attend(q, k, v, score_mod=softcap(c / 2), executor="flex")
    assert graphs() == 11


@torch._dynamo.config.patch(specialize_int=True)  # as inductor does
def test_eleven_sizes_of_blocks_pass_the_limit_of_dynamo(traced, graphs):
    q, k, v = inputs(3)
    for size in (1, 3, 7, 16, 48, 100, 127, 128, 129, 200, 256):
        out = compile_mask(causal & window(70), 300, 300, block_size=size)(q, k, v, executor="flex")
        torch.testing.assert_close(out, dense(causal & window(70), q, k, v))
    assert graphs() == 11


def test_a_compiler_that_is_switched_off_is_an_error(traced):
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="blockwise"):
        compile_mask(causal & window(70), 300, 300)(*inputs(3), executor="flex")


def test_what_fails_once_is_compiled_for_all_lengths_afterwards(traced, graphs, monkeypatch):
    """A disk that is full for a while must not cost a kernel for each length from then on."""
    q, k, v = inputs(3)
    attend = compile_mask(causal & window(70), 300, 300)
    printed = "\nfatal error: No space left on device\ncompilation terminated."

    def on_a_full_disk(*_):
        raise InductorError(CppCompileError(["g++", "kernel.cpp"], printed), None)

    with monkeypatch.context() as patch:
        patch.setattr(flex_kernels, "_compile", lambda *_: on_a_full_disk)
        with pytest.raises(ExecutorError, match=r"No space left.*executor=\"blockwise\"") as failed:
            attend(q, k, v, executor="flex")
    assert isinstance(failed.value.__cause__, InductorError)
    assert not flex_kernels._kernels
    for n in (300, 200, 150):
        few = [x[:, :, :n].contiguous() for x in (q, k, v)]
        attend.at(n, n)(*few, executor="flex")
    assert graphs() == 1


def test_threads_in_which_one_kernel_fails_read_the_same_error(traced, monkeypatch):
    attend = compile_mask(causal & window(70), 300, 300)
    q, k, v = inputs(3)
    together = threading.Barrier(2, timeout=60)

    def failing(*_):
        together.wait()
        raise InductorError(RuntimeError("no such kernel"), None)

    # both have the kernel before either takes it out
    monkeypatch.setattr(flex_kernels, "_compile", lambda *_: failing)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(attend, q, k, v, executor="flex") for _ in range(2)]
        for call in calls:
            with pytest.raises(ExecutorError, match="no such kernel"):
                call.result()


def test_equal_lengths_are_not_tied_by_a_later_compilation(traced, graphs):
    q, k, v = inputs(3)
    attend = compile_mask(causal & window(70), 300, 300)
    for function in (torch.tanh, torch.sin):  # other lengths in between would untie them anyway
        attend(q, k, v, score_mod=Applied(function), executor="flex")
    assert graphs() == 2
    few, chunk = q[:, :, :200].contiguous(), attend.at(200, 300, 0)
    chunk(few, k, v, score_mod=Applied(torch.sin), executor="flex")
    assert graphs() == 2
    assert torch.fx.experimental._config.use_duck_shape  # others' kernels keep torch's setting


@pytest.mark.slow
def test_structures_beyond_the_limit_of_dynamo_are_compiled_too(graphs):
    terms = [window(50), sink(8), strided(7), chunked(64), dilated(9, 4), (q_idx % 5).equals(0)]
    masks = [causal & functools.reduce(operator.or_, terms[:n]) for n in range(2, 7)]
    masks += [causal & ((kv_idx % 3).equals(0) | mask) for mask in masks]
    assert len(masks) > torch._dynamo.config.recompile_limit
    q, k, v = inputs(3)
    for n, mask in enumerate(masks):
        out = compile_mask(mask, 300, 300)(q, k, v, executor="flex")
        assert graphs() == n + 1
        torch.testing.assert_close(out, dense(mask, q, k, v))
