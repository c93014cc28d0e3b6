"""Every executor on a CUDA device, against dense attention in float32.

    python -m pytest -m gpu tests

An error may be twice that of scaled_dot_product_attention in the same dtype under the same mask.
FLEXSPARSE_DRY_RUN=1 runs the same lines on a CPU, with what runs there in place of an executor that
does not, so that nothing but the device is left to go wrong.
"""

import inspect
import os

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import flexsparse as fs
from flexsparse import kv_idx, q_idx
from flexsparse.dropout import is_kept
from flexsparse.executors import streaming
from flexsparse.masks import causal, full, packed, same_document, sink, strided, window
from flexsparse.packed.varlen import plan_varlen

DRY_RUN = os.environ.get("FLEXSPARSE_DRY_RUN") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not DRY_RUN else "cpu"
DTYPES = [torch.float16] if DRY_RUN else [torch.bfloat16, torch.float16]
HALF = DTYPES[0]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not DRY_RUN, reason="needs a CUDA device"),
]

N = 300
ENDS = torch.tensor([0, 70, 71, 200, N], device=DEVICE)
IDS = torch.bucketize(torch.arange(N, device=DEVICE), ENDS[1:], right=True)
STREAMING = causal & (sink(4) | window(70))
NEAR = (q_idx - kv_idx <= 64) & (kv_idx - q_idx <= 32)
# executor, masks of the heads, (heads, kv heads), (q_len, kv_len)
CASES = [
    ("sdpa", [causal] * 4, (4, 2), (N, N)),
    ("sdpa", [full] * 4, (4, 1), (100, N)),
    ("flash", [causal & window(100)] * 4, (4, 1), (N, N)),
    ("flash", [causal & window(100)] * 4, (4, 4), (100, N)),
    ("flash", [causal] * 4, (4, 2), (100, N)),
    ("flash", [NEAR] * 4, (4, 2), (N, N)),
    ("flash", [packed(ENDS)] * 4, (4, 2), (N, N)),
    ("streaming", [STREAMING, causal & window(9), causal, STREAMING], (4, 2), (N, N)),
    ("streaming", [STREAMING] * 4, (4, 4), (100, N)),
    ("streaming", [causal & (sink(4) | window(600))] * 2, (2, 2), (700, 700)),
    ("streaming", [packed(ENDS, inner=STREAMING), packed(ENDS)] * 2, (4, 2), (N, N)),
    ("flex", [STREAMING] * 4, (4, 1), (N, N)),
    ("flex", [causal & strided(3), causal & strided(5)] * 2, (4, 2), (100, N)),
    ("flex", [same_document(IDS)] * 4, (4, 2), (N, N)),
    ("blockwise", [causal & strided(3), STREAMING] * 2, (4, 2), (N, N)),
]
IN_EACH_DTYPE = [
    (*case, dtype) for case in CASES for dtype in DTYPES if dtype == HALF or case[0] != "flex"
]


def inputs(heads, lengths, dtype=HALF, d=64, batch=1):
    """q, k and v that require gradients; heads and lengths are (of queries, of keys)."""
    shapes = [(batch, heads[i], lengths[i], d) for i in (0, 1, 1)]
    return [torch.randn(s, device=DEVICE, dtype=dtype).requires_grad_() for s in shapes]


def compiled(masks, lengths):
    return fs.compile_mask(fs.per_head(masks), *lengths, device=DEVICE)


def dense(masks, lengths):
    """The masks of the heads, element by element: bool [n_heads, q_len, kv_len]."""
    q, kv = (torch.arange(n, device=DEVICE) for n in lengths)
    q = q[:, None] + lengths[1] - lengths[0]
    planes = [m(q.new_tensor(0), q.new_tensor(h), q, kv) for h, m in enumerate(masks)]
    return torch.stack([x.expand(lengths) for x in planes])


def definition(q, k, v, kept, factor=1.0):
    """out and LSE; `factor` multiplies the weights after the softmax."""
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~kept, -torch.inf)
    return scores.softmax(-1) * factor @ v, scores.logsumexp(-1)


