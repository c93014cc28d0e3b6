"""Block-Sparse-Attention's functions on flexsparse.

A sample of their test grid, in which every two values of two axes meet, and one case of the longest
sequences; the whole grid is `python tests/block_sparse_grid.py`.
"""

import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_sparse_grid import AXES, LONG, Case, all_pairs, check, kept_densely

from flexsparse import MaskError
from flexsparse.compat import block_sparse_attn as theirs
from flexsparse.compat.block_sparse_attn import (
    block_sparse_attn_func,
    block_streaming_attn_func,
    token_streaming_attn_func,
)

SAMPLE = all_pairs(AXES)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_their_grid(case):
    check(case)


@pytest.mark.slow
def test_the_longest_of_their_grid():
    check(Case(LONG, (True, False, 1, 3), 0.3, torch.bfloat16, "gqa", 64, 1, 0.17))


def test_the_sample_has_every_two_values_of_two_axes():
    for i, axis in enumerate(AXES):
        for j, other in enumerate(AXES[:i]):
            met = {(case[i], case[j]) for case in SAMPLE}
            assert met == {(a, b) for a in axis for b in other}


SIGNATURES = {
    "block_sparse_attn_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, head_mask_type, "
    "streaming_info, base_blockmask, max_seqlen_q_, max_seqlen_k_, p_dropout, deterministic=False, "
    "softmax_scale=None, is_causal=False, exact_streaming=False, return_attn_probs=False",
    "token_streaming_attn_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, head_mask_type, "
    "streaming_info, max_seqlen_q_, max_seqlen_k_, deterministic=False, softmax_scale=None, "
    "return_attn_probs=False",
    "block_streaming_attn_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, head_mask_type, "
    "streaming_info, max_seqlen_q_, max_seqlen_k_, p_dropout, deterministic=False, "
    "softmax_scale=None, is_causal=True, return_attn_probs=False",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults_are_theirs(name):
    parameters = inspect.signature(getattr(theirs, name)).parameters.values()
    plain = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[name]})"


def call(function=block_sparse_attn_func, lens=(150, 200), kv_lens=None, n_heads=3, **changes):
    """The function on sequences of these lengths; heads dense, block-sparse and streaming.

    q requires a gradient, so that nothing is compiled.
    """
    kv_lens = kv_lens or lens
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lens, kv_lens))
    rows, columns = (-(-max(n) // 128) for n in (lens, kv_lens))
    torch.manual_seed(1)
    arguments = {
        "q": torch.randn(sum(lens), n_heads, 16, requires_grad=True),
        "k": torch.randn(sum(kv_lens), 1, 16),
        "v": torch.randn(sum(kv_lens), 1, 16),
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "head_mask_type": torch.tensor([0, 1, -1]),
        "streaming_info": torch.tensor([1, 3] * n_heads),
        "base_blockmask": torch.rand(len(lens), 1, rows, columns) < 0.5,
        "max_seqlen_q_": max(lens),
        "max_seqlen_k_": max(kv_lens),
        "p_dropout": 0.0,
        "is_causal": True,
    } | changes
    known = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in known})


@pytest.mark.parametrize(("exact", "is_causal"), [(True, True), (False, True), (False, False)])
def test_streaming_functions_are_the_first_without_block_sparse_heads(exact, is_causal):
    function = token_streaming_attn_func if exact else block_streaming_attn_func
    given = {"head_mask_type": torch.tensor([-1, 0, -1]), "is_causal": is_causal}
    given |= {"streaming_info": torch.tensor([0, 2, 9, 9, 1, 1]), "return_attn_probs": True}
    out, lse, pattern = call(function, **given)
    same = call(base_blockmask=None, exact_streaming=exact, **given)
    assert torch.equal(out, same[0])
    assert torch.equal(lse, same[1])
    assert pattern.numel() == same[2].numel() == 0


@pytest.mark.parametrize(
    ("q_len", "kv_len", "sink", "local"),
    [(200, 201, 0, 1), (200, 328, 0, 1), (300, 172, 1, 1), (300, 45, 0, 2), (512, 256, 1, 3)],
)
def test_block_streaming_follows_the_rule_where_the_diagonal_crosses_blocks(
    q_len, kv_len, sink, local
):
    """Where off % 128 != 0 a local block is nearly lost: 199 rows of the first case are empty."""
    kept = kept_densely(-1, q_len, kv_len, causal=True, exact=False, sink=sink, local=local)
    if (q_len, kv_len) == (200, 201):
        assert int((~kept.any(-1)).sum()) == 199
    out, lse, _ = call(
        block_streaming_attn_func,
        [q_len],
        [kv_len],
        head_mask_type=torch.tensor([-1, -1, -1]),
        streaming_info=torch.tensor([sink, local] * 3),
        return_attn_probs=True,
    )
    empty = ~kept.any(-1)
    assert torch.equal(lse[0].isinf(), empty.expand(3, -1))
    assert (lse[0][:, empty] == math.inf).all()
    assert not out[empty].any()
    assert out[~empty].any(-1).all()


