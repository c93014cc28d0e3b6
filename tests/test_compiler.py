import itertools
import math
import pickle

import pytest
import torch
import torch.utils.checkpoint
from mask_mods import OPAQUE
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

import flexsparse as fs
from flexsparse import (
    ExecutorError,
    MaskError,
    b,
    compile_mask,
    from_mask_mod,
    h,
    kv_idx,
    lookup,
    per_head,
    q_idx,
)
from flexsparse.compiler import CompiledMask
from flexsparse.executors import flex_kernels, reference
from flexsparse.masks import causal, full, packed, padding, sink, window

STREAMING = causal & (sink(4) | window(100))


def inputs(q_len, kv_len, n_heads=4, n_kv_heads=4, batch=1, dim=32, v_dim=32, dtype=torch.float32):
    q = torch.randn(batch, n_heads, q_len, dim, dtype=dtype)
    k = torch.randn(batch, n_kv_heads, kv_len, dim, dtype=dtype)
    return q, k, torch.randn(batch, n_kv_heads, kv_len, v_dim, dtype=dtype)


def dense_sdpa(mask, q, k, v, q_offset=None, **options):
    """torch's dense attention with the mask spelled out; empty rows set to 0."""
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    kept = mask(
        torch.arange(q.shape[0]).view(-1, 1, 1, 1),
        torch.arange(q.shape[1]).view(-1, 1, 1),
        torch.arange(q.shape[2])[:, None] + offset,
        torch.arange(k.shape[2]),
    ).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out = scaled_dot_product_attention(q, k, v, attn_mask=kept, enable_gqa=True, **options)
    return out.masked_fill(~kept.any(-1, keepdim=True), 0)


def assert_as_good_as_dense(out, mask, q, k, v, **options):
    """No more than twice the error of dense attention in the same dtype, against float64."""
    exact = dense_sdpa(mask, *(x.double() for x in (q, k, v)), **options)
    theirs = (dense_sdpa(mask, q, k, v, **options).double() - exact).abs().max()
    ours = (out.double() - exact).abs().max()
    # a floor of a few roundings, for cases in which dense attention is exact by luck
    floor = 8 * torch.finfo(q.dtype).eps * exact.abs().max()
    assert ours <= 2 * theirs + floor, (ours, theirs)


SHAPES = [(127, 127), (128, 128), (129, 129), (1000, 1000), (200, 1000), (1000, 200)]


