"""The streaming kernels against a float64 definition: outputs, lse and gradients.

They run on a GPU where there is one, else under Triton's interpreter. That must be chosen before
triton is imported, so a child process then runs this same file. Memory is full of NaN beforehand
(conftest.py), so that nothing left unwritten can pass.
"""

# ruff: noqa: N803 - capitals are the habit for compile-time constants of a kernel

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flexsparse as fs
from flexsparse import masks
from flexsparse.errors import ExecutorError
from flexsparse.executors import streaming
from flexsparse.executors.streaming import streaming_attention

triton = pytest.importorskip("triton", reason="the streaming kernels are written in Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter multiplies the bit patterns of bfloat16 (triton issue 11584)
HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
here = pytest.mark.skipif(
    not RUNS_HERE, reason="run in a child process by test_this_file_passes_under_the_interpreter"
)

if RUNS_HERE:
    import triton.language as tl

    from flexsparse.executors import (
        streaming_decode,
        streaming_kernels,
        streaming_ops,
        streaming_tiles,
    )

    needs_mask = streaming_kernels.needs_mask
    schedule = streaming_kernels.schedule

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


@pytest.mark.skipif(RUNS_HERE, reason="this process runs the kernels itself")
def test_this_file_passes_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def kept(q_len, kv_len, sink, window, q_offset=None):
    p = torch.arange(q_len)[:, None] + (kv_len - q_len if q_offset is None else q_offset)
    kv = torch.arange(kv_len)[None, :]
    s, w = sink.cpu()[:, None, None], window.cpu()[:, None, None]
    return (kv <= p) & ((kv < s) | (p - kv < w))  # [n_heads, q_len, kv_len]


def reference(q, k, v, sink, window, softcap=None, q_offset=None, scale=None):
    """The definition, dense and in float64 on the CPU."""
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = kept(q.shape[2], k.shape[2], sink, window, q_offset)
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    probs = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return probs @ v, lse


def numbers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(q_len, kv_len, n_heads, n_kv_heads, d, dv, dtype=torch.float32, batch=1):
    torch.manual_seed(0)
    shapes = (
        (batch, n_heads, q_len, d),
        (batch, n_kv_heads, kv_len, d),
        (batch, n_kv_heads, kv_len, dv),
    )
    return [torch.randn(s, dtype=dtype, device=DEVICE).requires_grad_() for s in shapes]


def finite(lse):
    return lse.masked_fill(lse == -torch.inf, 0)


def run(attend, tensors, *args, **kwargs):
    """out, lse and the three gradients of a weighted sum of out and lse."""
    out, lse = attend(*tensors, *args, **kwargs)
    torch.manual_seed(1)
    weights = torch.randn(out.shape).to(out), torch.randn(lse.shape).to(lse)
    loss = (out * weights[0]).sum() + (finite(lse) * weights[1]).sum()
    return out.detach(), finite(lse).detach(), *torch.autograd.grad(loss, tensors)


def in_float64(tensors):
    return [x.detach().cpu().double().requires_grad_() for x in tensors]


def assert_close(mine, true, tolerance=2e-5):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), mine, true, strict=True):
        error = (x.cpu().double() - y).abs().max().item() if y.numel() else 0.0
        assert error < tolerance, f"{name} is off by {error}"  # a NaN fails too