def sdpa(q, k, v, kept):
    # with enable_gqa it would leave its kernels for dense float32
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=kept[None])


def attention(attend, tensors, executor, **options):
    """(out, lse or None) of an executor, or of any where this torch or a CPU does not have it."""
    try:
        result = attend(*tensors, executor=executor, **options)
    except fs.ExecutorError as error:
        if not DRY_RUN and "of this torch has no" not in str(error):
            raise
        result = attend(*tensors, **options)
    return result if options.get("return_lse") else (result, None)


def with_gradients(out, lse, tensors):
    """out, dq, dk and dv of a weighted sum of out, and of the LSE if there is one."""
    torch.manual_seed(1)
    loss = (out.float() * torch.randn(out.shape, device=DEVICE)).sum()
    if lse is not None:
        loss = loss + (lse * torch.randn(lse.shape, device=DEVICE)).sum()
    return out.detach().float(), *torch.autograd.grad(loss, tensors)


def check(out, lse, tensors, kept, factor=1.0):
    """Compare what an executor returned, and its gradients, with the definition in float32."""
    exact = [x.detach().float().requires_grad_() for x in tensors]
    true_out, true_lse = definition(*exact, kept, factor)
    true = with_gradients(true_out, None if lse is None else true_lse, exact)
    mine = with_gradients(out, lse, tensors)
    # SDPA has no LSE, and its dropout follows another generator: its error without them is allowed
    undropped = with_gradients(definition(*exact, kept)[0], None, exact)
    usual = with_gradients(sdpa(*tensors, kept), None, tensors)
    scale = 2.0 if isinstance(factor, float) else 2.0 * factor.max().item()
    for name, *results in zip(("out", "dq", "dk", "dv"), mine, true, usual, undropped, strict=True):
        x, y, theirs, plain = (t.float() for t in results)
        error, allowed = (x - y).abs().max().item(), scale * (theirs - plain).abs().max().item()
        assert error <= allowed, f"{name} is off by {error}, allowed is {allowed}"
    if lse is not None:
        # products of half-precision numbers are exact in float32
        assert (lse - true_lse).abs().max() < 1e-3


@pytest.mark.parametrize(("executor", "masks", "heads", "lengths", "dtype"), IN_EACH_DTYPE)
def test_an_executor_is_as_exact_as_sdpa(executor, masks, heads, lengths, dtype):
    tensors = inputs(heads, lengths, dtype, batch=2)
    out, _ = attention(compiled(masks, lengths), tensors, executor)
    check(out, None, tensors, dense(masks, lengths))


@pytest.mark.parametrize("d", [128, 256])
def test_streaming_is_as_exact_at_larger_head_dims(d):
    masks, lengths = [causal & (sink(70) | window(256)), STREAMING], (700, 700)
    tensors = inputs((2, 2), lengths, d=d)
    out, _ = attention(compiled(masks, lengths), tensors, "streaming")
    check(out, None, tensors, dense(masks, lengths))


@pytest.mark.parametrize("executor", ["streaming", "flex", "blockwise"])
def test_the_lse_and_its_gradient(executor):
    masks, tensors = [STREAMING] * 4, inputs((4, 2), (N, N))
    out, lse = attention(compiled(masks, (N, N)), tensors, executor, return_lse=True)
    assert lse.dtype == torch.float32
    check(out, lse, tensors, dense(masks, (N, N)))


@pytest.mark.parametrize("executor", ["flex", "blockwise"])
def test_dropout_drops_the_same_weights_everywhere(executor):
    masks, tensors, p, seed = [STREAMING] * 4, inputs((4, 2), (N, N)), 0.3, 7
    h, rows, columns = (torch.arange(n, device=DEVICE) for n in (4, N, N))
    kept = is_kept(seed, p, 0, h[:, None, None], rows[:, None], columns)
    out, _ = attention(compiled(masks, (N, N)), tensors, executor, dropout_p=p, dropout_seed=seed)
    check(out, None, tensors, dense(masks, (N, N)), factor=kept / (1 - p))


MIXED = [causal] * 2 + [STREAMING, causal & (sink(9) | window(5))] + [causal & window(33)] * 2
MIXED += [causal & strided(3), causal & strided(7)]


