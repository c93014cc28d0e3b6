"""torch's flex_attention as an executor: what it cannot run, scales, score_mods and dropout."""

from __future__ import annotations

import functools
import os
import shutil
import sys

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.dropout import Dropout
from flexsparse.executors.captured import captured_by
from flexsparse.executors.flex_kernels import attend, call
from flexsparse.tensors import ScoreMod


def _missing_on_cpu() -> str | None:
    if sys.platform == "darwin" or not torch.cpu._is_avx2_supported():
        return "flex_attention on CPU needs an x86 processor with AVX2, under Linux or Windows"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    if shutil.which(compiler) is None:
        return (
            f"flex_attention on CPU needs a C++ compiler, and {compiler} is not to be found: "
            "install it, or name yours in the environment variable CXX"
        )
    return None


def _switched_off() -> str | None:
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(variable) == "1":
            return (
                f"{variable}=1 switches torch.compile off, and without it flex_attention is dense"
            )
    return None


# looked up once: torch.compile takes them as constants
_MISSING_ON_CPU = _missing_on_cpu()
_SWITCHED_OFF = _switched_off()


def missing(device: torch.device) -> str | None:
    """Why flex_attention cannot be compiled on this machine, as a sentence, or None if it can."""
    return _SWITCHED_OFF or (_MISSING_ON_CPU if device.type == "cpu" else None)


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: ScoreMod | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> str | None:
    """Why flex_attention cannot run these inputs, as a sentence, or None if it can."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is on, which turns torch.compile off"
    if _SWITCHED_OFF is not None:
        return _SWITCHED_OFF
    if q.is_cpu:
        if _MISSING_ON_CPU is not None:
            return _MISSING_ON_CPU
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "flex_attention has no backward on CPU, and an input requires a gradient"
        if return_lse:
            return "flex_attention returns no LSE on CPU"
        if dropout is not None:
            return "dropout needs the LSE, and flex_attention returns none on CPU"
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"flex_attention on CPU takes float32, bfloat16 and float16, and q is {q.dtype}"
        # a graph being compiled cannot tell what a score_mod does
        if score_mod is not None and not torch.compiler.is_compiling():
            reason = _not_on_cpu(score_mod, q)
            if reason is not None:
                return reason
    elif q.is_cuda:
        for name, size in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
            if size < 16:
                return f"flex_attention on CUDA needs a head_dim of 16; that of {name} is {size}"
    elif q.is_meta:
        return "q has no data (device meta)"
    if not (q.numel() and k.numel() and v.numel()):
        return "an input is empty"
    return None


def _not_on_cpu(score_mod: ScoreMod, q: Tensor) -> str | None:
    """Why a score_mod cannot run in flex_attention's kernel on CPU, or None if it can."""
    captured = captured_by(score_mod, q)
    if captured.with_gradients and torch.is_grad_enabled():
        return (
            "flex_attention has no backward on CPU, and score_mod reads a tensor that requires a "
            "gradient"
        )
    if captured.rows:
        # its C++ takes an index of such a tensor for one of a tile of scores (torch 2.13)
        return (
            "flex_attention on CPU computes single numbers, and score_mod makes a tensor of "
            f"{tuple(captured.rows[0].shape)} of the positions or the score: read tables in one "
            "step, table[q_idx, h] and not table[q_idx][h]"
        )
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout: Dropout | None = None,
    kernel_options: dict[str, bool] | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention with a BlockMask: out [B, n_heads, q_len, Dv], LSE [B, n_heads, q_len] or None."""
    if dropout is not None:
        return _run_dropped(
            q, k, v, block_mask, dropout, scale=scale, score_mod=score_mod, return_lse=return_lse
        )
    hints = kernel_options or {}
    if q.is_cpu:
        # there are no gradients here, and torch refuses inputs that ask for them, no_grad or not
        q, k, v = q.detach(), k.detach(), v.detach()
    if torch.compiler.is_compiling():
        # A compiler above us is at work: hand it the plain operator. Inductor's CPU kernel ignores
        # the storage offset of a view made inside the graph, fails with a view of fewer dimensions,
        # as linear layers give, and where it would fuse with what comes after it (torch 2.13): so
        # copies that no compiler looks into seal its inputs and its output.
        score_mod = score_mod and _scaled(score_mod, None, q.device)
        if not q.is_cpu:
            return attend(q, k, v, block_mask, score_mod, scale, return_lse, hints)
        q, k, v = _sealed(q), _sealed(k), _sealed(v)
        out, lse = attend(q, k, v, block_mask, score_mod, scale, return_lse, hints)
        return _sealed(out), lse
    if q.is_cpu:
        # its C++ takes numbers of a stride of 0 for neighbours in memory (torch 2.13)
        q, k, v = (
            x if x.stride(3) == 1 and not x.is_neg() else x.contiguous().resolve_neg()
            for x in (q, k, v)
        )
    if scale is not None and scale == q.shape[3] ** -0.5:
        scale = None
    if score_mod is not None or scale is not None:
        score_mod, scale = _scaled(score_mod, scale, q.device), None if scale is None else 1.0
    return call(q, k, v, block_mask, score_mod, scale, return_lse, hints)


def _scaled(score_mod: ScoreMod | None, scale: float | None, device: torch.device) -> ScoreMod:
    """A score_mod, any callable, and a scale, each or none, as the function that dynamo takes."""
    # a tensor, because a number would be compiled into the kernel
    factor = None if scale is None else _as_tensor(scale, device)

    def scaled(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if factor is not None:
            score = score * factor
        if score_mod is None:
            return score
        modified = score_mod(score, b, h, q_idx, kv_idx)
        if device.type == "cpu":
            # Inductor's C++ writes whole tiles only of what reads the score, and any dtype to where
            # it reads float32 (torch 2.13): this is never the score, and of its dtype
            modified = torch.where(kv_idx < 0, score, modified)
        return modified.float() if modified.dtype == torch.float64 else modified

    return scaled


@functools.lru_cache(maxsize=64)
def _as_tensor(number: float, device: torch.device) -> Tensor:
    # kept over calls, of which one in inference_mode must not make it unfit for gradients
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.float32, device=device)


def _run_dropped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    dropout: Dropout,
    *,
    scale: float | None,
    score_mod: ScoreMod | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Dropout by two passes, since flex_attention has none: softmax over what is left, rescaled.

    sum(kept p v) / (1 - p_drop) = softmax(kept s) v * exp(lse of kept s - lse of s) / (1 - p_drop)
    """
    _, lse = run(q, k, v, block_mask, scale=scale, score_mod=score_mod, return_lse=True)
    dropping = dropout.dropping(score_mod, q.device)
    out, kept_lse = run(q, k, v, block_mask, scale=scale, score_mod=dropping, return_lse=True)
    assert lse is not None
    assert kept_lse is not None
    # in a row with nothing left the out is 0, and a finite difference keeps its gradient from NaN
    is_empty = kept_lse == -torch.inf
    part = (kept_lse.masked_fill(is_empty, 0) - lse.masked_fill(is_empty, 0)).exp()
    out = (out * (part / (1 - dropout.p)).unsqueeze(-1)).to(q.dtype)
    return out, lse if return_lse else None


@torch.library.custom_op("flexsparse::sealed", mutates_args=())
def _sealed(x: Tensor) -> Tensor:
    """A contiguous copy that no compiler looks into."""
    return x.clone(memory_format=torch.contiguous_format)


@_sealed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