@pytest.mark.parametrize("executor", ["flex", "blockwise", "reference"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_executors_agree_with_dense_attention(executor, group_size):
    for q_len, kv_len in SHAPES:
        q, k, v = inputs(q_len, kv_len, n_kv_heads=4 // group_size, batch=2)
        out = compile_mask(STREAMING, q_len, kv_len)(q, k, v, executor=executor)
        assert_as_good_as_dense(out, STREAMING, q, k, v)


def test_kernels_are_not_given_arithmetic_in_half_precision():
    gate = torch.linspace(0, 1, 300).bfloat16()
    mask = from_mask_mod(lambda b, h, q_idx, kv_idx: gate[q_idx] + gate[kv_idx] > 1)
    attend, qkv = compile_mask(mask, 300, 300), inputs(300, 300)
    assert_as_good_as_dense(attend(*qkv), mask, *qkv)
    with pytest.raises(ExecutorError, match=r"aten.add in float32, and the mask in torch.bfloat16"):
        attend(*qkv, executor="flex")


def test_kernels_are_not_given_a_mask_that_they_would_write_out_without_end():
    """Inductor computes a term anew at each use: 60 that each use the last twice, 2**60 times."""
    doubling, deep = causal, causal
    for i in range(60):
        doubling = (doubling ^ (kv_idx < i)) & (doubling | (q_idx < i))
    for _ in range(1601):
        deep = ~deep
    for mask in (doubling, deep):
        attend, qkv = compile_mask(mask, 64, 64), inputs(64, 64)
        assert attend.launches[0].usual_executor == "blockwise"
        assert_as_good_as_dense(attend(*qkv), mask, *qkv)
        with pytest.raises(ExecutorError, match=r"anew wherever it is used.*2,048 operators"):
            attend(*qkv, executor="flex")


@pytest.mark.slow
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 700), (300, 1)])
def test_lengths_of_one(q_len, kv_len):
    q, k, v = inputs(q_len, kv_len)
    out = compile_mask(STREAMING, q_len, kv_len)(q, k, v, executor="flex")
    assert_as_good_as_dense(out, STREAMING, q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    q, k, v = inputs(300, 300, dtype=dtype)
    out = compile_mask(STREAMING, 300, 300)(q, k, v, executor="flex")
    assert out.dtype == dtype
    assert_as_good_as_dense(out, STREAMING, q, k, v)


def test_the_reference_lse_is_that_of_the_kept_scores():
    q, k, v = inputs(50, 70)
    _, lse = compile_mask(STREAMING, 50, 70)(q, k, v, return_lse=True, executor="reference")
    scores = q @ k.mT / q.shape[-1] ** 0.5
    kept = STREAMING(None, None, torch.arange(20, 70)[:, None], torch.arange(70))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, scores.masked_fill(~kept, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize("mask", [full, causal], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (100, 300), (300, 100)])
def test_full_and_causal_heads_go_to_sdpa(mask, q_len, kv_len):
    q, k, v = inputs(q_len, kv_len, n_kv_heads=2)
    attend = compile_mask(mask, q_len, kv_len, q_offset=0)
    out = attend(q, k, v, executor="sdpa")
    assert torch.equal(out, attend(q, k, v))
    assert_as_good_as_dense(out, mask, q, k, v, q_offset=0)


def test_sdpa_refuses_what_it_cannot_align():
    q, k, v = inputs(100, 300)
    with pytest.raises(ExecutorError, match="takes full masks, and causal ones"):
        compile_mask(causal, 100, 300)(q, k, v, executor="sdpa")


@pytest.mark.parametrize("executor", ["flex", "blockwise", "reference"])
def test_a_row_without_keys_gives_zero(executor):
    q, k, v = inputs(200, 100)  # bottom-right: the first 100 queries stand before every key
    out = compile_mask(causal, 200, 100)(q, k, v, executor=executor)
    assert (out[:, :, :100] == 0).all()
    assert (out[:, :, 100:] != 0).all()


def test_the_lse_of_a_row_without_keys_is_minus_infinity():
    q, k, v = inputs(200, 100)
    _, lse = compile_mask(causal, 200, 100)(q, k, v, return_lse=True)
    assert (lse[:, :, :100] == -torch.inf).all()
    assert lse[:, :, 100:].isfinite().all()


@pytest.mark.parametrize("n_kv_heads", [8, 4, 2, 1])
def test_each_head_has_its_own_mask(n_kv_heads):
    heads = [causal, STREAMING, STREAMING, causal, STREAMING, full, causal & window(30), STREAMING]
    q, k, v = inputs(300, 300, n_heads=8, n_kv_heads=n_kv_heads)
    out, lse = compile_mask(per_head(heads), 300, 300)(q, k, v, return_lse=True)
    for head, mask in enumerate(heads):
        kv = slice(head * n_kv_heads // 8, head * n_kv_heads // 8 + 1)
        one = compile_mask(mask, 300, 300)
        expected = one(q[:, [head]], k[:, kv], v[:, kv], return_lse=True, executor="reference")
        torch.testing.assert_close(out[:, [head]], expected[0])
        torch.testing.assert_close(lse[:, [head]], expected[1])


def test_heads_in_flex_launches_come_back_in_order():
    heads = [causal, STREAMING, causal, STREAMING]
    q, k, v = inputs(300, 300, n_kv_heads=2)
    attend = compile_mask(per_head(heads), 300, 300)
    torch.testing.assert_close(
        attend(q, k, v, executor="flex"), attend(q, k, v, executor="reference")
    )


@pytest.mark.parametrize("name", ["bytes", "place"])
def test_kernels_count_on_with_the_results_of_operators_without_a_rule(name):
    mask_mod, _ = OPAQUE[name]
    q, k, v = inputs(300, 300)
    kept = create_mask(mask_mod, 1, 1, 300, 300, "cpu")
    attend = compile_mask(from_mask_mod(mask_mod), 300, 300)
    assert attend.launches[0].usual_executor == "flex"
    assert_as_good_as_dense(attend(q, k, v), lambda *where: kept, q, k, v)


def test_masks_that_read_the_head_and_the_batch_row():
    mask = causal & (q_idx - kv_idx < lookup(torch.tensor([5, 50, 500, 1]), h))
    mask = mask & padding(torch.tensor([300, 40]))
    q, k, v = inputs(300, 300, n_kv_heads=2, batch=2)
    attend = compile_mask(mask, 300, 300, batch=2, n_heads=4)
    assert_as_good_as_dense(attend(q, k, v, executor="flex"), mask, q, k, v)


def test_a_head_table_keeps_its_heads_when_grouped():
    by_head = causal & (q_idx - kv_idx < lookup(torch.tensor([5, 50, 500, 1]), h))
    q, k, v = inputs(300, 300, n_kv_heads=2)
    attend = compile_mask(per_head([causal, by_head, causal, by_head]), 300, 300)
    out = attend(q, k, v, executor="flex")
    for head, size in ((1, 50), (3, 1)):
        one = dense_sdpa(causal & window(size), q[:, [head]], k[:, [head // 2]], v[:, [head // 2]])
        torch.testing.assert_close(out[:, [head]], one)


def test_packed_sequences_of_different_lengths():
    cu_q, cu_kv = torch.tensor([0, 50, 51, 180]), torch.tensor([0, 40, 140, 300])
    q, k, v = inputs(180, 300)
    out = compile_mask(packed(cu_q, cu_kv), 180, 300, q_offset=0)(q, k, v, executor="flex")
    for i in range(3):
        q_part, kv_part = slice(cu_q[i], cu_q[i + 1]), slice(cu_kv[i], cu_kv[i + 1])
        one = dense_sdpa(causal, q[:, :, q_part], k[:, :, kv_part], v[:, :, kv_part])
        torch.testing.assert_close(out[:, :, q_part], one)


@pytest.mark.parametrize("executor", ["flex", "blockwise", "reference"])
def test_scale_and_score_mod_see_heads_and_positions(executor):
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])

    def alibi(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    q, k, v = inputs(100, 300)
    heads = [causal, STREAMING, causal, STREAMING]
    out = compile_mask(per_head(heads), 100, 300)(
        q, k, v, scale=0.3, score_mod=alibi, executor=executor
    )
    distance = torch.arange(200, 300)[:, None] - torch.arange(300)
    for head, mask in enumerate(heads):
        kept = mask(None, None, torch.arange(200, 300)[:, None], torch.arange(300))
        scores = q[:, head] @ k[:, head].mT * 0.3 - slopes[head] * distance
        expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ v[:, head]
        torch.testing.assert_close(out[:, head], expected)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("mask", [causal, full], ids=str)
def test_a_scale_that_is_not_positive(mask, scale):
    tensors = [x.double().requires_grad_() for x in inputs(150, 150, n_kv_heads=2)]
    attend = compile_mask(mask, 150, 150)
    assert attend.launches[0].usual_executor == "sdpa"
    out, exact = (attend(*tensors, scale=scale, executor=x) for x in (None, "reference"))
    torch.testing.assert_close(out, exact)
    grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (out, exact)]
    torch.testing.assert_close(*grads)


def test_gradients_on_cpu():
    q, k, v = (x.requires_grad_() for x in inputs(150, 200, n_kv_heads=2))
    out = compile_mask(STREAMING, 150, 200)(q, k, v)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), weights)
    theirs = torch.autograd.grad(dense_sdpa(STREAMING, q, k, v), (q, k, v), weights)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, their)


