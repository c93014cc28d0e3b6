"""What the streaming kernels are compared with: their mask and attention, dense, in float64."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
here = pytest.mark.skipif(
    not RUNS_HERE, reason="run in a child process by test_these_files_pass_under_the_interpreter"
)


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