# q_len, kv_len, n_heads, n_kv_heads, head_dim, head_dim of v, sinks, windows, options
CASES = [
    (1, 1, 1, 1, 32, 32, [0], [1], {}),
    (63, 63, 2, 2, 32, 32, [4, 0], [16, 30], {"scale": 0.3}),
    (100, 100, 4, 1, 32, 64, [4, 70, 0, 1], [16, 40, 1, 300], {"softcap": 3.0}),
    (129, 129, 4, 4, 32, 32, [17, 50, 1, 999], [5, 20, 999, 0], {}),
    (300, 300, 4, 1, 32, 32, [4, 4, 20, 0], [16, 16, 70, 1], {}),
    (300, 300, 2, 1, 32, 32, [40, 33], [64, 31], {"softcap": 20.0}),
    (63, 300, 2, 2, 32, 32, [40, 4], [16, 0], {}),  # chunked prefill
    (300, 63, 2, 1, 32, 32, [40, 4], [16, 100], {}),  # the first rows are empty
    (1, 129, 2, 2, 32, 32, [4, 20], [16, 30], {}),
    (100, 63, 2, 2, 32, 32, [4, 20], [16, 30], {"q_offset": -20}),
    (63, 100, 2, 2, 32, 32, [4, 20], [16, 30], {"q_offset": 90}),  # some windows are past the keys
    (96, 100, 1, 1, 32, 32, [40], [33], {}),  # a window tile begins inside the rest of the sink
    (70, 70, 1, 1, 96, 64, [3], [20], {}),
    (40, 40, 2, 2, 192, 128, [3, 0], [20, 9], {}),
    (33, 33, 2, 1, 64, 256, [3, 0], [20, 9], {}),
    (50, 50, 2, 2, 32, 32, [0, 7], [0, 0], {}),  # a head that keeps nothing
]


@here
@pytest.mark.parametrize(
    ("q_len", "kv_len", "n_heads", "n_kv_heads", "d", "dv", "sinks", "windows", "options"), CASES
)
def test_kernels_equal_the_definition(
    q_len, kv_len, n_heads, n_kv_heads, d, dv, sinks, windows, options
):
    tensors = inputs(q_len, kv_len, n_heads, n_kv_heads, d, dv)
    sink, window = numbers(sinks), numbers(windows)
    mine = run(streaming_attention, tensors, sink, window, return_lse=True, **options)
    true = run(reference, in_float64(tensors), sink, window, **options)
    assert_close(mine, true)


@here
def test_one_launch_serves_every_sink_with_every_window_and_counts_no_key_twice():
    sizes = (0, 1, 16, 17, 33, 64, 69, 5000)
    sink, window = numbers(list(itertools.product(sizes, sizes))).unbind(1)
    sink, window = sink.contiguous(), window.contiguous()
    q, k, v = (x.detach() for x in inputs(70, 70, len(sink), 1, 32, 32))
    _, lse = streaming_attention(q, torch.zeros_like(k), v, sink, window, return_lse=True)
    n_kept = kept(70, 70, sink, window).sum(-1)  # scores are 0, so lse is the log of this
    assert (lse[0].cpu().exp() - n_kept).abs().max() < 1e-3


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


@here
def test_an_empty_row_is_zero_and_its_lse_minus_infinity():
    q, k, v = inputs(40, 20, 2, 2, 32, 32)
    out, lse = streaming_attention(q, k, v, numbers([2, 0]), numbers([3, 0]), return_lse=True)
    empty = ~kept(40, 20, numbers([2, 0]), numbers([3, 0])).any(-1)
    assert empty.sum(1).tolist() == [20, 40]
    assert (out[0].cpu()[empty] == 0).all()
    assert (lse[0].cpu()[empty] == -torch.inf).all()


@here
@pytest.mark.parametrize("max_sink", [None, 0, 33])
def test_sink_gradients_do_not_depend_on_how_rows_are_cut(monkeypatch, max_sink):
    monkeypatch.setattr(streaming_tiles, "MIN_CHUNK", 64)
    tensors, sink, window = inputs(200, 200, 2, 1, 32, 32), numbers([40, 100]), numbers([16, 80])
    mine = run(
        streaming_attention, tensors, sink, window, max_sink=max_sink, softcap=4.0, return_lse=True
    )
    assert_close(mine, run(reference, in_float64(tensors), sink, window, softcap=4.0))