@pytest.mark.parametrize("default", [torch.device("cpu"), torch.device(DEVICE)], ids=str)
def test_heads_of_many_kinds_run_together(default):
    with default:
        attend, tensors = compiled(MIXED, (N, N)), inputs((8, 4), (N, N))
        if not DRY_RUN:
            used = {launch.usual_executor for launch in attend.launches}
            assert used == {"sdpa", "flash", "streaming", "flex"}
        out = attend(*tensors)
    check(out, None, tensors, dense(MIXED, (N, N)))


PACKED_MIXED = [STREAMING, causal & (sink(9) | window(5)), causal & window(33), causal & strided(3)]


@pytest.mark.parametrize(
    ("kv_lens", "return_lse", "executors"),
    [
        ([70, 1, 129, 100], False, {"streaming", "flash", "flex"}),
        ([90, 30, 200, 100], True, {"streaming", "flex"}),
    ],
)
def test_heads_of_packed_sequences_run_together(kv_lens, return_lse, executors):
    q_lens, kv_ends = ENDS.diff().tolist(), torch.tensor([0, *kv_lens]).cumsum(0)
    if not DRY_RUN:
        plan = plan_varlen(fs.per_head(PACKED_MIXED), ENDS, kv_ends.to(DEVICE), n_heads=4)
        assert {launch.usual_executor for launch in plan.compiled.launches} == executors
    tensors = inputs((4, 2), (N, sum(kv_lens)))
    out = fs.varlen(
        *(x[0].transpose(0, 1) for x in tensors),
        ENDS, kv_ends, fs.per_head(PACKED_MIXED), return_lse=return_lse,
    )  # fmt: skip
    out, lse = (out[0], out[1][None]) if return_lse else (out, None)
    alone = zip(*(dense(PACKED_MIXED, x) for x in zip(q_lens, kv_lens, strict=True)), strict=True)
    kept = torch.stack([torch.block_diag(*of_head).bool() for of_head in alone])
    check(out.transpose(0, 1)[None], lse, tensors, kept)


def test_a_model_with_heads_of_many_kinds_is_one_graph():
    # blockwise, which has the gradients of the others on CPU, is no part of a graph
    attend = compiled([causal] * 8 if DRY_RUN else MIXED, (N, N))
    tensors = inputs((8, 4), (N, N))
    project = torch.nn.Linear(64, 64).to(DEVICE, HALF)

    def model(q, k, v):
        return attend(project(q), k, v)

    eager = with_gradients(model(*tensors), None, tensors)
    whole = with_gradients(torch.compile(model, fullgraph=True)(*tensors), None, tensors)
    for x, y in zip(whole, eager, strict=True):
        assert (x.float() - y.float()).abs().max() <= 0.02 * y.abs().max()


@pytest.mark.parametrize("executor", ["streaming", "flex"])
def test_one_query_over_many_keys(executor):
    masks, lengths = [STREAMING, causal & window(9)] * 4, (1, 2000)
    q, k, v = (x.detach() for x in inputs((8, 2), lengths, batch=2))
    with torch.no_grad():
        out, _ = attention(compiled(masks, lengths), (q, k, v), executor)
    true = definition(q.float(), k.float(), v.float(), dense(masks, lengths))[0]
    assert (out.float() - true).abs().max() <= 2**-7 * true.abs().max()


@pytest.mark.parametrize(
    "masks",
    [[STREAMING, causal] * 4, [causal] * 8, [causal & window(100)] * 8, [causal & strided(3)] * 8],
)
def test_rows_of_a_mask_are_its_steps_of_decoding(masks):
    q, k, v = (x.detach() for x in inputs((8, 2), (N, N)))
    true = definition(q.float(), k.float(), v.float(), dense(masks, (N, N)))[0]
    attend = compiled(masks, (N, N))
    with torch.no_grad():
        for position in (0, 63, 64, 150, N - 1):
            here = slice(position, position + 1)
            out = attend.row(position)(q[:, :, here], k, v)
            assert (out.float() - true[:, :, here]).abs().max() <= 2**-7 * true.abs().max()