@pytest.mark.parametrize("function", [block_sparse_attn_func, block_streaming_attn_func])
def test_gradients_of_rows_without_keys_are_zero_and_never_nan(function):
    q = torch.randn(350, 3, 16, requires_grad=True)
    types = [1, 1, 1] if function is block_sparse_attn_func else [-1, -1, -1]
    nothing = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    given = {"streaming_info": torch.tensor([0, 1] * 3), "base_blockmask": nothing}
    out, lse, _ = call(
        function,
        kv_lens=[20, 201],
        q=q,
        head_mask_type=torch.tensor(types),
        return_attn_probs=True,
        **given,
    )
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    empty = torch.cat([x[:, :n] for x, n in zip(lse, (150, 200), strict=True)], 1).isinf().T
    assert empty.any()
    assert not q.grad[empty].any()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("lens", [(150, 200), (200, 200)])
def test_dropout_is_decided_by_the_generator_and_does_not_touch_the_lse(lens):
    plain = call(lens=lens, return_attn_probs=True)
    given = {"lens": lens, "p_dropout": 0.17, "return_attn_probs": True, "deterministic": True}
    first, again = call(**given), call(**given)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], plain[0])
    torch.testing.assert_close(first[1], plain[1])
    pattern = first[2]
    assert pattern.shape == (2, 3, max(lens), max(lens))
    assert pattern.dtype == torch.int8
    for i, n in enumerate(lens):
        assert (pattern[i, :, :n, :n] != 0).all()
        assert not pattern[i, :, n:].any()
        assert not pattern[i, :, :, n:].any()


@pytest.fixture
def analyses(monkeypatch):
    """Counts calls of the analysis."""
    from flexsparse.analysis import classify

    made = []
    reading = classify.interval_reading
    monkeypatch.setattr(classify, "interval_reading", lambda *a: made.append(a) or reading(*a))
    return made


@pytest.mark.parametrize("lens", [(150, 211), (211, 211)])
def test_a_second_call_analyses_nothing(analyses, lens):
    blocks = torch.rand(2, 1, 2, 2) < 0.5
    first = call(lens=lens, base_blockmask=blocks)
    n_analyses = len(analyses)
    assert n_analyses > 0
    assert torch.equal(call(lens=lens, base_blockmask=blocks.clone()), first)
    assert len(analyses) == n_analyses


def test_a_base_blockmask_written_to_in_place_is_read_again():
    blocks = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    before = call(base_blockmask=blocks)
    blocks.fill_(1)
    after = call(base_blockmask=blocks)
    assert not before[:, 1].any()
    dense = call(head_mask_type=torch.tensor([0, 0, -1]), base_blockmask=None)
    torch.testing.assert_close(after, dense)


@pytest.mark.parametrize("lens", [(150, 200), (200, 200), (200,)])
def test_heads_with_one_mask_share_its_blocks(lens):
    alike = (torch.rand(len(lens), 1, 2, 2) < 0.5).repeat(1, 3, 1, 1)
    types = torch.tensor([1, 1, 1])
    out = call(lens=lens, head_mask_type=types, base_blockmask=alike)
    for head in range(3):
        others = alike.clone()
        others[:, (head + 1) % 3] ^= True
        differing = call(lens=lens, head_mask_type=types, base_blockmask=others)
        torch.testing.assert_close(out[:, head], differing[:, head])


@pytest.mark.parametrize("max_seqlen_k_", [0, 128])
def test_no_keys_at_all(max_seqlen_k_):
    given = {"lens": [150, 200], "kv_lens": [0, 0], "max_seqlen_k_": max_seqlen_k_}
    given["p_dropout"] = 0.17
    blocks = torch.ones(2, 1, 2, max_seqlen_k_ // 128, dtype=torch.bool)
    out, lse, pattern = call(**given, base_blockmask=blocks, return_attn_probs=True)
    assert not out.any()
    assert (lse == math.inf).all()
    assert not pattern.any()


def test_longer_max_seqlens_and_lists_are_fine():
    blocks = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    given = {"max_seqlen_q_": 300, "max_seqlen_k_": 600, "base_blockmask": blocks}
    out, lse, _ = call(**given, head_mask_type=[0, 1, -1], return_attn_probs=True)
    torch.testing.assert_close(out, call(base_blockmask=blocks[:, :, :2, :2]))
    assert lse.shape == (2, 3, 300)


@pytest.mark.parametrize("head_dim", [1, 20, 80, 256])
def test_any_head_dim(head_dim):
    sizes = {"q": 3, "k": 1, "v": 1}
    given = {x: torch.randn(350, n, head_dim, requires_grad=True) for x, n in sizes.items()}
    given["head_mask_type"] = torch.tensor([0, 0, 0])
    out = call(**given, base_blockmask=None, streaming_info=None)
    for part in (slice(0, 150), slice(150, 350)):
        q, k, v = (given[name][part].transpose(0, 1) for name in "qkv")
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out[part], expected.transpose(0, 1))


