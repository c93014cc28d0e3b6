"""Token-granular streaming attention on a GPU: `causal & (sink(s) | window(w))` in Triton.

The fast path for heads whose sink and window are well under a block of 128 tokens: forward and
backward, variable lengths, decode and paged keys. This file says what the kernels take and needs no
triton; triton is imported by the first call that runs.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.errors import ExecutorError

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_BATCH = 65535  # of the last axis of a grid
ASSUMED_SINK = 128  # a longer sink is still right without `max_sink`, its gradient is slower

# read once, as triton reads it when the kernels are defined; torch.compile takes both as constants
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Positions(NamedTuple):
    """Where sequences begin, their queries stand and their keys lie; see `streaming_attention`."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    q_offset: int | Tensor | None = None
    page_table: Tensor | None = None
    kv_lens: Tensor | None = None


AT_THE_END = Positions()  # one sequence a batch row, whose last query stands at its last key


def missing() -> str | None:
    """Why the kernels cannot be used here, as a sentence, or None if they can."""
    if not _HAS_TRITON:
        return "triton is not installed: pip install 'flexsparse[triton]'"
    return None


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    positions: Positions = AT_THE_END,
) -> str | None:
    """Why these kernels cannot run these inputs, as a sentence, or None if they can."""
    cu_seqlens_q, cu_seqlens_k, _, page_table, kv_lens = positions
    device, dtype = q.device, q.dtype
    reason = missing() or _unsupported_device(q)
    if reason is not None:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions; it must be [batch, heads, length, head_dim]"
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}; the kernel takes float16, bfloat16 or float32"
        if x.dtype != dtype:
            return f"{name} is {x.dtype} but q is {dtype}; convert one of them"
        if x.shape[-1] not in HEAD_DIMS:
            return f"{name} has head_dim {x.shape[-1]}; the kernel takes one of {HEAD_DIMS}"
        if x.stride(-1) != 1:
            return (
                f"{name}'s last dimension has stride {x.stride(-1)}; the kernel takes 1: "
                f"pass {name}.contiguous()"
            )
    n_batch, n_heads, _, head_dim = q.shape
    kv_batch, n_kv_heads, _, k_head_dim = k.shape
    if head_dim != k_head_dim:
        return f"q has head_dim {head_dim} but k has {k_head_dim}; they must be equal"
    if n_batch > MAX_BATCH:
        return f"q has batch {n_batch}; the kernel takes at most {MAX_BATCH}"
    if k.shape[:3] != v.shape[:3]:
        return f"k is {list(k.shape[:3])} but v is {list(v.shape[:3])} in [batch, heads, length]"
    if page_table is None and n_batch != kv_batch:
        return f"q has batch {n_batch} but k has {kv_batch}; they must be equal"
    if n_heads == 0 or n_kv_heads == 0 or n_heads % n_kv_heads:
        return f"q has {n_heads} heads and k {n_kv_heads}; q's must be a multiple of k's"
    for name, x in (("sink", sink), ("window", window)):
        if x.shape != (n_heads,) or x.dtype != torch.int32 or not x.is_contiguous():
            return (
                f"{name} is {x.dtype} {list(x.shape)}; the kernel takes a contiguous int32 tensor "
                f"[{n_heads}], one number per query head"
            )
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        return "only one of cu_seqlens_q and cu_seqlens_k was given; give both or neither"
    if (page_table is None) != (kv_lens is None):
        return "page_table and kv_lens (keys in use, per row) go together; give both or neither"
    if packed and page_table is not None:
        return "cu_seqlens_q came with page_table; packed sequences have no pages"
    n_seqs = n_batch
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        n_seqs = cu_seqlens_q.numel() - 1
        if cu_seqlens_k.shape != cu_seqlens_q.shape or n_seqs < 1:
            return "cu_seqlens_q and cu_seqlens_k need the same length, the number of sequences + 1"
    if page_table is not None and (page_table.dim() != 2 or page_table.shape[0] != n_seqs):
        return f"page_table is {list(page_table.shape)}; the kernel takes [{n_seqs}, pages per row]"
    named = zip(Positions._fields, positions, strict=True)
    given = [(name, x) for name, x in named if isinstance(x, Tensor)]
    for name, x in given:
        if x.dtype != torch.int32 or not x.is_contiguous():
            return f"{name} is {x.dtype}, strides {x.stride()}; the kernel takes contiguous int32"
        if name in ("kv_lens", "q_offset") and x.shape != (n_seqs,):
            return f"{name} is {list(x.shape)}; it must be one number per sequence, [{n_seqs}]"
    for name, x in (("k", k), ("v", v), ("sink", sink), ("window", window), *given):
        if x.device != device:
            return f"{name} is on {x.device} but q is on {device}; move one of them"
    return None