@pytest.mark.parametrize("heads", [[causal] * 2 + [STREAMING] * 2, [causal, STREAMING] * 2])
def test_gradients_of_parts_come_together(heads):
    q, k, v = (x.requires_grad_() for x in inputs(150, 200, n_kv_heads=2))
    attend = compile_mask(per_head(heads), 150, 200)
    weights = torch.randn(1, 4, 150, 32)
    ours = torch.autograd.grad(attend(q, k, v), (q, k, v), weights)
    theirs = torch.autograd.grad(attend(q, k, v, executor="reference"), (q, k, v), weights)
    torch.testing.assert_close(ours, theirs)


def test_heads_in_order_are_split_at_once():
    q, k, v = (x.requires_grad_() for x in inputs(150, 200, n_kv_heads=2))
    out = compile_mask(per_head([causal] * 2 + [STREAMING] * 2), 150, 200)(q, k, v)
    names, nodes = [], [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [x for x, _ in node.next_functions if x is not None]
    assert {x for x in names if "Split" in x or "Slice" in x} == {"SplitWithSizesBackward0"}


def test_no_batch_rows_give_none():
    attend = compile_mask(per_head([causal, STREAMING] * 2), 150, 200)
    q, k, v = (x.requires_grad_() for x in inputs(150, 200, n_kv_heads=2, batch=0, v_dim=16))
    out, lse = attend(q, k, v, return_lse=True, dropout_p=0.1)
    assert (out.shape, lse.shape) == ((0, 4, 150, 16), (0, 4, 150))
    for executor in (None, "gather", "flex", "blockwise", "reference"):
        assert attend(q.detach(), k.detach(), v.detach(), executor=executor).shape == out.shape
    assert torch.compile(attend, fullgraph=True, backend="eager")(q, k, v).shape == out.shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [
        x.shape for x in (q, k, v)
    ]


@pytest.mark.parametrize(
    "own",
    [[q_idx // (2 - h) >= kv_idx] * 2, [q_idx - kv_idx < lookup(torch.arange(17) * 10, h)] * 17],
    ids=["divisor", "table"],
)
def test_the_block_mask_reads_each_mask_at_its_own_heads(own):
    heads = per_head([*own, *[causal] * 20])
    mod = compile_mask(heads, 256, 256, device="cpu").block_mask.mask_mod
    q, kv = torch.arange(256)[:, None], torch.arange(256)
    for head in range(heads.n_heads):
        assert torch.equal(
            mod(torch.tensor(0), torch.tensor(head), q, kv),
            heads[head](torch.tensor(0), torch.tensor(head), q, kv),
        )


def test_the_block_mask_works_with_plain_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = inputs(300, 300)
    attend = compile_mask(per_head([causal, STREAMING, causal, STREAMING]), 300, 300)
    out = torch.compile(flex_attention, dynamic=False)(q, k, v, block_mask=attend.block_mask)
    torch.testing.assert_close(out, attend(q, k, v, executor="reference"))


@pytest.mark.slow
def test_inside_a_compiled_model():
    attend = compile_mask(per_head([causal, causal, STREAMING, STREAMING]), 300, 300)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(128, 3 * 128)
            self.out = torch.nn.Linear(128, 128)

        def forward(self, x):
            # views into one projection, as models have them
            q, k, v = (t.unflatten(-1, (4, 32)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(attend(q, k, v).transpose(1, 2).flatten(-2))

    model, x = Model(), torch.randn(2, 300, 128)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(compiled, model(x))


def test_a_mask_made_inside_a_compiled_model():
    torch._dynamo.reset()

    @torch.compile(backend="eager")
    def model(q, k, v):
        mask = from_mask_mod(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 100)
        attend = compile_mask(causal & mask, q.shape[2], k.shape[2])
        return attend(2 * q, k, v, executor="reference")

    for length in (200, 300):
        q, k, v = inputs(length, length)
        assert_as_good_as_dense(model(q, k, v), causal & window(100), 2 * q, k, v)


def test_one_kernel_for_all_numbers_and_lengths():
    q, k, v = inputs(700, 700)
    compile_mask(causal & (sink(2) | window(11)), 700, 700)(q, k, v)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size, q_len, kv_len in [(13, 700, 700), (500, 640, 640), (64, 300, 700), (1, 129, 513)]:
            mask = causal & (sink(size) | window(size))
            q, k, v = inputs(q_len, kv_len)
            out = compile_mask(mask, q_len, kv_len)(q, k, v, executor="flex")
            assert_as_good_as_dense(out, mask, q, k, v)


def test_without_gradients_inputs_may_still_ask_for_them():
    q, k, v = (x.requires_grad_() for x in inputs(700, 700))
    attend = compile_mask(causal & (sink(2) | window(11)), 700, 700)
    with torch.no_grad():
        out = attend(q.view_as(q), k, v, executor="flex")
    assert_as_good_as_dense(out, causal & (sink(2) | window(11)), q, k, v)


def test_dynamo_giving_up_is_noticed(monkeypatch):
    """When dynamo meets its limit of recompilations it runs the body: that must never be used."""
    q, k, v = inputs(64, 64)
    attend = compile_mask(causal & window(7), 64, 64)
    attend(q, k, v)
    with pytest.raises(flex_kernels._GaveUpError):
        flex_kernels._attend_compiled(
            q, k, v, attend.launches[0].block_mask((0,)), None, None, False, {}
        )


def test_a_single_head_is_one_head():
    attend = compile_mask(per_head([causal]), 64, 64)
    assert attend.n_heads == 1
    with pytest.raises(MaskError, match="has 1 heads but q has 4"):
        attend(*inputs(64, 64))


def _messages(argument):
    """The name of a mistake: what a function prints as differs from run to run."""
    return argument[:30] if isinstance(argument, str) else ""


ON_META = torch.zeros(8, dtype=torch.int64, device="meta")


def of_table(table):
    return lookup(table, *[q_idx] * table.dim()) < kv_idx


COMPILE_MISTAKES = [
    (lambda: compile_mask(causal, 8, 8, n_heads="4"), "n_heads='4'"),
    (lambda: compile_mask(causal, 8, 8, n_heads=-1), "n_heads=-1"),
    (lambda: compile_mask(window, 8, 8), "Call the pattern first"),
    (lambda: compile_mask("causal", 8, 8), "not str"),
    (lambda: compile_mask(causal, 0, 8), "q_len=0"),
    (lambda: compile_mask(causal, 8, 8.0), r"kv_len=8\.0"),
    (lambda: compile_mask(causal, 8, 8, q_offset=0.5), r"q_offset=0\.5"),
    (
        lambda: compile_mask([causal], 8, 8),
        r"compile_mask takes a Mask .*, not list. Wrap the list",
    ),
    (lambda: compile_mask(causal, 8, 8, q_offset=2**70), r"positions must be within 2\*\*61"),
    (lambda: compile_mask(causal, 8, 8).row(10**30), "row: position=1000.*must be within"),
    (lambda: compile_mask(causal, 8, 8).at(8, 8, 10**30), "q_offset=1000.*must be within"),
    *[
        (lambda size=size, door=door: door(size), r"(?i)block_size=.*; it must be an int of 1 to")
        for size in (0, -1, 5.0, None, True, 2**70, "64", (64, 0), torch.tensor(64))
        for door in (
            lambda size: compile_mask(causal, 8, 8, block_size=size),
            lambda size: fs.create_block_mask(causal, None, None, 8, 8, "cpu", size),
            lambda size: fs.diff(causal, full, 8, 8, block_size=size),
            lambda size: fs.draw(causal, 8, block_size=(0, 1) if size is None else size),
        )
    ],
    (lambda: compile_mask(causal, 8, 8, block_size=0), "block_size=0"),
    (lambda: compile_mask(causal, 8, 8, block_size=(1, 2, 3)), r"block_size=\(1, 2, 3\)"),
    (lambda: compile_mask(causal, 8, 8, device="nowhere"), "device='nowhere' cannot be used"),
    (lambda: compile_mask(causal, 8, 8, device=[]), r"device=\[\] cannot be used"),
    (lambda: compile_mask(causal, 8, 2**31), "kv_len=2147483648; it must be at most 2,147,483,647"),
    (lambda: compile_mask(causal, 8, 8, n_heads=10**9), "it must be at most 65,536"),
    (lambda: compile_mask(q_idx == kv_idx, 8, 8), r"not bool.* write a\.equals\(b\)"),
    (lambda: compile_mask(kv_idx < h, 8, 8), "reads h.*give n_heads"),
    (lambda: compile_mask(kv_idx < b, 8, 8), "reads b.*give batch"),
    (lambda: compile_mask(per_head([causal] * 3), 8, 8, n_heads=4), "3 masks but n_heads=4"),
    (
        lambda: compile_mask(lookup(torch.arange(4), kv_idx) < 3, 8, 8),
        r"int64\[4\] is read out of range: dimension 0 has 4 entries.*from 0 to 7.*kv_idx=4",
    ),
    (
        lambda: compile_mask(lookup(torch.arange(8), q_idx) < 3, 8, 4),
        "positions below 0 come from q_offset < 0",
    ),
    (
        lambda: compile_mask(lookup(torch.arange(8), q_idx - 3) < 3, 8, 8),
        r"q_idx - 3 reaches from -3 to 4\. Make the table longer, or bound the index",
    ),
    (lambda: compile_mask(q_idx // (kv_idx - 3) < 1, 8, 8), "divisor of .* is 0 at .*kv_idx=3"),
    (
        lambda: compile_mask(q_idx * q_idx * q_idx * q_idx < 9, 1 << 20, 8),
        "may leave int64 at these lengths",
    ),
    (
        lambda: compile_mask(fs.bit_or(q_idx, 0) * 2**59 * (kv_idx + 1) > 0, 512, 512),
        "may leave int64 at these lengths",
    ),
    (lambda: compile_mask(fs.bit_or(q_idx * 2**60, 1) > 0, 512, 512), "may leave int64"),
    *[
        (lambda door=door, table=table: door(table), r"The table int64\[8?\] is on meta, where")
        for table in (ON_META, ON_META[0])
        for door in (
            lambda table: compile_mask(of_table(table), 8, 8),
            lambda table: compile_mask(of_table(table), 8, 8, device="cpu"),
            lambda table: fs.check(of_table(table), 8, 8),
            lambda table: fs.diff(of_table(table), causal, 8, 8),
            lambda table: from_mask_mod(lambda b, h, q, kv: table.expand(8)[q] < kv),
        )
    ],
    (
        lambda: compile_mask(of_table(torch.arange(8)), 8, 8, device="meta"),
        "is on cpu and the mask is compiled for meta. Compile with device='cpu'",
    ),
    (lambda: compile_mask(causal, 8, 8).cost(dtype="fp16"), "dtype='fp16'; it must be a torch.dt"),
    (lambda: compile_mask(causal, 8, 8).cost(head_dim=-1), "head_dim=-1; it must be an int of 1"),
]


@pytest.mark.parametrize(("build", "message"), COMPILE_MISTAKES, ids=_messages)
def test_compile_mistakes_get_a_sentence(build, message):
    with pytest.raises(MaskError, match=message):
        build()


def test_a_table_in_range_where_it_is_read_is_accepted():
    # bounds alone cannot tell that (3 * kv_idx) % 8 - kv_idx % 3 + 2 stays below 10
    index = (3 * kv_idx) % 8 - kv_idx % 3 + 2
    assert compile_mask(lookup(torch.arange(10), index) < 3, 64, 64).launches


CALL_MISTAKES = [
    (lambda q, k, v: (q[0], k, v), "q is .*must be a tensor"),
    (lambda q, k, v: (q, None, v), "k is NoneType"),
    (lambda q, k, v: (q, k.double(), v), "k is torch.float64 and q is torch.float32"),
    (lambda q, k, v: (q, k.to("meta"), v), "k is on meta"),
    (lambda q, k, v: (q[:, :, :10], k, v), "q has length 10 but .* q_len=64"),
    (lambda q, k, v: (q, k[:, :, :10], v), "k has length 10 but .* kv_len=64"),
    (lambda q, k, v: (q, k, v[:, :, :10]), "v has length 10"),
    (lambda q, k, v: (q, k[..., :8], v), "q has head_dim 32 and k has 8"),
    (lambda q, k, v: (q, k[:, :3], v[:, :3]), "not a multiple of the 3 heads"),
    (lambda q, k, v: (q, k[:, :2], v), "k has 2 heads and v has 4"),
    (
        lambda q, k, v: (q[:, :2], k[:, :2], v[:, :2]),
        r"has 4 heads but q has 2 query heads.*\*query\*",
    ),
    (lambda q, k, v: (q, k.expand(3, -1, -1, -1), v), "k has 3 batch rows and q has 1"),
    (lambda q, k, v: (q.int(), k.int(), v.int()), "takes floating-point"),
    (
        lambda q, k, v: [x.to(torch.float8_e4m3fn) for x in (q, k, v)],
        "float8_e4m3fn; .* float16, bfloat16, float32 or float64",
    ),
    (lambda q, k, v: (q.to_sparse(), k, v), "q is nested or sparse; pad it"),
    (lambda q, k, v: (q, torch.nested.nested_tensor([*k]), v), "k is nested or sparse; pad it"),
    (lambda q, k, v: (q[..., :0], k[..., :0], v), r"q is \(1, 4, 64, 0\); .* 1 or more"),
    (lambda q, k, v: (q, k, v[..., :0]), r"v is \(1, 4, 64, 0\); .* 1 or more"),
    (lambda q, k, v: (q[:, :0], k, v), r"q is \(1, 0, 64, 32\); .* 1 or more"),
    (lambda q, k, v: (q[:, :, :0], k, v), "q has length 0; .* 1 token or more"),
    (lambda q, k, v: (q, k, v[:, :, :0]), "v has length 0; .* 1 token or more"),
]


@pytest.mark.parametrize(("change", "message"), CALL_MISTAKES, ids=_messages)
def test_call_mistakes_get_a_sentence(change, message):
    attend = compile_mask(per_head([causal, causal, full, full]), 64, 64)
    with pytest.raises(MaskError, match=message):
        attend(*change(*inputs(64, 64)))


OPTION_MISTAKES = [
    ({"scale": "x"}, "scale='x'; it must be a finite number"),
    ({"scale": float("nan")}, "scale=nan"),
    ({"scale": float("inf")}, "scale=inf"),
    ({"scale": True}, "scale=True"),
    ({"scale": torch.tensor(0.3, requires_grad=True)}, "scale is a tensor .*multiply q by it"),
    ({"dropout_p": "0.1"}, "dropout_p='0.1' is not a chance"),
    ({"dropout_p": None}, "dropout_p=None"),
    ({"dropout_p": torch.tensor(0.1)}, r"dropout_p=tensor\(0.1"),
    ({"dropout_p": 0.9999999999}, r"drops every weight.*1 - 2\^-31"),
    ({"dropout_p": 0.1, "dropout_seed": "x"}, "dropout_seed='x'"),
    ({"dropout_p": 0.1, "dropout_seed": 1.5}, "dropout_seed=1.5"),
    ({"score_mod": 3}, "score_mod=3; it must be a function"),
    ({"score_mod": lambda score, b, h: score}, r"<lambda>\(score, b, h\) takes something else"),
    ({"score_mod": lambda *_: None}, "<lambda> returned None"),
]


@pytest.mark.parametrize("executor", ["flex", "blockwise", "reference"])
@pytest.mark.parametrize(("options", "message"), OPTION_MISTAKES, ids=lambda x: str(x)[:30])
def test_mistaken_options_get_a_sentence(options, message, executor):
    attend = compile_mask(STREAMING, 64, 64)
    with pytest.raises(MaskError, match=message):
        attend(*inputs(64, 64), executor=executor, **options)


def test_an_error_inside_a_score_mod_is_its_own():
    def broken(score, b, h, q_idx, kv_idx):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        compile_mask(STREAMING, 64, 64)(*inputs(64, 64), score_mod=broken, executor="reference")


@pytest.mark.parametrize("executor", ["flex", "blockwise", "reference"])
def test_a_score_mod_may_give_float64(executor):
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64)
    alibi = lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)  # noqa: E731
    attend, qkv = compile_mask(STREAMING, 64, 64), inputs(64, 64)
    out = attend(*qkv, score_mod=alibi, executor=executor)
    exact = attend(*(x.double() for x in qkv), score_mod=alibi, executor="reference")
    torch.testing.assert_close(out, exact.float())


@pytest.mark.parametrize(
    "score_mod",
    [
        lambda score, b, h, q_idx, kv_idx: kv_idx * 0.1,
        lambda score, b, h, q_idx, kv_idx: kv_idx - q_idx,
        lambda score, b, h, q_idx, kv_idx: torch.where(q_idx % 2 == 0, 1.0, -math.inf),
        lambda score, b, h, q_idx, kv_idx: score * 0 + 1,
        lambda score, b, h, q_idx, kv_idx: (score * 4).round().half(),
        lambda score, b, h, q_idx, kv_idx: (score * 4).round().bfloat16(),
    ],
)
def test_a_score_mod_may_give_any_number(score_mod):
    attend, qkv = compile_mask(STREAMING, 200, 200), inputs(200, 200)
    expected = attend(*qkv, score_mod=score_mod, executor="reference")
    torch.testing.assert_close(attend(*qkv, score_mod=score_mod, executor="flex"), expected)
    qkv = [x.requires_grad_() for x in qkv]
    out = attend(*qkv, score_mod=score_mod, executor="reference")
    options = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(out.square().sum(), qkv, **options)
    out = attend(*qkv, score_mod=score_mod, executor="blockwise")
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), qkv), expected)


def test_what_a_score_mod_reads_may_alone_require_a_gradient():
    bias = torch.zeros(4, requires_grad=True)
    biased = lambda score, b, h, q_idx, kv_idx: score + bias[h] * kv_idx  # noqa: E731
    attend, (q, k, v) = compile_mask(STREAMING, 64, 64), inputs(64, 64)
    ours = torch.autograd.grad(attend(q, k, v, score_mod=biased).square().sum(), bias)
    theirs = attend(q, k, v, score_mod=biased, executor="reference")
    torch.testing.assert_close(ours, torch.autograd.grad(theirs.square().sum(), bias))


def gradient_after(change, executor, **options):
    """dq, where `change` was called between forward and backward."""
    torch.manual_seed(0)
    attend, (q, k, v) = compile_mask(STREAMING, 64, 64), inputs(64, 64)
    out = attend(q.requires_grad_(), k, v, executor=executor, **options)
    change()
    return torch.autograd.grad(out.square().sum(), q)[0]


@pytest.mark.parametrize("executor", ["blockwise", "reference"])
def test_a_score_mod_of_a_loop_has_the_gradients_of_its_forward(executor):
    slope = 0.5

    def change():
        nonlocal slope
        slope = 3.0

    biased = lambda score, b, h, q_idx, kv_idx: score + slope * (kv_idx - q_idx)  # noqa: E731
    inner = lambda *args: biased(*args) * 0.9  # noqa: E731 - a function that a function reads
    unchanged = gradient_after(lambda: None, "reference", score_mod=inner)
    torch.testing.assert_close(gradient_after(change, executor, score_mod=inner), unchanged)


def test_a_score_mods_tensor_that_is_written_to_before_the_backward_is_refused():
    bias = torch.ones(8)
    biased = lambda score, b, h, q_idx, kv_idx: score + bias[h] * (kv_idx - q_idx)  # noqa: E731
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_after(lambda: bias.add_(1), "blockwise", score_mod=biased)


@pytest.mark.parametrize("executor", ["blockwise", "reference"])
def test_a_seed_that_counts_on_drops_the_same_weights_in_the_backward(executor):
    first, second = torch.tensor(7), torch.tensor(7)
    still = gradient_after(lambda: None, executor, dropout_p=0.5, dropout_seed=first)
    counted = gradient_after(lambda: second.add_(1), executor, dropout_p=0.5, dropout_seed=second)
    assert counted.equal(still)


def test_a_number_in_a_table_is_that_of_the_forward_in_the_backward():
    size = torch.tensor(9)
    attend, (q, k, v) = (
        compile_mask(causal & (q_idx - kv_idx < lookup(size)), 64, 64),
        inputs(64, 64),
    )
    out = attend(q.requires_grad_(), k, v)
    expected = torch.autograd.grad(out.square().sum(), q, retain_graph=True)
    size += 20
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), q), expected)