def streaming_inputs(heads, length):
    tensors = inputs(heads, (length, length), d=128)
    return tensors, *torch.tensor([[64] * heads[0], [256] * heads[0]], device=DEVICE).int()


def test_streaming_repeats_every_bit():
    tensors, sinks, windows = streaming_inputs((8, 2), 200 if DRY_RUN else 8192)
    first, second = (
        with_gradients(*streaming.streaming_attention(*tensors, sinks, windows, return_lse=True),
                       tensors)
        for _ in range(2)
    )  # fmt: skip
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


@pytest.mark.skipif(DRY_RUN, reason="the interpreter compiles nothing")
def test_streaming_compiles_nothing_for_new_numbers():
    from flexsparse.executors import streaming_backward, streaming_forward

    kernels = [
        streaming_forward.streaming_fwd_kernel,
        streaming_backward.streaming_dq_kernel,
        streaming_backward.streaming_dkdv_kernel,
    ]
    tensors, sinks, windows = streaming_inputs((4, 2), 512)
    counts = []
    for size in (4, 65, 300):
        out = streaming.streaming_attention(
            *tensors, sinks * 0 + size, windows * 0 + 2 * size, max_sink=size
        )
        torch.autograd.grad(out.sum(), tensors)
        counts.append([len(cache[0]) for x in kernels for cache in x.device_caches.values()])
    assert counts[0] == counts[1] == counts[2]


def test_streaming_addresses_more_than_2_31_elements():
    """1M tokens x 32 heads x 128; only the last rows have a gradient, so that few keys matter."""
    heads, length, tail = ((4, 2), 500, 64) if DRY_RUN else ((32, 8), 1 << 20, 300)
    if not DRY_RUN and torch.cuda.mem_get_info()[0] < 70 << 30:
        pytest.skip("needs 70 GB")
    (q, k, v), sinks, windows = streaming_inputs(heads, length)
    out = streaming.streaming_attention(q, k, v, sinks, windows, max_sink=64)
    dout = torch.zeros_like(out)
    dout[:, :, -tail:].normal_()
    mine = torch.autograd.grad(out, (q, k, v), dout)
    near = torch.cat((torch.arange(64), torch.arange(length - tail - 256, length))).to(DEVICE)
    few = [q[:, :, -tail:], k[:, :, near], v[:, :, near]]
    few = [x.detach().float().requires_grad_() for x in few]
    rows = torch.arange(length - tail, length, device=DEVICE)[:, None]
    kept = (near <= rows) & ((near < 64) | (rows - near < 256))
    true_out, _ = definition(*few, kept)
    true = torch.autograd.grad(true_out, few, dout[:, :, -tail:].float())
    mine = [out[:, :, -tail:], mine[0][:, :, -tail:], mine[1][:, :, near], mine[2][:, :, near]]
    for x, y in zip(mine, (true_out, *true), strict=True):
        assert (x.float() - y).abs().max() <= 2**-6 * y.abs().max()


@pytest.mark.skipif(DRY_RUN, reason="varlen_attn runs on CUDA alone")
def test_varlen_attn_groups_heads_and_returns_the_lse_by_head():
    """What executors/flash.py would need to return an LSE."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = (x.detach()[0].transpose(0, 1) for x in inputs((4, 2), (N, N)))
    ends = ENDS.int()
    options = inspect.signature(varlen.varlen_attn).parameters
    gqa = {"enable_gqa": True} if "enable_gqa" in options else {}
    out, lse = varlen.varlen_attn(
        q, k, v, ends, ends, 129, 129, window_size=(-1, 0),
        return_aux=varlen.AuxRequest(lse=True), **gqa,
    )  # fmt: skip
    tensors = [x.transpose(0, 1)[None].float() for x in (q, k, v)]
    true_out, true_lse = definition(*tensors, dense([packed(ENDS)] * 4, (N, N)))
    assert (out.transpose(0, 1) - true_out[0]).abs().max() <= 2**-7 * true_out.abs().max()
    assert lse.shape == (4, N)
    assert (lse - true_lse[0]).abs().max() < 1e-3
