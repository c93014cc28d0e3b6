"""Numbers are data: masks of one structure share a compiled kernel, and structures do not meet."""

import functools
import operator
import warnings

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import scaled_dot_product_attention

from flexsparse import compile_mask, kv_idx, per_head, q_idx
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