def test_activation_checkpointing_gives_the_same_gradients():
    bias, (q, k, v) = torch.randn(8, requires_grad=True), inputs(64, 64)
    table, attend = torch.randn(64), compile_mask(STREAMING, 64, 64)
    biased = lambda score, b, h, q_idx, kv_idx: score + bias[h] * table[kv_idx]  # noqa: E731
    run = lambda q: attend(q, k, v, score_mod=biased)  # noqa: E731
    tensors = (q.requires_grad_(), bias)
    expected = torch.autograd.grad(run(q).square().sum(), tensors)
    again = torch.utils.checkpoint.checkpoint(run, q, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), tensors), expected)


def test_a_second_derivative_is_refused_and_never_0():
    attend, (q, k, v) = compile_mask(STREAMING, 64, 64), inputs(64, 64)
    out = attend(q.requires_grad_(), k, v)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(ExecutorError, match=r"no second derivatives\. executor=\"reference\" does"):
        (out.mean() + gradient.square().sum()).backward()
    with pytest.raises(ExecutorError, match=r"jacrev.*executor=\"reference\" does"):
        torch.func.jacrev(lambda q: attend(q, k, v).sum((1, 2, 3)))(q.detach())


@pytest.mark.parametrize(
    "of_one_pair",
    [
        lambda table, score, h, q_idx, kv_idx: score + (table[q_idx] * table[kv_idx]).sum(),
        lambda table, score, h, q_idx, kv_idx: score + table[q_idx][h],
        lambda table, score, h, q_idx, kv_idx: torch.where(h == 0, score, table[q_idx].norm()),
    ],
)
@pytest.mark.parametrize("executor", [None, "blockwise", "reference"])
def test_a_score_mod_is_of_one_pair(of_one_pair, executor):
    table, (q, k, v) = torch.randn(9, 8), inputs(9, 9)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    for place in itertools.product(*map(range, scores.shape)):
        indices = map(torch.tensor, place[1:])
        scores[place] = of_one_pair(table, scores[place].clone(), *indices)
    kept = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = scores.masked_fill(~kept, -math.inf).softmax(-1) @ v
    score_mod = lambda score, b, *indices: of_one_pair(table, score, *indices)  # noqa: E731
    out = compile_mask(causal, 9, 9)(q, k, v, score_mod=score_mod, executor=executor)
    torch.testing.assert_close(out, expected)


