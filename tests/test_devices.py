"""Plans for CUDA, on a device that is pretended, and analysis under any default device."""

import types

import matplotlib
import pytest
import torch
from pretend_cuda import pretend_cuda

import flexsparse as fs
from flexsparse import kv_idx
from flexsparse.compat.block_sparse_attn import block_sparse_attn_func, token_streaming_attn_func
from flexsparse.compat.flashmask import flashmask_attention
from flexsparse.compat.magi_attention import flex_flash_attn_func
from flexsparse.executors import flash, flex, streaming
from flexsparse.masks import (
    block_sparse,
    causal,
    full,
    packed,
    same_document,
    shared_prefix,
    sink,
    strided,
    token_tree,
    window,
)
from flexsparse.packed.varlen import plan_varlen

matplotlib.use("Agg")
N = 300
IDS = torch.arange(N) // 70
BLOCKS = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.5


def of_a_table(ids):
    return fs.from_mask_mod(lambda b, h, q, kv: (ids[q] == ids[kv]) & (q >= kv), device=ids.device)


def without_a_rule(ids):
    return fs.from_mask_mod(
        lambda b, h, q, kv: torch.sin(ids[q].float()) >= kv * 0.01 - 1, device=ids.device
    )


def of_four_kinds(ids):
    streaming = causal & (sink(4) | window(70))
    return fs.per_head([causal, causal & window(9), streaming, causal & same_document(ids)])


# made of a table on the device that the mask is for
MASKS = {
    "causal": lambda ids: causal,
    "full": lambda ids: full,
    "streaming": lambda ids: causal & (sink(4) | window(70)),
    "documents": lambda ids: causal & same_document(ids),
    "blocks": lambda ids: causal & block_sparse(BLOCKS.to(ids.device), 64),
    "four kinds": of_four_kinds,
    "one structure": lambda ids: fs.per_head([causal & strided(3), causal & strided(5)] * 2),
    "mask_mod": of_a_table,
    "mask_mod without a rule": without_a_rule,
}
LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


@pytest.fixture(params=[False, True], ids=["", "cuda by default"])
def cuda(request):
    """A pretended device; the tensors on the CPU were made before."""
    tensors = [torch.randn(1, heads, N, 32) for heads in (4, 2, 2)]
    with pretend_cuda(by_default=request.param):
        yield tensors, [x.to("cuda") for x in tensors], IDS.to("cuda")


def on_cpu(make):
    """A mask compiled for the CPU, whatever the default device is."""
    with torch.device("cpu"):
        return fs.compile_mask(make(IDS), N, N, device="cpu")


def close(mine, true):
    assert mine.is_cuda
    torch.testing.assert_close(mine.cpu(), true.cpu())