@here
def test_gradients_have_the_same_bits_on_every_run(monkeypatch):
    monkeypatch.setattr(streaming_tiles, "MIN_CHUNK", 32)
    args = (inputs(100, 100, 2, 1, 32, 32), numbers([40, 100]), numbers([16, 80]))
    first, second = (run(streaming_attention, *args, return_lse=True) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


@here
def test_strided_inputs_of_a_batch_are_read_in_place():
    tensors, (sink, window) = inputs(70, 70, 4, 2, 32, 32, batch=2), numbers([[4] * 4, [9] * 4])
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert not views[0].is_contiguous()
    views = [x.requires_grad_() for x in views]
    mine = run(streaming_attention, views, sink, window, return_lse=True)
    assert_close(mine, run(reference, in_float64(tensors), sink, window))


@here
@pytest.mark.parametrize(("q_lens", "kv_lens"), [((70, 1, 0, 130), None), ((33, 100), (90, 64))])
def test_packed_sequences_equal_each_alone(monkeypatch, q_lens, kv_lens):
    monkeypatch.setattr(streaming_tiles, "MIN_CHUNK", 64)
    kv_lens = kv_lens or q_lens
    cu = [numbers([0, *torch.tensor(lens).cumsum(0).tolist()]) for lens in (q_lens, kv_lens)]
    tensors, sink, window = (
        inputs(sum(q_lens), sum(kv_lens), 2, 1, 32, 32), numbers([4, 40]), numbers([16, 50]),
    )  # fmt: skip

    def alone(q, k, v, sink, window):
        cut = (x.split(n, 2) for x, n in ((q, q_lens), (k, kv_lens), (v, kv_lens)))
        parts = [reference(*part, sink, window) for part in zip(*cut, strict=True)]
        return tuple(torch.cat(column, 2) for column in zip(*parts, strict=True))

    mine = run(
        streaming_attention, tensors, sink, window, return_lse=True,
        cu_seqlens_q=cu[0], cu_seqlens_k=cu[1],
    )  # fmt: skip
    assert_close(mine, run(alone, in_float64(tensors), sink, window))


@here
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize(
    ("sinks", "windows"), [([4, 100, 0, 0], [16, 70, 400, 0]), ([9] * 4, [64] * 4)]
)
def test_decode_split_over_keys_equals_the_definition(monkeypatch, q_len, sinks, windows):
    monkeypatch.setattr(streaming_decode, "MIN_SPLIT", 64)
    q, k, v = (x.detach() for x in inputs(q_len, 300, 4, 2, 32, 64, batch=2))
    sink, window = numbers(sinks), numbers(windows)
    assert streaming_decode.splits_for(4, 300) > 1
    out, lse = streaming_attention(q, k, v, sink, window, return_lse=True)
    true = reference(*in_float64((q, k, v)), sink, window)
    assert (out.cpu() - true[0]).abs().max() < 2e-5
    assert (finite(lse).cpu() - finite(true[1])).abs().max() < 2e-5
    assert (lse.cpu() == -torch.inf).equal(true[1] == -torch.inf)


@here
@pytest.mark.parametrize(("q_len", "page_size"), [(1, 16), (2, 5), (40, 16)])
def test_paged_keys_equal_the_same_keys_in_a_row(q_len, page_size):
    q, k, v = (x.detach() for x in inputs(q_len, 160, 4, 1, 32, 32, batch=2))
    k[1, :, 101:] = v[1, :, 101:] = torch.nan  # not in use
    sink, window, kv_lens = numbers([4, 20, 0, 3]), numbers([16, 5, 90, 1]), numbers([160, 101])
    n_pages = 2 * 160 // page_size
    order = torch.randperm(n_pages, device=DEVICE)
    pages = []
    for x in (k, v):
        cut = (
            x.view(2, 1, 160 // page_size, page_size, 32)
            .transpose(1, 2)
            .reshape(n_pages, 1, page_size, 32)
        )
        pages.append(torch.empty_like(cut).index_copy_(0, order, cut))
    table = order.view(2, -1).int()
    out = streaming_attention(q, *pages, sink, window, page_table=table, kv_lens=kv_lens)
    for b, n in enumerate(kv_lens.tolist()):
        row = in_float64((q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]))
        assert (out[b].cpu() - reference(*row, sink, window)[0][0]).abs().max() < 2e-5


@here
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_is_at_most_twice_that_of_dense_attention(dtype):
    tensors = inputs(200, 200, 2, 1, 64, 64, dtype)
    sink, window = numbers([4, 20]), numbers([64, 9])

    def dense(q, k, v, sink, window):
        mask = kept(200, 200, sink, window).to(q.device)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        return out, out.new_zeros(out.shape[:3])

    def mine_out(*args):
        out = streaming_attention(*args)
        return out, out.new_zeros(out.shape[:3])

    def true_out(*args):
        out = reference(*args)[0]
        return out, out.new_zeros(out.shape[:3])

    true = run(true_out, in_float64(tensors), sink, window)
    mine = run(mine_out, tensors, sink, window)
    usual = run(dense, tensors, sink, window)
    for x, y, z in zip(mine, usual, true, strict=True):
        error, bound = ((t.cpu().double() - z).abs().max().item() for t in (x, y))
        assert error <= 2 * bound + 1e-12


@here
def test_torch_sees_well_formed_operators():
    q, k, v = inputs(17, 20, 2, 1, 32, 32)
    sink, window = numbers([4, 2]), numbers([16, 3])
    forward = (q, k, v, sink, window, None, None, None, 0.2, 0.0, 16)
    torch.library.opcheck(streaming_ops.streaming_forward, forward)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = streaming_ops.streaming_forward(q, k, v, *forward[3:])
    backward = (out, lse, q, k, v, out, lse, *forward[3:])
    torch.library.opcheck(streaming_ops.streaming_backward, backward)
    decode = (q[:, :, :1], k, v, sink, window, None, None, None, 0.2, 0.0)
    torch.library.opcheck(streaming_decode.streaming_decode, decode)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 32)
        self.register_buffer("sink", numbers([4, 2]))
        self.register_buffer("window", numbers([16, 3]))

    def forward(self, q, k, v):
        q = self.project(q)
        return streaming_attention(q, k, v, self.sink, self.window, return_lse=True)