def test_flex_on_cpu_is_not_given_a_score_mod_of_rows():
    table, attend, qkv = torch.randn(9, 4), compile_mask(causal, 9, 9), inputs(9, 9)
    of_row = lambda score, b, h, q_idx, kv_idx: score + table[q_idx][h]  # noqa: E731
    with pytest.raises(ExecutorError, match=r"a tensor of \(4,\).*table\[q_idx, h\] and not"):
        attend(*qkv, score_mod=of_row, executor="flex")
    # a row of the head is one row for all pairs, which it computes as it should
    of_head = lambda score, b, h, q_idx, kv_idx: score + table.T[h][q_idx]  # noqa: E731
    out = attend(*qkv, score_mod=of_head, executor="flex")
    torch.testing.assert_close(out, attend(*qkv, score_mod=of_row, executor="reference"))


def test_no_part_of_blockwise_is_compiled():
    """Inductor's C++ cannot compile the hash of dropout with a seed that is another each time."""
    attend, (q, k, v) = compile_mask(STREAMING, 64, 64), inputs(64, 64)
    project, graphs = torch.nn.Linear(q.shape[-1], q.shape[-1]), []

    @torch.compile(backend=lambda graph, _: graphs.append(graph.code) or graph)
    def model(seed):
        return attend(project(q), k, v, dropout_p=0.3, dropout_seed=seed)

    for seed in (1, 2, 3):
        expected = attend(project(q), k, v, dropout_p=0.3, dropout_seed=seed)
        torch.testing.assert_close(model(seed), expected)
    assert any("linear" in code for code in graphs)
    assert not any("^" in code or "index_select" in code for code in graphs)


