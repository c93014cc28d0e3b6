"""Who computes a workload: flexsparse, dense kernels, and other sparse kernels.

A backend is asked to prepare a workload and gives a function of q, k and v, or the reason why it
cannot, as a sentence.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexsparse.benchmark.case import Build, Case, Prepared, built, bytes_of

# up to so many elements create_block_mask takes less time and memory as it is than to be compiled
EAGER_ELEMENTS = 1 << 27
# elements that create_block_mask may look at: seconds on CPU, and as many on a GPU
MOST_ELEMENTS = {"cpu": 1 << 33, "cuda": 1 << 38}
MOST_SCORES = {"cpu": 1 << 30, "cuda": 1 << 34}  # bytes that eager attention may hold at once


def flexsparse(case: Case) -> Prepared | str:
    """This library, as its plan decides."""
    return Prepared(case.attend, case.build)


def flex_torch(case: Case) -> Prepared | str:
    """Flex_attention of torch with the BlockMask that torch makes."""
    return _flex(case, case.mask_mod)


def flex_gym(case: Case) -> Prepared | str:
    """Flex_attention of torch with attention-gym's mask_mod."""
    if case.workload.gym is None:
        return "attention-gym has no such mask, or is not installed: pip install 'flexsparse[gym]'"
    return _flex(case, case.workload.gym)


def _flex(case: Case, mask_mod: Callable[..., Tensor]) -> Prepared | str:
    workload, shape = case.workload, case.shape
    n_heads = case.attend.n_heads
    elements = workload.q_len * workload.kv_len * (n_heads or 1)
    if elements > MOST_ELEMENTS[case.device.type]:
        return f"create_block_mask would look at {elements:,} elements"
    # a function of its own, or the ninth mask of a process would run dense and unfused
    create = create_block_mask
    if elements > EAGER_ELEMENTS:
        create = torch.compile(_own(create_block_mask), dynamic=False)
    block_mask, cold, warm = built(
        lambda: create(mask_mod, None, n_heads, workload.q_len, workload.kv_len, case.device),
        case.device,
    )
    gqa = shape.n_heads != shape.n_kv_heads
    compiled = torch.compile(_own(flex_attention), dynamic=False)
    return Prepared(
        lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=gqa),
        Build(cold, warm, bytes_of(block_mask)),
    )


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object, and so dynamo's caches and limits, of its own."""
    mine = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    mine.__kwdefaults__ = function.__kwdefaults__
    return mine


def sdpa(case: Case) -> Prepared | str:
    """scaled_dot_product_attention, with the kernel that torch chooses."""
    gqa = case.shape.n_heads != case.shape.n_kv_heads
    causal = case.workload.is_causal
    return Prepared(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    )


def sdpa_flash(case: Case) -> Prepared | str:
    """FlashAttention-2 of torch."""
    if case.device.type == "cpu":
        return "on CPU it is what sdpa chooses"
    return _sdpa_by(case, SDPBackend.FLASH_ATTENTION)


def sdpa_efficient(case: Case) -> Prepared | str:
    """The memory-efficient kernel of torch."""
    return _sdpa_by(case, SDPBackend.EFFICIENT_ATTENTION)


def sdpa_cudnn(case: Case) -> Prepared | str:
    """The kernel of cuDNN."""
    return _sdpa_by(case, SDPBackend.CUDNN_ATTENTION)


def sdpa_math(case: Case) -> Prepared | str:
    """scaled_dot_product_attention without a fused kernel."""
    return _too_large(case) or _sdpa_by(case, SDPBackend.MATH)


def _sdpa_by(case: Case, kernel: SDPBackend) -> Prepared | str:
    if case.device.type == "cpu" and kernel is not SDPBackend.MATH:
        return "there is none for CPU"
    prepared = sdpa(case)
    assert isinstance(prepared, Prepared)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return prepared.attend(q, k, v)

    return Prepared(attend)


