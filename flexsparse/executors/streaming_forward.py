"""The Triton kernel of the forward pass of heads `causal & (sink(s) | window(w))`.

Numbers of the mask are read from tensors, one per query head: a new size compiles nothing.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806 - capitals are the habit for compile-time constants of a kernel

import triton
import triton.language as tl

from flexsparse.executors.streaming_schedule import head_range, keep_keys, locate_rows
from flexsparse.executors.streaming_walk import (
    cap_scores,
    dense_row,
    dot,
    load_rows,
    row_offsets,
    rows_exist,
    starts,
    store_rows,
    walk_keys,
)

LN2 = tl.constexpr(0.6931471805599453)
# the running maximum starts here and not at -inf, so that a masked score never gives inf - inf
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def forward_tile(
    state, q, mask, k, v, start, limit, cut, qk_scale, cap,
    BLOCK_KV: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys of a tile; qk_scale is positive."""
    m, norm, acc = state
    scores = dot(q, tl.trans(k))  # [ROWS, BLOCK_KV]
    if SOFTCAP:
        scores, _ = cap_scores(scores, qk_scale, cap, SOFTCAP)
        qk_scale = 1.0
    scores = keep_keys(scores, float("-inf"), mask, cut, start, limit, BLOCK_KV)
    m_new = tl.maximum(m, tl.max(scores, 1) * qk_scale)
    # scaled only here, where it is a part of the subtraction
    probs = tl.exp2(scores * qk_scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    norm = norm * alpha + tl.sum(probs, 1)
    acc = dot(probs.to(v.dtype), v, acc * alpha[:, None])
    return m_new, norm, acc


@triton.jit
def no_keys_yet(ROWS: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The state of the online softmax before its first tile."""
    m = tl.full([ROWS], LOWEST, tl.float32)
    return m, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_DV], tl.float32)


@triton.jit
def out_and_lse(state):
    """Finish the online softmax: out and the natural-log lse, 0 and -inf where no key was."""
    m, norm, acc = state
    empty = norm == 0.0
    out = acc * (1.0 / tl.where(empty, 1.0, norm))[:, None]
    return out, tl.where(empty, float("-inf"), (m + tl.log2(norm)) * LN2)


@triton.jit
def store_out(
    state, out_ptr, lse_ptr, dense, half, n_left, n_rows,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Write out and lse of a half's rows; both are contiguous, `dense` is their first row."""
    out, lse = out_and_lse(state)
    exist = rows_exist(half, n_left, BLOCK_Q, PACK)
    at = dense + row_offsets(half, None, n_rows, 1, BLOCK_Q, PACK)
    store_rows(out_ptr, at * V_DIM, exist, out, V_DIM, BLOCK_DV)
    tl.store(lse_ptr + at, lse, mask=exist)


@triton.jit(do_not_specialize=["n_seqs", "q_len", "kv_len"])
def streaming_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sink, window,
    q_offset, cu_seqlens_q, cu_seqlens_k, n_seqs,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr,
    n_heads, group_size, q_len, kv_len, qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr,
    PACK: tl.constexpr, HALVES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write out and lse of HALVES * BLOCK_Q query rows of PACK heads that share a kv head."""
    head0 = tl.program_id(1) * PACK
    batch = tl.program_id(2)
    n_rows = q_len.to(tl.int64)
    row0, q_start, kv_start, q_len, kv_len, offset = locate_rows(
        tl.program_id(0), batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, n_seqs,
        HALVES * BLOCK_Q,
    )  # fmt: skip
    n_left = q_len - row0
    if n_left <= 0:
        return
    q_ptr, k_ptr, v_ptr = starts(
        q_ptr, k_ptr, v_ptr, batch, head0, q_start + row0, group_size,
        stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_vb, stride_vh,
    )  # fmt: skip
    k_ptr += kv_start.to(tl.int64) * stride_kn
    v_ptr += kv_start.to(tl.int64) * stride_vn
    # first, so that its loads are not waited for after those of the rows
    ranges = head_range(sink, window, head0, kv_len, PACK)
    rows = ()
    states = ()
    for half in tl.static_range(HALVES):
        at = row_offsets(half, n_left - 1, stride_qh, stride_qn, BLOCK_Q, PACK)
        rows += (load_rows(q_ptr, at, HEAD_DIM, BLOCK_D),)
        states += (no_keys_yet(PACK * BLOCK_Q, BLOCK_DV),)
    keys = (k_ptr, v_ptr)
    LAYOUT: tl.constexpr = (stride_kn, stride_vn, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV)
    states = walk_keys(
        forward_tile, states, rows, row0, q_len, offset, sink, window, ranges, head0, kv_len, keys,
        qk_scale, cap, LAYOUT, BLOCK_Q, BLOCK_KV, BLOCK_SINK, PACK, SOFTCAP,
    )  # fmt: skip
    # not before the walk, which has no registers for it
    dense = dense_row(batch, head0, q_start + row0, n_heads, n_rows)
    for half in tl.static_range(HALVES):
        store_out(
            states[half], out_ptr, lse_ptr, dense, half, n_left, n_rows,
            V_DIM, BLOCK_DV, BLOCK_Q, PACK,
        )  # fmt: skip