def test_a_row_asked_for_while_others_are_made_is_its_own():
    class Interrupted(CompiledMask):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_rows" and value.q_offset == 0:
                self.row(1000)  # as another thread might

    attend = compile_mask(causal & window(100), 1024, 1024)
    attend.__class__ = Interrupted
    assert attend.row(10).q_offset == 10


def test_the_reference_weighs_alike_scores_that_are_large():
    low = torch.finfo(torch.float32).min
    q, k, v = inputs(64, 64)
    out = compile_mask(causal, 64, 64)(
        q, k, v, score_mod=lambda score, *_: torch.full_like(score, low), executor="reference"
    )
    torch.testing.assert_close(out, v.cumsum(2) / torch.arange(1, 65)[:, None])


@pytest.mark.parametrize("executor", ["flex", "blockwise", "reference", None])
def test_under_autocast_all_executors_give_its_dtype(executor):
    mask = STREAMING if executor else causal  # sdpa
    attend, qkv = compile_mask(mask, 64, 64), inputs(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*qkv, executor=executor)
    assert out.dtype == torch.bfloat16
    assert_as_good_as_dense(out, mask, *(x.bfloat16() for x in qkv))


def test_autocast_brings_q_and_k_in_float32_to_the_dtype_of_v():
    # a norm of queries and keys is float32 under autocast, a projection is not
    attend, (q, k, v) = compile_mask(STREAMING, 64, 64), inputs(64, 64)
    half = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k, half[2]).equal(attend(*half))
        assert attend(half[0], k, v).equal(attend(*half))
        with pytest.raises(MaskError, match=r"v is torch.float64 and q is torch.float32"):
            attend(q, k, v.double())
        with pytest.raises(MaskError, match=r"k is torch.int32 and q is torch.float32"):
            attend(q, k.int(), v)
    with pytest.raises(MaskError, match=r"v is torch.bfloat16 and q is torch.float32"):
        attend(q, k, half[2])


