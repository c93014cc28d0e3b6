"""What runs where: the launches of a plan, and that their outputs come together rightly."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from flexsparse import ExecutorError, compile_mask, everything, h, kv_idx, per_head, q_idx
from flexsparse.analysis.cells import Grid
from flexsparse.dropout import Dropout, is_kept
from flexsparse.executors import flash, flex, flex_kernels
from flexsparse.launch import EXECUTORS
from flexsparse.masks import (
    attention_slices,
    causal,
    flashmask,
    packed,
    same_document,
    sink,
    window,
)

CPU = torch.device("cpu")
ENDS = torch.tensor([0, 5, 6, 20])
IDS = torch.repeat_interleave(torch.arange(3), ENDS.diff())


def inputs(n_heads, n_kv_heads, q_len, kv_len=None, dim=16, batch=2):
    kv_len = kv_len or q_len
    kv = (batch, n_kv_heads, kv_len, dim)
    return torch.randn(batch, n_heads, q_len, dim), torch.randn(kv), torch.randn(kv)


def grid(q_len=20, kv_len=20, q_offset=None):
    return Grid(
        q_len, kv_len, kv_len - q_len if q_offset is None else q_offset, (128, 128), 1, (0,)
    )


def test_a_launch_says_of_each_executor_whether_it_can_run():
    q, k, v = inputs(2, 1, 20)
    found = compile_mask(causal, 20, 20).launches[0].executors(q, k, v)
    assert tuple(name for name, _ in found) == EXECUTORS


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("executor", ["fast", ["flex"]])
def test_an_executor_that_there_is_not_is_refused(executor, batch):
    attend, (q, k, v) = compile_mask(causal, 20, 20), inputs(2, 1, 20, batch=batch)
    with pytest.raises(ExecutorError, match=r"There is no executor .*; there are sdpa, flash"):
        attend(q, k, v, executor=executor)


# ---- which heads run together


def test_heads_that_differ_in_numbers_alone_are_one_launch():
    masks = [
        causal,
        causal & window(9),
        causal,
        causal & window(70),
        causal & (sink(1) | window(3)),
    ]
    attend = compile_mask(per_head(masks), 300, 300)
    assert [launch.heads for launch in attend.launches] == [(0, 2), (1, 3), (4,)]
    assert attend.launches[1].grid.heads == (1, 3)


def test_heads_with_many_blocks_stay_apart():
    masks = [causal & window(1 << 20), causal & window((1 << 20) + 1)]
    attend = compile_mask(per_head(masks), 1 << 20, 1 << 20)
    assert [launch.heads for launch in attend.launches] == [(0,), (1,)]


def test_masks_that_read_the_head_keep_their_meaning():
    masks = [causal & (q_idx - kv_idx < 5 * h + 2)] * 2 + [causal & window(4), causal & window(6)]
    attend = compile_mask(per_head(masks), 200, 200)
    assert [launch.heads for launch in attend.launches] == [(0, 1), (2, 3)]
    q, k, v = inputs(4, 2, 200)
    out = attend(q, k, v, executor="blockwise")
    torch.testing.assert_close(out, attend(q, k, v, executor="reference"))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4, 8])
def test_merged_heads_read_their_own_keys(n_kv_heads):
    order = [3, 50, 3, 9, 200, 9, 9, 7]
    masks = [causal if i == 5 else causal & window(n) for i, n in enumerate(order)]
    attend = compile_mask(per_head(masks), 260, 260)
    q, k, v = inputs(8, n_kv_heads, 260)
    kept = torch.stack([m(0, 0, torch.arange(260)[:, None], torch.arange(260)) for m in masks])
    groups = 8 // n_kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=kept
    )
    # blockwise reads the lists as flex does, and compiles nothing
    out, lse = attend(q, k, v, return_lse=True)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (2, 8, 260)
    if n_kv_heads == 4:
        torch.testing.assert_close(attend(q, k, v), expected)


# ---- FlashAttention


STARTS, DOCUMENT_ENDS = (x.repeat_interleave(ENDS.diff()) for x in (ENDS[:-1], ENDS[1:]))
SLICES = torch.stack([ENDS[:-1], ENDS[1:]], 1)
FULL, CAUSAL, INVERSE = (torch.full((3,), kind) for kind in range(3))
ROWS = torch.stack([DOCUMENT_ENDS, STARTS], 1)[None, None]

BANDS = [
    (everything, grid(), (-1, -1, None)),
    (causal, grid(), (-1, 0, None)),
    (causal, grid(7, 20), (-1, 0, None)),
    (causal & window(5), grid(), (4, 0, None)),
    (causal & window(50), grid(), (-1, 0, None)),
    (window(5), grid(), (4, -1, None)),
    (abs(q_idx - kv_idx) <= 3, grid(), None),  # abs is no normal form
    (window(4) & (kv_idx - q_idx <= 2), grid(), (3, 2, None)),
    (causal & same_document(IDS), grid(), (-1, 0, ENDS)),
    (same_document(IDS), grid(), (-1, -1, ENDS)),
    (causal & window(3) & same_document(IDS), grid(), (2, 0, ENDS)),
    (packed(ENDS), grid(), (-1, 0, ENDS)),
    (packed(ENDS, inner=causal & window(4)), grid(), (3, 0, ENDS)),
    (packed(ENDS, inner=causal & (sink(1) | window(4))), grid(), None),
    (packed(ENDS, inner=causal & (kv_idx < 3)), grid(), None),
    (flashmask(ROWS[..., :1], True), grid(), (-1, 0, ENDS)),
    (flashmask(ROWS[..., :1], True) & window(4), grid(), (3, 0, ENDS)),
    (flashmask(ROWS), grid(), (-1, -1, ENDS)),
    (flashmask(ROWS[..., :1].flip(2), True), grid(), None),
    (attention_slices(SLICES, SLICES, CAUSAL), grid(), (-1, 0, ENDS)),
    (attention_slices(SLICES, SLICES, FULL), grid(), (-1, -1, ENDS)),
    (attention_slices(SLICES, SLICES, INVERSE), grid(), (0, -1, ENDS)),
    (attention_slices(SLICES, SLICES.flip(0), FULL), grid(), None),
    (causal & same_document(IDS.flip(0)[torch.tensor([0, 19] + [5] * 18)]), grid(), None),
    (causal & (sink(2) | window(3)), grid(), None),
    (causal & sink(2), grid(), None),
    (causal & (kv_idx >= 1), grid(), None),
    (q_idx < kv_idx, grid(), None),
    (causal, grid(20, 20, q_offset=4), None),
    (causal | same_document(IDS), grid(), None),
]


def band_of(mask, where):
    return compile_mask(mask, where.q_len, where.kv_len, q_offset=where.q_offset).launches[0].band


@pytest.mark.parametrize(("mask", "where", "expected"), BANDS, ids=lambda x: str(x)[:60])
def test_a_band_is_recognised(mask, where, expected):
    band = band_of(mask, where)
    if expected is None:
        assert band is None
        return
    left, right, ends = expected
    assert (band.left, band.right) == (left, right)
    assert band.cu_seqlens is None if ends is None else band.cu_seqlens.tolist() == ends.tolist()


def dense_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    """What torch documents of varlen_attn, sequence by sequence."""
    out = torch.full((*query.shape[:2], value.shape[2]), math.nan)
    left, right = (math.inf if n == -1 else n for n in window_size)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q), pairwise(cu_seq_k), strict=True):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        q_place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        far = q_place - torch.arange(k1 - k0)
        out[q0:q1] = torch.nn.functional.scaled_dot_product_attention(
            query[q0:q1].transpose(0, 1),
            key[k0:k1].transpose(0, 1),
            value[k0:k1].transpose(0, 1),
            attn_mask=(far <= left) & (-far <= right),
            scale=scale,
            enable_gqa=enable_gqa,
        ).transpose(0, 1)
    return out


@pytest.mark.parametrize(("mask", "where", "expected"), BANDS, ids=lambda x: str(x)[:60])
def test_a_band_runs_as_varlen_attn(monkeypatch, mask, where, expected):
    if expected is None:
        return
    monkeypatch.setattr(flash, "_varlen_attn", lambda: dense_varlen_attn)
    q, k, v = inputs(4, 2, where.q_len, where.kv_len)
    out, _ = flash.run(q, k, v, band_of(mask, where), scale=0.3)
    attend = compile_mask(mask, where.q_len, where.kv_len)
    torch.testing.assert_close(out, attend(q, k, v, scale=0.3, executor="reference"))


def test_flash_says_what_it_cannot_do(monkeypatch):
    q = torch.randn(1, 2, 8, 16)
    assert "runs on CUDA, and q is on cpu" in flash.unsupported(q, q, q)
    attend = compile_mask(causal & window(3), 8, 8)
    with pytest.raises(ExecutorError, match=r'"?flash.* cannot run this call: varlen_attn runs on'):
        attend(q, q, q, executor="flash")
    with pytest.raises(ExecutorError, match="the mask is not one band"):
        compile_mask(causal & (sink(1) | window(3)), 8, 8)(q, q, q, executor="flash")
    on_cuda = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), dtype=torch.float16, shape=(1, 4, 8, 64)
    )
    assert flash.unsupported(on_cuda, on_cuda, on_cuda) is None
    for change, words in [
        ({"dtype": torch.float32}, "takes float16 and bfloat16, and q is torch.float32"),
        ({"shape": (1, 4, 8, 60)}, "a multiple of 8 up to 256; q has 60"),
        ({"shape": (1, 4, 8, 512)}, "up to 256; q has 512"),
    ]:
        wrong = SimpleNamespace(**{**vars(on_cuda), **change})
        assert words in flash.unsupported(wrong, wrong, wrong)
    for option in ({"score_mod": abs}, {"dropout": Dropout(0.1, 0)}, {"return_lse": True}):
        assert flash.unsupported(on_cuda, on_cuda, on_cuda, **option)
    monkeypatch.setitem(flash._imported, "parameters", set())
    assert "this torch has no" in flash.unsupported(on_cuda, on_cuda, on_cuda)


# ---- dropout


def dropped_densely(q, k, v, kept, p, seed):
    """Attention with the dropout written out: kept is [heads, q_len, kv_len]."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~kept, -math.inf)
    b, head, row, key = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    weights = scores.softmax(-1).nan_to_num(0)
    return (weights * is_kept(seed, p, b, head, row, key) / (1 - p)) @ v