def test_softmax_scale_is_used():
    given = {"head_mask_type": torch.tensor([0, 0, 0]), "base_blockmask": None}
    q = torch.randn(350, 3, 16, requires_grad=True)
    out = call(q=2 * q, softmax_scale=0.1, **given)
    torch.testing.assert_close(out, call(q=q, softmax_scale=0.2, **given))


@pytest.mark.slow
def test_compiled_kernels_agree():
    expected = call()
    with torch.no_grad():
        torch.testing.assert_close(call(), expected)


BAD = [
    ({"cu_seqlens_q": torch.tensor([1, 150, 350])}, "cu_seqlens_q starts at 1; it must start at 0"),
    ({"cu_seqlens_k": torch.tensor([0, 400, 350])}, "cu_seqlens_k decreases from 400 to 350"),
    (
        {"cu_seqlens_q": torch.tensor([0, 150, 340])},
        "cu_seqlens_q ends at 340 and q has 350 tokens",
    ),
    (
        {"cu_seqlens_k": torch.tensor([0, 150, 340])},
        "cu_seqlens_k ends at 340 and k has 350 tokens",
    ),
    ({"head_mask_type": [0, 1]}, "head_mask_type has 2 entries and q has 3 heads"),
    ({"head_mask_type": [0, 1, 2]}, r"head_mask_type\[2\] is 2; this call takes 0 \(dense\), 1"),
    ({"head_mask_type": [0, 1, -2]}, r"head_mask_type\[2\] is -2"),
    ({"head_mask_type": torch.tensor([0.0, 1.0, 0.0])}, "must be a tensor of integers"),
    ({"base_blockmask": None}, "base_blockmask is None, and head 1 is of type 1"),
    (
        {"base_blockmask": torch.ones(2, 2, 2, 2, dtype=torch.bool)},
        r"shape \(2, 2, 2, 2\); it must be \(2, 1, 2, 2\): 2 batch, 1 heads of type 1",
    ),
    ({"base_blockmask": torch.ones(2, 1, 3, 2, dtype=torch.bool)}, r"must be \(2, 1, 2, 2\)"),
    ({"base_blockmask": torch.ones(2, 1, 2, 1, dtype=torch.bool)}, "2 columns of 128 keys"),
    ({"base_blockmask": torch.ones(1, 1, 2, 2, dtype=torch.bool)}, "2 batch"),
    ({"base_blockmask": torch.ones(2, 1, 2, 2)}, "base_blockmask is torch.float32; give a boolean"),
    ({"exact_streaming": True, "is_causal": False}, "exact_streaming=True and is_causal=False"),
    ({"streaming_info": None}, "streaming_info is None, and head 2 streams"),
    ({"streaming_info": [1, 3]}, "streaming_info has 2 entries; .* 6 integers"),
    ({"streaming_info": [1, 3, 1, 3, -1, 3]}, "streaming_info has sink -1 for head 2"),
    ({"streaming_info": [1, 3, 1, 3, 1, 0]}, "streaming_info has local 0 for head 2"),
    ({"p_dropout": 1.0}, r"p_dropout=1.0; it must be in \[0, 1\)"),
    ({"p_dropout": -0.1}, "p_dropout=-0.1"),
    ({"max_seqlen_q_": 199}, "max_seqlen_q_=199, and the longest sequence has 200 tokens"),
    ({"max_seqlen_k_": 100}, "max_seqlen_k_=100"),
    ({"max_seqlen_q_": 200.0}, "max_seqlen_q_=200.0; it must be an int"),
    ({"max_seqlen_k_": None}, "max_seqlen_k_=None; it must be an int"),
    (
        {"base_blockmask": torch.ones(2, 1, 2, 2, dtype=torch.bool, device="meta")},
        "base_blockmask is on meta, where tensors have no values",
    ),
    ({"q": torch.randn(2, 175, 3, 16)}, r"q is \(2, 175, 3, 16\); it must be a tensor \[tokens"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_mistake_is_named(changes, message):
    with pytest.raises(MaskError, match=message):
        call(**changes)


@pytest.mark.parametrize("function", [token_streaming_attn_func, block_streaming_attn_func])
def test_streaming_functions_know_two_types(function):
    with pytest.raises(MaskError, match=r"takes 0 \(dense\), -1 \(streaming\)"):
        call(function)


def test_the_example_runs():
    script = Path(__file__).parent.parent / "examples" / "block_sparse_attn.py"
    small = ["--tokens", "400", "--heads", "3", "--kv-heads", "1", "--head-dim", "16"]
    done = subprocess.run(
        [sys.executable, str(script), *small], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "token streaming: out [733, 3, 16], largest gradient of q" in done.stdout