@pytest.mark.parametrize("executor", [None, "flex", "blockwise"])
def test_what_torch_func_would_lose_is_refused(executor):
    q, k, v = inputs(64, 64)
    run = lambda q: compile_mask(STREAMING, 64, 64)(q, k, v, executor=executor)  # noqa: E731
    with pytest.raises(ExecutorError, match=r"carries a tangent.*reference"):
        torch.func.jvp(run, (q,), (q,))
    with pytest.raises(ExecutorError, match=r"torch.func.vmap.*reference"):
        torch.vmap(run)(q[None])
    with forward_ad.dual_level(), pytest.raises(ExecutorError, match="carries a tangent"):
        run(forward_ad.make_dual(q, q))


def test_an_executor_that_cannot_run_says_why():
    attend = compile_mask(causal, 64, 64)
    q, k, v = inputs(64, 64)
    with pytest.raises(ExecutorError, match=r"no LSE on CPU.*would choose"):
        attend(q, k, v, return_lse=True, executor="flex")
    with pytest.raises(ExecutorError, match="no backward on CPU"):
        attend(q.requires_grad_(), k, v, executor="flex")
    for name in ("cudnn", ["flex"]):
        with pytest.raises(ExecutorError, match=r"There is no executor .*there are sdpa, flash"):
            attend(q, k, v, executor=name)