def _unsupported_device(q: Tensor) -> str | None:
    if q.is_cuda:
        # torch.compile warns of a cache
        is_old = _is_old.__wrapped__ if torch.compiler.is_compiling() else _is_old
        if is_old(q.device):
            return f"{q.device} is older than compute capability 8.0, which the kernels need"
        return None
    if not _INTERPRETED:
        return (
            f"q is on {q.device}; the kernels run on CUDA (or interpreted, for tests: set "
            "TRITON_INTERPRET=1 before flexsparse is imported)"
        )
    if q.dtype == torch.bfloat16:
        return "q is torch.bfloat16, which Triton's interpreter cannot multiply; use float16 there"
    return None


@functools.cache
def _is_old(device: torch.device) -> bool:
    # fake CUDA tensors exist without a device
    return torch.cuda.is_available() and torch.cuda.get_device_properties(device).major < 8


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    max_sink: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where head h keeps `causal & (sink(sink[h]) | window(window[h]))`.

    Works inside torch.compile(fullgraph=True). Gradients have the same bits on every run.

    >>> sink, window = torch.tensor([[4, 64], [64, 256]], dtype=torch.int32, device="cuda")
    >>> out = streaming_attention(q, k, v, sink, window)  # q [1, 2, 4096, 128]

    Args:
        q: [batch, n_heads, q_len, head_dim]; of packed sequences, lengths in total tokens.
        k: [batch, n_kv_heads, kv_len, head_dim].
        v: like k; its head_dim may differ.
        sink: int32 [n_heads], in tokens. It is data: a new number compiles nothing.
        window: likewise; the query's own position counts.
        scale: of the scores; 1 / sqrt(head_dim) if None.
        softcap: scores become softcap * tanh(scores / softcap).
        cu_seqlens_q: int32 [sequences + 1], where each packed sequence starts, and the end; the
            same in every batch row.
        cu_seqlens_k: likewise for the keys.
        q_offset: position of query row 0, also one per sequence; kv_len - q_len if None.
        page_table: int32 [batch, pages per row]; k and v are then [n_pages, n_kv_heads,
            page_size, head_dim]. No gradients.
        kv_lens: int32 [batch], the keys in use of each row; goes with page_table.
        max_sink: the largest sink if the host knows it; only the speed of the gradient uses it.
        return_lse: also return lse.

    Returns:
        out [batch, n_heads, q_len, head_dim of v], and with return_lse the float32 natural-log
        lse [batch, n_heads, q_len]. A row that keeps no key has out 0 and lse -inf.

    Raises:
        ExecutorError: `unsupported` says why, or the soft-cap is not positive, or pages are to be
            differentiated.

    Source: attention sinks are StreamingLLM's (arXiv 2309.17453), the walk over tiles with an
        online softmax is FlashAttention-2's (arXiv 2307.08691), split decoding Flash-Decoding's.
    """
    positions = Positions(cu_seqlens_q, cu_seqlens_k, q_offset, page_table, kv_lens)
    reason = unsupported(q, k, v, sink, window, positions)
    if reason is None and softcap is not None and softcap <= 0:
        reason = f"softcap is {softcap}; it must be positive, or None for no cap"
    if reason is None and page_table is not None and _wants_gradients(q, k, v):
        reason = "paged keys have no gradient; call it under torch.no_grad()"
    if reason is not None:
        raise ExecutorError(f"streaming attention cannot run this call: {reason}.")
    out, lse = run(
        q, k, v, sink, window, positions, scale=scale, softcap=softcap, max_sink=max_sink
    )
    return (out, lse) if return_lse else out


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    positions: Positions,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    max_sink: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`streaming_attention` of what `unsupported` lets pass: out and lse."""
    from flexsparse.executors import streaming_decode, streaming_ops

    cu_seqlens_q, cu_seqlens_k, q_offset, page_table, kv_lens = positions
    if isinstance(q_offset, int) and cu_seqlens_q is None and page_table is None:
        # the kernels' own default costs no tensor
        q_offset = None if q_offset == k.shape[2] - q.shape[2] else q_offset
    if isinstance(q_offset, int):
        n_seqs = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        q_offset = torch.full((n_seqs,), q_offset, dtype=torch.int32, device=q.device)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if scale <= 0:
        # the kernels scale a maximum, so the sign goes to q
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    cap = 0.0 if softcap is None else softcap
    few_rows = q.shape[2] * (q.shape[1] // k.shape[1]) <= streaming_decode.DECODE_ROWS
    is_split = few_rows and cu_seqlens_q is None and not _wants_gradients(q, k, v)
    if page_table is not None or is_split:
        out, lse = streaming_decode.attention(
            q, k, v, sink, window, q_offset, page_table, kv_lens, scale, cap
        )
    else:
        out, lse = streaming_ops.attention(
            q, k, v, sink, window, q_offset, cu_seqlens_q, cu_seqlens_k, scale, cap,
            ASSUMED_SINK if max_sink is None else max_sink,
        )  # fmt: skip
    return out, lse


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