@here
def test_a_compiled_module_is_one_graph_for_every_sink_and_window():
    tensors, layer = inputs(64, 64, 2, 1, 32, 32), Layer().to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for sinks in ([4, 2], [0, 40]):
        layer.sink.copy_(numbers(sinks))
        with torch._dynamo.config.patch(error_on_recompile=sinks[0] == 0):
            mine = run(compiled, tensors)
        true = run(layer, tensors)
        assert all(x.equal(y) for x, y in zip(mine, true, strict=True))


@here
def test_a_compiled_mask_runs_its_heads_here():
    heads = [masks.causal & (masks.sink(4) | masks.window(20)), masks.causal & masks.window(9)] * 2
    attend = fs.compile_mask(fs.per_head(heads), 70, 70, device=DEVICE)
    q, k, v = tensors = inputs(70, 70, 4, 2, 32, 32)
    mine = run(attend, tensors, return_lse=True, executor="streaming")
    true = run(attend, in_float64(tensors), return_lse=True, executor="reference")
    assert_close(mine, true)
    with pytest.raises(ExecutorError, match="take neither score_mod nor dropout"):
        attend(q, k, v, dropout_p=0.1, executor="streaming")


BAD = [
    (lambda a: a | {"q": a["q"].double()}, "q is torch.float64; the kernel takes float16"),
    (lambda a: a | {"k": a["k"].half()}, "k is torch.float16 but q is torch.float32"),
    (lambda a: a | {"q": a["q"][..., :20]}, "q has head_dim 20; the kernel takes one of"),
    (lambda a: a | {"q": a["q"][0]}, "q has 3 dimensions; it must be"),
    (lambda a: a | {"k": a["k"].repeat(1, 1, 1, 2)}, "q has head_dim 32 but k has 64"),
    (lambda a: a | {"v": a["v"][:, :, :5]}, r"k is \[1, 1, 8\] but v is \[1, 1, 5\]"),
    (lambda a: a | {x: a[x].repeat(2, 1, 1, 1) for x in "kv"}, "q has batch 1 but k has 2"),
    (
        lambda a: a | {"page_table": numbers([[0]]), "kv_lens": numbers([8])},
        "paged keys have no gradient",
    ),
    (
        lambda a: a | {"page_table": numbers([[0], [0]]), "kv_lens": numbers([8])},
        r"page_table is \[2, 1\]; the kernel takes \[1, pages per row\]",
    ),
    (
        lambda a: a | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), numbers([0])),
        "the number of sequences",
    ),
    (lambda a: a | {"q_offset": numbers([0, 0])}, r"q_offset is \[2\]; it must be one number"),
    (lambda a: a | {"v": a["v"].mT.contiguous().mT}, "v's last dim.* stride 8; .* v.contiguous"),
    (lambda a: a | {x: a[x].repeat(1, 3, 1, 1) for x in "kv"}, "q has 2 heads and k 3; q's must"),
    (lambda a: a | {"sink": a["sink"].long()}, r"sink is torch.int64 \[2\]; .* int32 tensor \[2\]"),
    (lambda a: a | {"window": a["window"][:1]}, r"window is torch.int32 \[1\]; .* per query head"),
    (lambda a: a | {"cu_seqlens_q": a["sink"]}, "only one of cu_seqlens_q and cu_seqlens_k"),
    (lambda a: a | {"page_table": a["sink"]}, "page_table and kv_lens .* go together"),
    (lambda a: a | {"sink": a["sink"].to("meta")}, "sink is on meta but q is on"),
    (lambda a: a | {"softcap": -1.0}, "softcap is -1.0; it must be positive"),
]


