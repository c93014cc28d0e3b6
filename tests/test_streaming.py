"""The streaming kernels against a float64 definition: outputs, lse and gradients.

They run on a GPU where there is one, else under Triton's interpreter. That must be chosen before
triton is imported, so a child process then runs this same file and test_streaming_schedule.py.
Memory is full of NaN beforehand (conftest.py), so that nothing left unwritten can pass.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from streaming_oracle import (
    DEVICE,
    INTERPRETED,
    RUNS_HERE,
    assert_close,
    finite,
    here,
    in_float64,
    inputs,
    kept,
    numbers,
    reference,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode

import flexsparse as fs
from flexsparse import masks
from flexsparse.errors import ExecutorError
from flexsparse.executors import streaming
from flexsparse.executors.streaming import streaming_attention

pytest.importorskip("triton", reason="the streaming kernels are written in Triton")

if RUNS_HERE:
    from flexsparse.executors import streaming_decode, streaming_ops, streaming_tiles

# the interpreter multiplies the bit patterns of bfloat16 (triton issue 11584)
LOW_PRECISION = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def two_halves(monkeypatch):
    """The walk that 16-bit tensors take; on a GPU compiling it for float32 takes too long."""
    if INTERPRETED:
        walk_keys = streaming_tiles.FLOAT32_TILES.fwd._replace(halves=2)
        tiles = streaming_tiles.FLOAT32_TILES._replace(fwd=walk_keys, dq=walk_keys)
        monkeypatch.setattr(streaming_tiles, "FLOAT32_TILES", tiles)


@pytest.mark.skipif(RUNS_HERE, reason="this process runs the kernels itself")
def test_these_files_pass_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [__file__, __file__.replace(".py", "_schedule.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


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


CUTS = [*itertools.product((16, 32, 64), (1, 2), (1, 4))] if INTERPRETED else [(32, 2, 4)]


@here
@pytest.mark.parametrize(("rows", "halves", "n_kv_heads"), CUTS)
def test_any_cut_of_the_rows_is_right(monkeypatch, rows, halves, n_kv_heads):
    tile = streaming_tiles.Tile(rows, 16, 4, 1, halves)
    tiles = streaming_tiles.FLOAT32_TILES._replace(fwd=tile, dq=tile)
    monkeypatch.setattr(streaming_tiles, "FLOAT32_TILES", tiles)
    sink, window = numbers([4, 40, 17, 0]), numbers([700, 10, 32, 33])
    tensors = inputs(150, 170, 4, n_kv_heads, 32, 32)
    mine = run(streaming_attention, tensors, sink, window, softcap=4.0, return_lse=True)
    assert_close(mine, run(reference, in_float64(tensors), sink, window, softcap=4.0))


@here
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_the_scale_need_not_be_positive(scale):
    tensors, sink, window = inputs(70, 70, 2, 1, 32, 32), numbers([4, 40]), numbers([16, 9])
    mine = run(streaming_attention, tensors, sink, window, scale=scale, return_lse=True)
    assert_close(mine, run(reference, in_float64(tensors), sink, window, scale=scale))


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
    tensors = inputs(sum(q_lens), sum(kv_lens), 2, 1, 32, 32, batch=2)
    sink, window = numbers([4, 40]), numbers([16, 50])

    def alone(q, k, v, sink, window):
        cut = (x.split(n, 2) for x, n in ((q, q_lens), (k, kv_lens), (v, kv_lens)))
        parts = [reference(*part, sink, window) for part in zip(*cut, strict=True)]
        return tuple(torch.cat(column, 2) for column in zip(*parts, strict=True))

    mine = run(
        streaming_attention, tensors, sink, window, return_lse=True,
        cu_seqlens_q=cu[0], cu_seqlens_k=cu[1],
    )  # fmt: skip
    assert_close(mine, run(alone, in_float64(tensors), sink, window))


PACKED = [  # lengths of q and of k, and options of varlen
    ((40, 1, 0, 23), None, {}),
    ((33, 20), (50, 24), {}),
    ((40, 7), (9, 30), {}),  # the first rows of a sequence are empty
    ((17, 20), (40, 30), {"q_offset": [3, 20]}),
    ((33, 20, 5), (50, 24, 0), {"own_blocks": True, "block_size": 16}),
]


def packed(tensors, q_ends, kv_ends, heads, **options):
    """out, lse and gradients of fs.varlen, of q, k and v with a batch row."""

    def attend(q, k, v):
        tokens = (x[0].transpose(0, 1) for x in (q, k, v))
        out, lse = fs.varlen(
            *tokens, q_ends, kv_ends, fs.per_head(heads), return_lse=True, **options
        )
        return out.transpose(0, 1), lse

    return run(attend, tensors)


@here
@pytest.mark.parametrize(("q_lens", "kv_lens", "options"), PACKED)
def test_varlen_runs_the_heads_of_packed_sequences_here(q_lens, kv_lens, options):
    ends = [torch.tensor([0, *n]).cumsum(0) for n in (q_lens, kv_lens or q_lens)]
    heads = [masks.token_streaming(*n) for n in ((4, 9), (0, 17))]
    heads += [masks.causal & masks.sink(3), masks.causal]
    tensors = inputs(int(ends[0][-1]), int(ends[1][-1]), 4, 2, 32, 32)
    mine = packed(tensors, *ends, heads, executor="streaming", **options)
    assert_close(mine, packed(in_float64(tensors), *ends, heads, executor="reference", **options))


@here
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_of_documents_in_a_mask_run_here(monkeypatch, batch):
    monkeypatch.setattr(streaming_tiles, "MIN_CHUNK", 32)
    ends, n = torch.tensor([0, 40, 41, 110]), 110
    heads = [masks.packed(ends, inner=masks.token_streaming(*x)) for x in ((4, 9), (40, 17))]
    heads.append(masks.packed(ends, inner=masks.causal & masks.sink(3)))
    heads.append(masks.same_document(torch.bucketize(torch.arange(n), ends)) & masks.causal)
    mine, true = (fs.compile_mask(fs.per_head(heads), n, n, device=x) for x in (DEVICE, "cpu"))
    tensors = inputs(n, n, 4, 2, 32, 32, batch=batch)
    mine = run(mine, tensors, return_lse=True, executor="streaming")
    assert_close(mine, run(true, in_float64(tensors), return_lse=True, executor="reference"))


@here
def test_packed_heads_of_other_forms_run_elsewhere_beside_them():
    ends = torch.tensor([0, 40, 63])
    heads = [masks.token_streaming(4, 9), fs.everything] * 2
    tensors = inputs(63, 63, 4, 2, 32, 32)
    with mock.patch.object(streaming, "run", wraps=streaming.run) as kernels:
        mine = packed(tensors, ends, ends, heads)
    assert sum(x.args[0].shape[1] for x in kernels.mock_calls) == 2
    assert_close(mine, packed(in_float64(tensors), ends, ends, heads, executor="reference"))


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
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_rounding_is_at_most_twice_that_of_dense_attention(dtype):
    tensors = inputs(200, 200, 2, 1, 64, 64, dtype)
    sink, window = numbers([4, 20]), numbers([64, 9])

    def dense(q, k, v, sink, window):
        mask = kept(200, 200, sink, window).to(q.device)[None]
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))  # enable_gqa would compute in float32
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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
    torch.library.opcheck(streaming_ops.streaming_backward, (out, None, *backward[2:]))
    decode = (q[:, :, :1], k, v, sink, window, None, None, None, 0.2, 0.0)
    torch.library.opcheck(streaming_decode.streaming_decode, decode)


class Seen(TorchDispatchMode):
    """The operators of flexsparse that torch calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flexsparse":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@here