@pytest.mark.parametrize("executor", [None, "blockwise", "reference"])
def test_dropout_is_of_query_heads_whatever_runs_them(executor):
    masks = [causal & window(9), causal, causal & (sink(2) | window(4)), causal & window(90)]
    attend = compile_mask(per_head(masks), 150, 150)
    q, k, v = (x.requires_grad_() for x in inputs(4, 4, 150))
    kept = torch.stack([m(0, 0, torch.arange(150)[:, None], torch.arange(150)) for m in masks])
    out = attend(q, k, v, dropout_p=0.3, dropout_seed=11, executor=executor)
    expected = dropped_densely(q, k, v, kept, 0.3, 11)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_through_flex_takes_two_passes(monkeypatch):
    """On CPU flex gives no LSE when compiled; uncompiled it does, and is as exact."""
    monkeypatch.setattr(flex_kernels, "_compile", lambda *options: flex_kernels.attend)
    monkeypatch.setattr(flex_kernels, "_kernels", {})
    mask = causal & window(5) & (q_idx >= 3)  # rows without a key
    q, k, v = inputs(2, 2, 40)
    lists = compile_mask(mask, 40, 40, n_heads=2).block_mask
    dropout = Dropout(0.6, 3).of_heads([1, 0], CPU)
    out, lse = flex.run(q, k, v, lists, dropout=dropout, return_lse=True)
    kept = mask(0, 0, torch.arange(40)[:, None], torch.arange(40))
    expected = dropped_densely(q.flip(1), k.flip(1), v.flip(1), kept, 0.6, 3).flip(1)
    torch.testing.assert_close(out, expected)
    _, expected_lse = compile_mask(mask, 40, 40)(q, k, v, return_lse=True, executor="reference")
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, 2**64 + 5, -7])
def test_a_seed_of_any_64_bits_drops_the_same_weights_through_flex(seed):
    dropout = Dropout.of(0.5, seed)
    index = torch.meshgrid(*map(torch.arange, (2, 2, 20, 30)), indexing="ij")
    scores = dropout.dropping(None, CPU)(torch.zeros(()), *index)
    assert scores.isfinite().equal(dropout.kept(*index))