def test_a_table_changed_after_compiling_is_refused():
    ids = torch.zeros(64, dtype=torch.int64)
    attend = compile_mask(lookup(ids, q_idx).equals(lookup(ids, kv_idx)), 64, 64)
    ids[3] = 1
    with pytest.raises(MaskError, match="written to after it was compiled"):
        attend(*inputs(64, 64))
    mask = attend.masks[0]
    for use in (
        lambda: attend.block_mask,
        lambda: attend.mask_mod,
        lambda: attend.at(64, 64),
        lambda: attend.row(5),
        lambda: pickle.dumps(attend),
        lambda: pickle.dumps(mask),
        lambda: mask.to("cpu"),
    ):
        with pytest.raises(MaskError, match="written to after the mask was made"):
            use()


def test_what_is_written_in_inference_mode_does_not_reach_a_mask():
    with torch.inference_mode():
        ids = torch.zeros(64, dtype=torch.int64)
        mask = lookup(ids, q_idx).equals(lookup(ids, kv_idx))
        traced = fs.from_mask_mod(lambda b, h, q, k: ids[q] == ids.view(8, 8)[k // 8, k % 8])
        ids[32:] = 1
    for unchanged in (mask, traced):
        q, k, v = inputs(64, 64)
        out = compile_mask(unchanged, 64, 64)(q, k, v, executor="reference")
        torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))


def test_the_report_says_what_was_decided():
    text = str(compile_mask(per_head([causal] * 2 + [STREAMING] * 6), 4096, 4096))
    assert "8 heads, 4,096 queries x 4,096 keys, blocks of 128 x 128" in text
    assert "causal & (sink(4) | window(100))" in text
    assert " 1,056 " in text  # 2 heads of 32 * 33 / 2 blocks
    assert "every block proved" in text


def test_masks_can_be_pickled():
    mask = causal & (lookup(torch.arange(9), q_idx) < 3)
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_the_reference_is_differentiable_in_float64():
    q, k, v = (x.double().requires_grad_() for x in inputs(5, 7, n_kv_heads=2, dim=3, v_dim=2))
    attend = compile_mask(causal & window(4), 5, 7)
    mod = attend.block_mask.mask_mod
    assert torch.autograd.gradcheck(lambda *x: reference.run(*x, mod)[0], (q, k, v))


def test_a_block_size_may_be_an_integer_of_numpy():
    import numpy as np

    size = np.int64(64)
    compiled = compile_mask(causal, 200, 200, block_size=size)
    assert compiled.block_size == (64, 64)
    assert type(compiled.block_mask.BLOCK_SIZE[0]) is int
    assert fs.create_block_mask(causal, None, None, 9, 9, "cpu", (size, 32)).BLOCK_SIZE == (64, 32)


def test_public_names_are_documented():
    assert all(getattr(fs, name).__doc__ for name in fs.__all__)