def test_a_mode_sees_the_operators_and_changes_no_bit():
    args = (inputs(70, 70, 2, 1, 32, 32), numbers([4, 40]), numbers([16, 9]))
    alone = run(streaming_attention, *args, return_lse=True)
    with Seen() as seen:
        watched = run(streaming_attention, *args, return_lse=True)
        streaming_attention(*(x.detach()[:, :, :1] for x in args[0]), *args[1:])
    assert seen.names == [f"flexsparse::streaming_{x}" for x in ("forward", "backward", "decode")]
    assert all(x.equal(y) for x, y in zip(alone, watched, strict=True))


@here
@pytest.mark.parametrize("used", [(0,), (1,)])
def test_a_result_without_a_gradient_counts_as_one_of_zeros(used):
    tensors, sink, window = inputs(70, 70, 2, 1, 32, 32), numbers([4, 40]), numbers([16, 9])
    results = streaming_attention(*tensors, sink, window, return_lse=True)
    grads = torch.autograd.grad(sum(results[i].sum() for i in used), tensors, retain_graph=True)
    zeros = sum(x.sum() * (i in used) for i, x in enumerate(results))
    true = torch.autograd.grad(zeros, tensors)
    assert all(x.equal(y) for x, y in zip(grads, true, strict=True))


@here
def test_gradients_come_in_batches_and_have_no_gradients():
    tensors, sink, window = inputs(70, 70, 2, 1, 32, 32), numbers([4, 40]), numbers([16, 9])
    out = streaming_attention(*tensors, sink, window)
    dout = torch.randn(2, *out.shape, device=DEVICE)
    (both,) = torch.autograd.grad(out, tensors[0], dout, is_grads_batched=True, retain_graph=True)
    for one, its_dout in zip(both, dout, strict=True):
        assert one.equal(torch.autograd.grad(out, tensors[0], its_dout, retain_graph=True)[0])
    (dq,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


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
    heads = [masks.token_streaming(4, 20), masks.causal & masks.window(9)] * 2
    attend, on_cpu = (
        fs.compile_mask(fs.per_head(heads), 70, 70, device=x) for x in (DEVICE, "cpu")
    )
    q, k, v = tensors = inputs(70, 70, 4, 2, 32, 32)
    mine = run(attend, tensors, return_lse=True, executor="streaming")
    assert_close(mine, run(on_cpu, in_float64(tensors), return_lse=True, executor="reference"))
    with pytest.raises(ExecutorError, match="take neither score_mod nor dropout"):
        attend(q, k, v, dropout_p=0.1, executor="streaming")


@here
def test_the_lines_of_the_documentation_run():
    page = (Path(__file__).parent.parent / "docs" / "streaming.md").read_text()
    lines = "".join(re.findall("```python\n(.*?)```", page, re.DOTALL))
    if INTERPRETED:
        lines = lines.replace('"cuda"', '"cpu"').replace("bfloat16", "float16")
        for large, small in (("4096", "64"), ("700", "40"), ("1000", "50"), ("512", "8")):
            lines = lines.replace(large, small)
    names = {}
    exec(lines, names)
    assert names["out"].shape == (2, 8, 1, 128)
    assert names["out"].isfinite().all()