def test_bad_dropout_is_refused():
    attend = compile_mask(causal, 8, 8)
    q, k, v = inputs(1, 1, 8)
    for p in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="not a chance to drop"):
            attend(q, k, v, dropout_p=p)
    with pytest.raises(ValueError, match=r"dropout_seed is a torch\.float32 tensor"):
        attend(q, k, v, dropout_p=0.1, dropout_seed=torch.tensor(0.5))


# ---- where flex cannot run


def test_without_a_c_compiler_blockwise_runs(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = flex._missing_on_cpu()
    assert "needs a C++ compiler, and no-such-compiler is not to be found: install it" in reason
    monkeypatch.setattr(flex, "_MISSING_ON_CPU", reason)
    attend = compile_mask(causal & window(9), 200, 200)
    assert attend.launches[0].usual_executor == "blockwise"
    assert reason in str(attend)
    q, k, v = inputs(2, 2, 200)
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, executor="reference"))
    with pytest.raises(ExecutorError, match=r"needs a C\+\+ compiler"):
        attend(q, k, v, executor="flex")


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_with_torch_compile_switched_off_blockwise_runs(monkeypatch, variable):
    assert flex._switched_off() is None
    monkeypatch.setenv(variable, "1")
    reason = flex._switched_off()
    assert f"{variable}=1 switches torch.compile off" in reason
    monkeypatch.setattr(flex, "_SWITCHED_OFF", reason)
    attend = compile_mask(causal & window(9), 200, 200)
    assert attend.launches[0].usual_executor == "blockwise"
    assert reason in str(attend)
    q, k, v = inputs(2, 2, 200)
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, executor="reference"))
    with pytest.raises(ExecutorError, match=r"switches torch\.compile off.*choose blockwise"):
        attend(q, k, v, executor="flex")


