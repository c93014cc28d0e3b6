"""The streaming kernels as operators of torch: opaque to torch.compile, with gradients.

An operator in Python takes torch longer than all launches of a call, so eager calls go around it.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexsparse.executors import streaming_backward as backward
from flexsparse.executors import streaming_forward as forward
from flexsparse.executors.eager import is_watched
from flexsparse.executors.streaming_tiles import (
    MAX_SINK,
    SINK_TILE,
    SUM_TILE,
    cdiv,
    dims,
    launch_options,
    n_sequences,
    n_slots,
    pack_of,
    row_grid,
    score_factors,
    sink_chunk,
    strides,
    tiles_for,
)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    q_offset: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float,
    max_sink: int,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: out, lse."""
    # rows outside every packed sequence are nobody's to write
    new = torch.empty if cu_seqlens_q is None else torch.zeros
    out = new((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:
        lse.fill_(-math.inf)
    if out.numel() == 0:
        return out, lse
    group_size = q.shape[1] // k.shape[1]
    pack = pack_of(group_size)
    tile = tiles_for(q, v, softcap, pack).fwd
    n_seqs = n_sequences(cu_seqlens_q)
    with torch.cuda.device_of(q):
        forward.streaming_fwd_kernel[row_grid(q, tile, pack, cu_seqlens_q)](
            q, k, v, out, lse, sink, window, q_offset, cu_seqlens_q, cu_seqlens_k, n_seqs,
            *strides(q, k, v), q.shape[1], group_size, q.shape[2], k.shape[2],
            *score_factors(scale, softcap), **dims(q, v), BLOCK_Q=tile.rows // pack,
            BLOCK_KV=tile.kv, BLOCK_SINK=SINK_TILE, PACK=pack, HALVES=tile.halves,
            SOFTCAP=softcap > 0, **launch_options(tile.warps, tile.stages),
        )  # fmt: skip
    return out, lse


streaming_forward = torch.library.custom_op(
    "flexsparse::streaming_forward", launch_forward, mutates_args=()
)


@streaming_forward.register_fake
def _(q, k, v, sink, window, *rest):  # type: ignore[no-untyped-def]
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return q.new_empty((*q.shape[:3], v.shape[-1])), lse


def launch_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor,
    window: Tensor,
    q_offset: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float,
    max_sink: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels: dq, dk, dv. No atomics: the same bits on every run.

    A dlse of None is zeros.
    """
    new = torch.empty if cu_seqlens_q is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    n_heads, n_kv_heads, q_len, kv_len = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    group_size = n_heads // n_kv_heads
    pack = pack_of(group_size)
    tiles = tiles_for(q, v, softcap, pack)
    shape = dims(q, v)
    factors = (*score_factors(scale, softcap), scale)
    dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    stats = lse.new_empty((*lse.shape, 2))
    n_seqs = n_sequences(cu_seqlens_q)
    lengths = (q_offset, cu_seqlens_q, cu_seqlens_k, n_seqs)
    with torch.cuda.device_of(q):
        tile = tiles.dq
        backward.streaming_dq_kernel[row_grid(q, tile, pack, cu_seqlens_q)](
            q, k, v, out, dout, lse, dlse, stats, dq, sink, window, *lengths,
            *strides(q, k, v), n_heads, group_size, q_len, kv_len, *factors, **shape,
            BLOCK_Q=tile.rows // pack, BLOCK_KV=tile.kv, BLOCK_SINK=SINK_TILE, PACK=pack,
            HALVES=tile.halves, SOFTCAP=softcap > 0, **launch_options(tile.warps, tile.stages),
        )  # fmt: skip

        tile = tiles.dkdv
        n_sink = cdiv(min(max_sink, MAX_SINK, kv_len), tile.kv)
        chunk = sink_chunk(q_len, n_sink * n_kv_heads * q.shape[0])
        n_tiles = n_slots(kv_len, tile.kv, cu_seqlens_k)
        n_chunks = cdiv(q_len, chunk) if cu_seqlens_q is None else q_len // (chunk // 2)
        if q_len <= chunk:
            n_sink = 0
        sizes = (n_kv_heads, group_size, q_len, kv_len, n_chunks, n_sink, chunk)
        part_shape = (q.shape[0] * n_chunks, n_kv_heads, n_sink * tile.kv)
        parts = [
            torch.empty((*part_shape, x.shape[-1]), dtype=torch.float32, device=q.device)
            for x in (k, v)
        ]
        backward.streaming_dkdv_kernel[(n_chunks * n_sink + n_tiles, n_kv_heads, q.shape[0])](
            q, k, v, dout, stats, dk, dv, *parts, sink, window, *lengths,
            *strides(q, k, v), n_heads, *sizes, *factors, **shape, BLOCK_Q=tile.rows,
            BLOCK_KV=tile.kv, SOFTCAP=softcap > 0, **launch_options(tile.warps, tile.stages),
        )  # fmt: skip
        if n_sink > 0:
            grid = (q.shape[0] * n_seqs, n_kv_heads, n_sink * tile.kv // SUM_TILE)
            backward.streaming_sum_kernel[grid](
                *parts, dk, dv, sink, window, *lengths[1:], *sizes, scale, **shape,
                BLOCK_KV=tile.kv, BLOCK_SUM=SUM_TILE, num_warps=4,
            )  # fmt: skip
    return dq, dk, dv


streaming_backward = torch.library.custom_op(
    "flexsparse::streaming_backward", launch_backward, mutates_args=()
)


@streaming_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, sink, window, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:8])
    ctx.numbers = inputs[8:]


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, out, lse, *data = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    tensors = (dout, dlse, q, k, v, out, lse, *data)
    # where gradients of gradients are wanted, the operator refuses them
    by_operator = torch.is_grad_enabled() or is_watched(*tensors)
    launch = streaming_backward if by_operator else launch_backward
    return launch(*tensors, *ctx.numbers)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    return (*_gradients(ctx, dout, dlse), *[None] * 8)


streaming_forward.register_autograd(_differentiate, setup_context=_save)


class StreamingAttention(torch.autograd.Function):
    """`streaming_forward` of eager calls, to autograd; `rest` is what follows q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rest: tuple[Any, ...]) -> Any:  # noqa: D102
        output = launch_forward(q, k, v, *rest)
        _save(ctx, (q, k, v, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # noqa: D102
        return (*_gradients(ctx, dout, dlse), None)


def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What `streaming_forward` gives, by the shortest way: out, lse."""
    output: tuple[Tensor, Tensor]
    if is_watched(q, k, v, *rest[:5]):
        output = streaming_forward(q, k, v, *rest)
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        output = StreamingAttention.apply(q, k, v, rest)
    else:
        output = launch_forward(q, k, v, *rest)
    return output