def test_the_pretended_device_refuses_what_cuda_refuses(cuda):
    _, _, ids = cuda
    assert (ids.device.type, ids[0].device.type, ids.cpu().device.type) == ("cuda", "cuda", "cpu")
    assert (ids + torch.tensor(1, device="cpu"))[IDS].is_cuda
    for mixed in (lambda: ids + IDS, lambda: IDS[ids], lambda: torch.cat([ids, IDS])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()


@pytest.mark.parametrize("name", MASKS)
def test_a_plan_for_cuda_is_that_for_the_cpu(cuda, name):
    host, tensors, ids = cuda
    mine, true = fs.compile_mask(MASKS[name](ids), N, N, device="cuda"), on_cpu(MASKS[name])
    assert "cuda" in str(mine)
    assert mine.cost() == true.cost()
    for attribute in LISTS:
        a, b = (getattr(x.block_mask, attribute) for x in (mine, true))
        assert a.is_cuda
        if "indices" in attribute:
            counts = getattr(true.block_mask, attribute.replace("indices", "num_blocks"))
            n = int(counts.max())
            listed = torch.arange(n, device="cpu") < counts[..., None]
            a, b = a.cpu()[..., :n][listed], b[..., :n][listed]
        assert torch.equal(a.cpu(), b)
    with torch.device("cpu"):
        expected = true(*host, executor="reference")
    for executor in ("reference", "blockwise"):
        close(mine(*tensors, executor=executor), expected)
    q, k, v = tensors
    row = mine.row(N - 1)(q[:, :, -1:], k, v, executor="blockwise")
    close(row, expected[:, :, -1:])


def test_every_launch_has_what_its_executor_reads(cuda):
    _, _, ids = cuda
    attend = fs.compile_mask(of_four_kinds(ids), N, N, device="cuda")
    for launch in attend.launches:
        lists, mask_mod = launch.block_mask(launch.heads), launch.mask_mod(launch.heads)
        assert lists.kv_indices.is_cuda
        assert mask_mod(
            *(torch.zeros((), dtype=torch.int64, device="cuda") for _ in "bhqk")
        ).is_cuda
    streams = next(x for x in attend.launches if 2 in x.heads)
    assert [x.tolist() for x in streams.sinks_and_windows([2])] == [[4], [70]]
    assert all(x.is_cuda and x.is_contiguous() for x in streams.sinks_and_windows([2]))


def test_a_call_with_everything(cuda):
    host, tensors, ids = cuda
    options = {"dropout_p": 0.2, "dropout_seed": 3, "return_lse": True}
    mine = fs.compile_mask(of_four_kinds(ids), N, N, device="cuda")
    true = on_cpu(of_four_kinds)
    with torch.device("cpu"):
        expected = true(*host, executor="reference", **options)
    for executor in ("reference", "blockwise"):
        for a, b in zip(mine(*tensors, executor=executor, **options), expected, strict=True):
            close(a, b)
    q, k, v = tensors
    bias = torch.arange(4).to("cuda")
    chunk = mine.at(20, 200)(
        q[:, :, :20], k[:, :, :200], v[:, :, :200], executor="blockwise",
        score_mod=lambda score, b, h, q, kv: score + bias[h] * (q - kv), dropout_p=0.1,
    )  # fmt: skip
    assert chunk.is_cuda


def test_questions_about_a_mask_with_tables_on_cuda(cuda):
    _, _, ids = cuda
    mask, masks = causal & same_document(ids), of_four_kinds(ids)
    assert fs.check(mask, N, N)
    assert fs.check(without_a_rule(ids), N, N) is not None
    assert fs.diff(mask, causal, N, N)
    assert not mask.explain(q=100, kv=3)
    attend = fs.compile_mask(masks, N, N, device="cuda")
    for figure in (
        fs.draw(masks, N, N), fs.draw(attend.block_mask), fs.compare(mask, causal, N, N),
        fs.zoom(attend, 1, 1), fs.roofline(attend),
    ):  # fmt: skip
        assert figure.axes
    assert "<" in attend._repr_html_()
    assert "<" in mask._repr_html_()


def test_a_table_on_another_device_is_refused_with_both_fixes(cuda):
    _, _, ids = cuda
    text = (
        r"is on cuda:0 and .* for cpu\. Compile mask\.to\('cpu'\), or compile with device='cuda:0'"
    )
    with pytest.raises(fs.MaskError, match=text):
        fs.compile_mask(causal & same_document(ids), N, N, device="cpu")


def test_create_block_mask(cuda):
    _, _, ids = cuda
    mine = fs.create_block_mask(
        lambda b, h, q, kv: (ids[q] == ids[kv]) & (q - kv < 9 * h + b) & (q >= kv), 2, 4, N, N,
        device="cuda",
    )  # fmt: skip
    true = fs.create_block_mask(
        lambda b, h, q, kv: (IDS[q] == IDS[kv]) & (q - kv < 9 * h + b) & (q >= kv), 2, 4, N, N,
        device="cpu",
    )  # fmt: skip
    assert mine.kv_indices.is_cuda
    assert torch.equal(mine.kv_num_blocks.cpu(), true.kv_num_blocks)


def test_packed_sequences(cuda):
    host, tensors, _ = cuda
    ends = torch.tensor([0, 70, 140, N], dtype=torch.int32, device="cpu")
    host, tensors = ([x[0].transpose(0, 1) for x in three] for three in (host, tensors))
    with torch.device("cpu"):
        expected = fs.varlen(*host, ends, mask=causal & window(50), executor="reference")
    for options in ({}, {"own_blocks": True}, {"q_offset": ends[:3].to("cuda") * 0}):
        mine = fs.varlen(
            *tensors, ends.to("cuda"), mask=causal & window(50), executor="blockwise", **options
        )
        close(mine, expected)


def streaming_run(q, k, v, sink, window, positions, *, scale, max_sink):
    """What the streaming kernels compute, sequence by sequence."""
    assert q.is_cuda
    assert all(x.is_cuda for x in (sink, window, *positions[:3]))
    out, lse = torch.full_like(q, torch.nan), torch.full_like(q[..., 0], -torch.inf)
    q_ends, kv_ends, firsts = (x.tolist() for x in positions[:3])
    s, w = sink[:, None, None], window[:, None, None]
    for i, first in enumerate(firsts):
        rows, keys = slice(*q_ends[i : i + 2]), slice(*kv_ends[i : i + 2])
        k_i, v_i = (x[0, :, keys].repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        scores = q[0, :, rows] @ k_i.mT * k.shape[-1] ** -0.5
        kv = torch.arange(scores.shape[2], device="cuda")
        p = torch.arange(scores.shape[1], device="cuda")[:, None] + first
        scores = scores.masked_fill(~((kv <= p) & ((kv < s) | (p - kv < w))), -torch.inf)
        lse[0, :, rows] = scores.logsumexp(-1)
        out[0, :, rows] = scores.softmax(-1).nan_to_num(0) @ v_i
    return out, lse


@pytest.mark.parametrize("kv_ends", [[0, 70, 200, N], [0, 100, 190, N]])
@pytest.mark.parametrize("options", [{}, {"own_blocks": True}, {"q_offset": [5, -3, 40]}], ids=str)
def test_packed_sequences_stream(cuda, monkeypatch, kv_ends, options):
    host, tensors, _ = cuda
    host, tensors = ([x[0].transpose(0, 1) for x in three] for three in (host, tensors))
    ends = [torch.tensor(x, device="cpu") for x in ([0, 70, 200, N], kv_ends)]
    streams = [causal & (sink(4) | window(40)), causal & sink(3), causal & (sink(9) | window(5))]
    mask = fs.per_head([*streams[:2], causal & strided(3), streams[2]])
    plan = plan_varlen(mask, *ends, n_heads=4, device="cuda", **options)
    executors = {x.heads: x.usual_executor for x in plan.compiled.launches}
    assert executors == {(0, 1, 3): "streaming", (2,): "flex"}
    assert "streaming" in str(plan)
    monkeypatch.setattr(streaming, "run", streaming_run)
    monkeypatch.setattr(flex, "unsupported", lambda *_, **__: "the device is pretended")
    mine = fs.varlen(*tensors, *ends, mask, return_lse=True, **options)
    planned = fs.varlen(*tensors, *ends, mask, return_lse=True, executor="reference", **options)
    with torch.device("cpu"):
        true = fs.varlen(*host, *ends, mask, return_lse=True, executor="reference", **options)
    for a, b, c in zip(mine, planned, true, strict=True):
        close(a, c)
        close(b, c)


def test_packed_windows_stay_with_flash_and_dense_heads_stream_by_themselves(cuda):
    ends = [torch.tensor(x, device="cpu") for x in ([0, 70, 200, N], [0, 100, 190, N])]
    mask = fs.per_head([causal & window(9), causal, causal & (sink(4) | window(40))] * 2)
    for kv_ends, expected in (
        (ends[0], {(0, 3): "flash", (1, 4): "flash", (2, 5): "streaming"}),
        (ends[1], {(0, 2, 3, 5): "streaming", (1, 4): "streaming"}),
    ):
        plan = plan_varlen(mask, ends[0], kv_ends, n_heads=6, device="cuda")
        assert {x.heads: x.usual_executor for x in plan.compiled.launches} == expected


def test_documents_in_a_mask_stream(cuda, monkeypatch):
    host, tensors, ids = cuda

    def attend(ids, device):
        ends = torch.tensor([0, 70, 140, 210, 280, N], device=device)  # where ids change
        masks = [packed(ends, inner=causal & (sink(4) | window(w))) for w in (40, 9)]
        masks += [causal & same_document(ids), packed(ends, inner=causal & (kv_idx < 3))]
        return fs.compile_mask(fs.per_head(masks), N, N, device=device)

    compiled = attend(ids, "cuda")
    executors = {x.heads: x.usual_executor for x in compiled.launches}
    assert executors == {(0, 1, 3): "streaming", (2,): "flash"}
    assert compiled.launches[0].streams == ((4, 40), (4, 9), (3, 0))
    monkeypatch.setattr(streaming, "run", streaming_run)
    monkeypatch.setattr(flash, "unsupported", lambda *_, **__: "the device is pretended")
    mine = compiled(*tensors, return_lse=True)
    with torch.device("cpu"):
        expected = attend(IDS, "cpu")(*host, return_lse=True, executor="reference")
    for x, y in zip(mine, expected, strict=True):
        close(x, y)


def slices_of_documents(q, k, v, ends, sink):
    """MagiAttention's function on causal documents; heads first, as the others."""
    ranges = torch.stack([ends[:-1], ends[1:]], 1)
    types = torch.ones_like(ends[1:])
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    out, meta = flex_flash_attn_func(q, k, v, ranges, ranges, types, sink=sink[None])
    return out.transpose(0, 1), meta.lse.T


def indices_of_documents(q, k, v, ends, sink):
    """FlashMask's function on causal documents."""
    rows = ends[1:].repeat_interleave(ends.diff()).view(1, 1, N, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"causal": True, "return_softmax_lse": True, "learnable_sink": sink}
    out, lse = flashmask_attention(q, k, v, rows, **options)
    return out[0].transpose(0, 1), lse[0]


@pytest.mark.parametrize("call", [slices_of_documents, indices_of_documents])
def test_documents_in_the_languages_of_other_kernels_stream(cuda, monkeypatch, call):
    host, tensors, _ = cuda
    with torch.device("cpu"):
        ends = torch.tensor([0, 70, 140, 210, 280, N], dtype=torch.int32)
        sink = torch.randn(4)
        expected = call(host[0].requires_grad_(), *host[1:], ends, sink)
    ran = []
    monkeypatch.setattr(streaming, "run", lambda *x, **y: ran.append(x) or streaming_run(*x, **y))
    mine = call(*tensors, ends.to("cuda"), sink.to("cuda"))
    for x, y in zip(mine, expected, strict=True):
        close(x, y.detach())
    ((_, _, _, sinks, windows, positions),) = ran
    assert positions[0].tolist() == ends.tolist()
    assert (sinks.tolist(), windows.unique().tolist()) == ([0] * 4, [70])


def test_block_sparse_attentions_token_streaming_streams(cuda, monkeypatch):
    host, tensors, _ = cuda
    host, tensors = ([x[0].transpose(0, 1) for x in three] for three in (host, tensors))
    with torch.device("cpu"):
        ends = torch.tensor([0, 70, 200, N], dtype=torch.int32)
        data = [ends, ends, torch.tensor([-1, 0, -1, 0]), torch.tensor([4, 40, 0, 0, 9, 5, 0, 0])]
        q, k, v = host
        # which leaves it to blockwise, so that nothing is compiled
        expected = token_streaming_attn_func(q.requires_grad_(), k, v, *data, 130, 130).detach()
    ran = []
    monkeypatch.setattr(streaming, "run", lambda *x, **y: ran.append(x) or streaming_run(*x, **y))
    moved = [x.to("cuda") for x in data]
    close(token_streaming_attn_func(*tensors, *moved, 130, 130), expected)
    assert sum(q.shape[1] for q, *_ in ran) == 4  # flash takes no float32, so dense heads too


@pytest.fixture
def without_kernels(monkeypatch):
    """What would be compiled for CUDA goes to blockwise."""
    for executor in (flex, flash, streaming):
        monkeypatch.setattr(executor, "unsupported", lambda *_, **__: "the device is pretended")


def test_block_sparse_attention_scripts(cuda, without_kernels):
    host, tensors, _ = cuda
    host, tensors = ([x[0].transpose(0, 1) for x in three] for three in (host, tensors))
    with torch.device("cpu"):
        ends = torch.tensor([0, 70, 140, N], dtype=torch.int32)
        head_types = torch.tensor([0, 1, -1, 1], dtype=torch.int32)
        streaming_info = torch.tensor([0, 0, 0, 0, 1, 2, 0, 0], dtype=torch.int32)
        data = (
            ends,
            ends,
            head_types,
            streaming_info,
            BLOCKS[:3, None, None].expand(3, 2, 2, 5)[..., :2],
        )
        expected = block_sparse_attn_func(*host, *data, 160, 160, 0.0, is_causal=True)
    moved = [x.to("cuda") for x in data]
    close(block_sparse_attn_func(*tensors, *moved, 160, 160, 0.0, is_causal=True), expected)


@pytest.mark.parametrize("q_len", [N, 1])
def test_layers_of_transformers(cuda, without_kernels, q_len):
    pytest.importorskip("transformers")
    from flexsparse.integrations.transformers.attention import (
        HEADS,
        attention_forward,
        model_mask,
    )

    layer = types.SimpleNamespace(is_causal=True, **{HEADS: of_four_kinds(IDS)})

    def attend(tensors, padding):
        q, k, v = tensors
        mask = model_mask(
            1, q_len, N, N - q_len, mask_function=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
            attention_mask=padding, device=q.device,
        )  # fmt: skip
        return attention_forward(layer, q[:, :, -q_len:], k, v, mask)[0]

    host, tensors, ids = cuda
    for padding in (None, (IDS > 0)[None]):
        with torch.device("cpu"):
            setattr(layer, HEADS, of_four_kinds(IDS))
            expected = attend(host, padding)
        setattr(layer, HEADS, of_four_kinds(ids))
        close(attend(tensors, padding if padding is None else padding.to("cuda")), expected)


def test_a_default_device_without_numbers():
    """As models are made under torch.device("meta") before their weights are loaded."""
    q, k, v = (torch.randn(1, 4, N, 32) for _ in range(3))
    expected = on_cpu(of_four_kinds)(q, k, v, executor="reference")
    with torch.device("meta"):
        attend = fs.compile_mask(of_four_kinds(IDS), N, N, device="cpu")
        assert attend.block_mask.kv_indices.device.type == "cpu"
        assert fs.check(causal & window(9), N, N)
        assert fs.check(token_tree([-1, 0]) | shared_prefix([0, 2, N], [0, 0]), 2, 2)
        out = attend(q, k, v, executor="blockwise")
    torch.testing.assert_close(out, expected)


def test_a_plan_for_a_device_without_numbers():
    """It has the shapes, the costs and the plan of any other."""
    masks = fs.per_head([causal, causal & window(9), causal & (sink(4) | window(70))])
    true = on_cpu(lambda ids: masks)
    with torch.device("meta"):
        by_default = fs.compile_mask(masks, N, N)
    for mine in (by_default, fs.compile_mask(masks, N, N, device="meta")):
        assert mine.device.type == "meta"
        assert mine.cost() == true.cost()
        assert mine.row(N - 1).cost() == true.row(N - 1).cost()
        for attribute in LISTS:
            lists = getattr(mine.block_mask, attribute)
            assert lists.is_meta
            assert lists.shape == getattr(true.block_mask, attribute).shape
        q, k, v = (torch.randn(1, 3, N, 32, device="meta") for _ in range(3))
        assert mine(q, k, v, executor="reference").shape == (1, 3, N, 32)
        with pytest.raises(fs.ExecutorError, match=r"q has no data \(device meta\)"):
            mine(q, k, v)