def test_on_a_mac_blockwise_runs(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert "x86 processor with AVX2" in flex._missing_on_cpu()


# ---- costs


def test_costs_are_those_of_the_blocks():
    attend = compile_mask(per_head([causal] * 2 + [causal & window(64)] * 3), 512, 512)
    cost = attend.cost(head_dim=64, dtype=torch.float32)
    blocks = 2 * 10 + 3 * 7
    assert cost.blocks == blocks
    assert cost.flops == 4 * 64 * 128 * 128 * blocks
    assert cost.bytes == 4 * 64 * (2 * 5 * 512 + 2 * 128 * blocks)
    assert "168 MFLOP" in str(attend)


# ---- streaming


def cuda_launch(mask, q_len, kv_len):
    """The launch of a mask as it would be on CUDA, which this machine need not have."""
    compiled = compile_mask(mask, q_len, kv_len)
    (launch,) = compiled.launches
    return replace(launch, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("mask", "executor"),
    [
        (causal, "sdpa"),
        (everything, "sdpa"),
        (causal & window(64), "flash"),
        (causal & same_document(torch.zeros(300, dtype=torch.int32)), "flash"),
        (causal & (sink(4) | window(64)), "streaming"),
        (causal & sink(4), "streaming"),
        (packed(300 * ENDS // 20), "flash"),
        (packed(300 * ENDS // 20, inner=causal & (sink(4) | window(64))), "streaming"),
        (flashmask(15 * ROWS[..., :1].repeat_interleave(15, 2), True), "flash"),
        (attention_slices(15 * SLICES, 15 * SLICES, CAUSAL), "flash"),
        (attention_slices(*[15 * SLICES[:2]] * 2, CAUSAL[:2]), "flex"),  # and rows of none
        (causal & same_document(IDS.repeat(15)) & (sink(4) | window(64)), "flex"),
        (causal & (q_idx % 2).equals(0), "flex"),
    ],
    ids=str,
)
def test_on_cuda_each_mask_goes_to_the_kernel_made_for_it(mask, executor):
    pytest.importorskip("triton")
    assert cuda_launch(mask, 300, 300).usual_executor == executor
