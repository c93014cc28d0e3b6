"""What the streaming kernels refuse, and how: none of these tests runs a kernel."""

import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import flexsparse as fs
from flexsparse.errors import ExecutorError
from flexsparse.executors import streaming
from flexsparse.executors.streaming import streaming_attention
from flexsparse.masks import causal, sink, strided, window

pytest.importorskip("triton", reason="the streaming kernels are written in Triton")


@pytest.fixture(autouse=True)
def fake_cuda():
    """Tensors without memory, so that a CPU has CUDA tensors too."""
    with FakeTensorMode():
        yield


def empty(*shape):
    return torch.empty(shape, device="cuda")


def numbers(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


BAD = [
    (lambda a: {"q": a["q"].double()}, "q is torch.float64; the kernel takes float16"),
    (lambda a: {"k": a["k"].half()}, "k is torch.float16 but q is torch.float32"),
    (lambda a: {"q": empty(1, 2, 8, 20)}, "q has head_dim 20; the kernel takes one of"),
    (lambda a: {"q": empty(2, 8, 32)}, "q has 3 dimensions; it must be"),
    (lambda a: {"k": a["k"].repeat(1, 1, 1, 2)}, "q has head_dim 32 but k has 64"),
    (lambda a: {"v": empty(1, 1, 5, 32)}, r"k is \[1, 1, 8\] but v is \[1, 1, 5\]"),
    (lambda a: {x: a[x].repeat(2, 1, 1, 1) for x in "kv"}, "q has batch 1 but k has 2"),
    (
        lambda a: {
            "page_table": numbers([[0]]),
            "kv_lens": numbers([8]),
            "q": a["q"].requires_grad_(),
        },
        "paged keys have no gradient",
    ),
    (
        lambda a: {"page_table": numbers([[0], [0]]), "kv_lens": numbers([8])},
        r"page_table is \[2, 1\]; the kernel takes \[1, pages per row\]",
    ),
    (
        lambda a: dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), numbers([0])),
        "the number of sequences",
    ),
    (lambda a: {"q_offset": numbers([0, 0])}, r"q_offset is \[2\]; it must be one number"),
    (lambda a: {"q": empty(65536, 2, 8, 32)}, "q has batch 65536; the kernel takes at most 65535"),
    (lambda a: {"v": empty(1, 1, 32, 8).mT}, "v's last dim.* stride 8; .* v.contiguous"),
    (lambda a: {x: a[x].repeat(1, 3, 1, 1) for x in "kv"}, "q has 2 heads and k 3; q's must"),
    (lambda a: {"sink": a["sink"].long()}, r"sink is torch.int64 \[2\]; .* int32 tensor \[2\]"),
    (lambda a: {"window": numbers([3])}, r"window is torch.int32 \[1\]; .* per query head"),
    (lambda a: {"cu_seqlens_q": a["sink"]}, "only one of cu_seqlens_q and cu_seqlens_k"),
    (lambda a: {"page_table": a["sink"]}, "page_table and kv_lens .* go together"),
    (lambda a: {"sink": a["sink"].cpu()}, "sink is on cpu but q is on cuda:0; move one"),
    (lambda a: {"k": a["k"].cpu()}, "k is on cpu but q is on cuda:0; move one of them"),
    (lambda a: {"softcap": -1.0}, "softcap is -1.0; it must be positive"),
]


@pytest.fixture
def good():
    q, k, v = (empty(1, n, 8, 32) for n in (2, 1, 1))
    return {"q": q, "k": k, "v": v, "sink": numbers([1, 2]), "window": numbers([3, 4])}


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_bad_input_is_refused_with_its_reason(good, change, reason):
    with pytest.raises(ExecutorError, match=reason):
        streaming_attention(**good | change(good))


def test_good_input_has_no_reason(good):
    assert streaming.unsupported(**good) is None
    out, lse = streaming_attention(**good, return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((1, 2, 8, 32), (1, 2, 8), torch.float32)


def test_an_old_device_is_refused(good, monkeypatch):
    turing = types.SimpleNamespace(major=7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: turing)
    monkeypatch.setattr(streaming, "_is_old", streaming._is_old.__wrapped__)
    assert streaming.unsupported(**good) == (
        "cuda:0 is older than compute capability 8.0, which the kernels need"
    )


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (causal & (sink(4) | window(20)), "q is on cpu; the kernels run on CUDA"),
        (causal & strided(2), r"the mask is not causal & \(sink\(s\) \| window\(w\)\)"),
    ],
)
def test_a_plan_goes_elsewhere_unless_these_kernels_are_asked_for(fake_cuda, mask, reason):
    with unset_fake_temporarily():
        attend, q = fs.compile_mask(mask, 64, 64, device="cpu"), torch.zeros(1, 2, 64, 32)
        with pytest.raises(ExecutorError, match=f"'streaming' cannot run this call: {reason}"):
            attend(q, q, q, executor="streaming")
        reasons = dict(attend.launches[0].executors(q, q, q))
        assert next(name for name, reason in reasons.items() if reason is None) == "flex"


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