def eager(case: Case) -> Prepared | str:
    """Softmax over all scores in plain PyTorch, those outside the mask hidden."""
    reason = _too_large(case)
    if reason is not None:
        return reason
    shape, workload = case.shape, case.workload
    b, h, q_idx, kv_idx = (
        torch.arange(n, device=case.device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, n in enumerate((1, shape.n_heads, workload.q_len, workload.kv_len))
    )
    hidden = ~case.mask_mod(b, h, q_idx, kv_idx)
    group_size = shape.n_heads // shape.n_kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group_size, 1) if group_size > 1 else x for x in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return weights @ v

    return Prepared(attend)


def _too_large(case: Case) -> str | None:
    shape, workload = case.shape, case.workload
    scores = shape.batch * shape.n_heads * workload.q_len * workload.kv_len
    needed = 3 * scores * shape.dtype.itemsize
    if needed <= MOST_SCORES[case.device.type]:
        return None
    return f"its scores would take {needed / 2**30:.1f} GiB"


def varlen_attn(case: Case) -> Prepared | str:
    """FlashAttention of torch for packed documents and windows (torch.nn.attention.varlen)."""
    reason = _not_cuda(case)
    if reason is not None:
        return reason
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "this torch has none"
    ends, longest, left = _packed(case)
    if left is None:
        return "the mask is neither a window nor documents"
    options: dict[str, Any] = {"window_size": (left, 0)}
    if case.shape.n_heads != case.shape.n_kv_heads:
        options["enable_gqa"] = True

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return _unpacked(varlen_attn(q, k, v, ends, ends, longest, longest, **options), case)

    return Prepared(attend)


def flash_attn(module: str, case: Case) -> Prepared | str:
    """Dense attention of one of the flash-attn packages."""
    function = _installed(module, case, "flash_attn_func")
    if isinstance(function, str):
        return function
    causal = case.workload.is_causal

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
        return _output(out).transpose(1, 2)

    return Prepared(attend)


def flash_attn_varlen(module: str, case: Case) -> Prepared | str:
    """Windows and packed documents of one of the flash-attn packages."""
    function = _installed(module, case, "flash_attn_varlen_func")
    if isinstance(function, str):
        return function
    ends, longest, left = _packed(case)
    if left is None:
        return "the mask is neither a window nor documents"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=True,
            window_size=(left, 0),
        )
        return _unpacked(out, case)

    return Prepared(attend)


def _packed(case: Case) -> tuple[Tensor, int, int | None]:
    """How FlashAttention says the mask: cu_seqlens, the longest document, keys to the left."""
    workload = case.workload
    lengths = workload.documents or (workload.kv_len,)
    ends = torch.tensor([0, *lengths * case.shape.batch], device=case.device).cumsum(0).int()
    left = workload.window - 1 if workload.window else -1 if workload.documents else None
    return ends, max(lengths), left


def _unpacked(out: Any, case: Case) -> Tensor:
    """[tokens of all batch rows, heads, D] -> [B, heads, tokens, D]."""
    tokens = _output(out)
    return tokens.reshape(case.shape.batch, -1, *tokens.shape[1:]).transpose(1, 2)


def _installed(module: str, case: Case, name: str) -> Callable[..., Any] | str:
    """A function of a package, or why it cannot be had."""
    reason = _not_cuda(case)
    if reason is not None:
        return reason
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return f"{module} is not installed"
    return function


def _not_cuda(case: Case) -> str | None:
    return None if case.device.type == "cuda" else "it runs on CUDA"


def _output(out: Any) -> Tensor:
    """The output; some versions return the LSE too."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


FLASH_ATTN = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}
WITHOUT_SKIPPING = ("sdpa math", "eager")  # dense and not fused: causal attention costs as much
DENSE: dict[str, Callable[[Case], Prepared | str]] = {
    "sdpa": sdpa,
    "sdpa flash": sdpa_flash,
    "sdpa efficient": sdpa_efficient,
    "sdpa cudnn": sdpa_cudnn,
    "sdpa math": sdpa_math,
    "eager": eager,
    **{name: partial(flash_attn, module) for name, module in FLASH_ATTN.items()},
}
SPARSE: dict[str, Callable[[Case], Prepared | str]] = {
    "flexsparse": flexsparse,
    "flex, torch's blocks": flex_torch,
    "flex, attention-gym": flex_gym,
    "varlen_attn": varlen_attn,
    **{f"{name} varlen": partial(flash_attn_varlen, module) for name, module in FLASH_ATTN.items()},
}