@here
@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_input_is_refused_with_its_reason(change, reason):
    q, k, v = inputs(8, 8, 2, 1, 32, 32)
    good = {"q": q, "k": k, "v": v, "sink": numbers([1, 2]), "window": numbers([3, 4])}
    with pytest.raises(ExecutorError, match=reason):
        streaming_attention(**change(good))


def test_a_reason_needs_no_kernel_and_no_device():
    with FakeTensorMode():
        q = torch.empty(1, 4, 8, 64, device="cuda", dtype=torch.bfloat16)
        sink = torch.empty(4, device="cuda", dtype=torch.int32)
        assert streaming.unsupported(q, q, q, sink, sink) is None
        reason = streaming.unsupported(q, q, q, sink, sink.cpu())
        assert reason == "window is on cpu but q is on cuda:0; move one of them"
        out, lse = streaming_attention(q, q, q, sink, sink, return_lse=True)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on CPU")
def test_a_plan_says_why_it_does_not_run_here():
    q = torch.zeros(1, 2, 64, 32)
    streams = masks.causal & (masks.sink(4) | masks.window(20))
    for mask, reason in (
        (streams, "'streaming' cannot run this call: q is on cpu; the kernels run on CUDA"),
        (streams & masks.strided(2), r"the mask is not causal & \(sink\(s\) \| window\(w\)\)"),
    ):
        attend = fs.compile_mask(mask, 64, 64, device="cpu")
        with pytest.raises(ExecutorError, match=reason):
            attend(q, q, q, executor="streaming")
        assert attend(q, q, q).shape == q.shape


def test_without_triton_there_is_a_sentence():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
from flexsparse.executors import streaming
import torch
q, sink = torch.zeros(1, 1, 8, 32), torch.zeros(1, dtype=torch.int32)
print(streaming.missing() == streaming.unsupported(q, q, q, sink, sink), streaming.missing())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True triton is not installed: pip install 'flexsparse[triton]'\n"


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
