"""Triton kernels of the backward pass: dq walks keys as the forward does, dk and dv walk rows.

No atomics: every sum has one order, so gradients have the same bits on every run.
"""

# mypy: ignore-errors
# ruff: noqa: N803 - capitals are the habit for compile-time constants of a kernel

import triton
import triton.language as tl

from flexsparse.executors.streaming_kernels import (
    FAR,
    LOG2E,
    cap_scores,
    dot,
    keep,
    load_rows,
    locate,
    needs_mask,
    query_rows,
    store_rows,
    walk_keys,
)


@triton.jit(do_not_specialize=["n_rows"])
def streaming_delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, n_rows,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write delta = sum(out * dout) - dlse, what the softmax takes off every score's gradient."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = row < n_rows
    out = load_rows(out_ptr, row * V_DIM, valid, V_DIM, BLOCK_DV).to(tl.float32)
    dout = load_rows(dout_ptr, row * V_DIM, valid, V_DIM, BLOCK_DV).to(tl.float32)
    dlse = tl.load(dlse_ptr + row, mask=valid, other=0.0)
    tl.store(delta_ptr + row, tl.sum(out * dout, 1) - dlse, mask=valid)


@triton.jit
def load_lse(ptr, offset, valid):
    """Load lse in base 2; inf in empty rows and past the end, so that every weight there is 0."""
    lse = tl.load(ptr + offset, mask=valid, other=float("inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def weights(qk, lse, kv, p, s, w, limit, masked, qk_scale, cap, SOFTCAP: tl.constexpr):
    """The softmax weights, from lse, and tanh of the soft-cap; arguments broadcast to qk."""
    scores, tanh = cap_scores(qk, qk_scale, cap, SOFTCAP)
    probs = tl.exp2(scores - lse)
    if masked:
        probs = tl.where(keep(kv, p, s, w, limit), probs, 0.0)
    return probs, tanh


@triton.jit
def score_gradient(probs, tanh, dprobs, delta, SOFTCAP: tl.constexpr):
    """The gradient of scale * q k', through the softmax and the soft-cap."""
    dscores = probs * (dprobs - delta)
    if SOFTCAP:
        dscores *= 1.0 - tanh * tanh
    return dscores


@triton.jit
def dq_tile(
    dq, rows, mask, k_ptr, v_ptr, k_offset, v_offset, kv, limit, masked, qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The rows' dq, with the keys `kv` added (still without the softmax scale)."""
    q, dout, lse, delta = rows
    p, s, w = mask
    valid = kv < limit
    k = load_rows(k_ptr, k_offset, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
    probs, tanh = weights(
        dot(q, tl.trans(k)),
        lse[:, None],
        kv[None, :],
        p[:, None],
        s[:, None],
        w[:, None],
        limit,
        masked,
        qk_scale,
        cap,
        SOFTCAP,
    )  # fmt: skip [ROWS, BLOCK_KV]
    v = load_rows(v_ptr, v_offset, valid, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
    dscores = score_gradient(probs, tanh, dot(dout, tl.trans(v)), delta[:, None], SOFTCAP)
    return dot(dscores.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def streaming_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, sink, window,
    q_offset, cu_seqlens_q, cu_seqlens_k, tiles,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    n_heads, group_size, q_len, kv_len, qk_scale, cap, scale,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr,
    PACK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write dq of BLOCK_Q query rows of PACK heads, by the forward kernel's walk over the keys."""
    head0 = tl.program_id(1) * PACK
    batch = tl.program_id(2)
    n_rows = q_len
    _, row0, q_start, kv_start, q_len, kv_len, offset = locate(
        tl.program_id(0), batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, tiles, BLOCK_Q
    )
    if row0 >= q_len:
        return
    head, row, mask, bounds, walk = query_rows(
        row0, q_len, offset, sink, window, head0, kv_len, BLOCK_Q, BLOCK_KV, BLOCK_SINK, PACK
    )
    valid = row < q_len
    at = (q_start + row).to(tl.int64)
    kv_head = (head0 // group_size).to(tl.int64)
    q_ptr += batch.to(tl.int64) * stride_qb
    k_ptr += batch.to(tl.int64) * stride_kb + kv_head * stride_kh
    v_ptr += batch.to(tl.int64) * stride_vb + kv_head * stride_vh
    q = load_rows(
        q_ptr, head.to(tl.int64) * stride_qh + at * stride_qn, valid, HEAD_DIM, BLOCK_D
    )  # [ROWS, HEAD_DIM]
    at += (batch * n_heads + head).to(tl.int64) * n_rows
    dout = load_rows(dout_ptr, at * V_DIM, valid, V_DIM, BLOCK_DV)  # [ROWS, V_DIM]
    delta = tl.load(delta_ptr + at, mask=valid, other=0.0)
    lse = load_lse(lse_ptr, at, valid)
    dq = walk_keys(
        dq_tile, tl.zeros([PACK * BLOCK_Q, BLOCK_D], tl.float32), (q, dout, lse, delta),
        mask, bounds, walk, k_ptr, v_ptr, kv_start, stride_kn, stride_vn, qk_scale, cap,
        HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_KV, BLOCK_SINK, SOFTCAP,
    )  # fmt: skip
    store_rows(dq_ptr, at * HEAD_DIM, valid, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["q_len", "kv_len", "n_chunks", "n_sink"])
def streaming_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_part, dv_part,
    sink, window, q_offset, cu_seqlens_q, cu_seqlens_k, tiles, first_chunk,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    n_heads, n_kv_heads, group_size, q_len, kv_len, n_chunks, n_sink, chunk, qk_scale, cap, scale,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    PARTIAL: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BLOCK_KV keys: a loop over the query rows of their heads that see them.

    A window key is seen by w rows, a sink key by all later ones. To keep that from being one
    program's work, rows are cut into chunks of `chunk` rows. PARTIAL launches sum one chunk each
    (chunk 0 apart) for the first n_sink key tiles into dk_part, dv_part; the launch after it does
    chunk 0 and the window, and adds the parts in their order: the same bits on every run. A sink
    longer than n_sink tiles is still right: its further tiles walk all rows in one program.
    """
    batch = tl.program_id(2)
    n_rows = q_len
    n_keys = kv_len
    kv_head = tl.program_id(1)
    if PARTIAL:
        kv_head = tl.program_id(1) // n_sink
        chunk_id = tl.program_id(0)
        seq, row_first, q_start, kv_start, q_len, kv_len, offset = locate(
            chunk_id, batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, tiles, 1
        )
        if cu_seqlens_q is None:
            row_first = (chunk_id + 1) * chunk
            chunk_id += batch * n_chunks
        kv0 = tl.program_id(1) % n_sink * BLOCK_KV
        if row_first >= q_len:
            return
    else:
        seq, kv0, q_start, kv_start, q_len, kv_len, offset = locate(
            tl.program_id(0), batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, tiles,
            BLOCK_KV,
        )  # fmt: skip
    if kv0 >= kv_len:
        return
    head0 = kv_head * group_size
    s_max = 0
    w_max = 0
    for h in range(group_size):
        s_max = tl.maximum(s_max, tl.load(sink + head0 + h))
        w_max = tl.maximum(w_max, tl.minimum(tl.load(window + head0 + h), FAR))
    in_sink = kv0 < s_max
    if PARTIAL:  # noqa: SIM102 - decided when compiling, apart from the test below it
        if kv0 >= s_max:
            return
    row_lo = tl.maximum(kv0 - offset, 0)
    row_hi = tl.where(w_max > 0, kv0 + BLOCK_KV - 1 + w_max - offset, row_lo)
    summed = in_sink & (kv0 < n_sink * BLOCK_KV)
    row_hi = tl.where(in_sink, tl.where(summed, tl.maximum(row_hi, chunk), q_len), row_hi)
    row_hi = tl.minimum(row_hi, q_len)
    if PARTIAL:
        row_lo = tl.maximum(row_first, tl.maximum(row_hi, row_lo))
        row_hi = tl.minimum(row_first + chunk, q_len)

    kv = kv0 + tl.arange(0, BLOCK_KV)  # [BLOCK_KV]
    valid = kv < kv_len
    batch64 = batch.to(tl.int64)
    q_ptr += batch64 * stride_qb
    k_ptr += batch64 * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += batch64 * stride_vb + kv_head.to(tl.int64) * stride_vh
    at = (kv_start + kv).to(tl.int64)
    k = load_rows(k_ptr, at * stride_kn, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
    v = load_rows(v_ptr, at * stride_vn, valid, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
    dk = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_KV, BLOCK_DV], tl.float32)

    # heads and row tiles are one loop, so that loads are prefetched from one head to the next
    per_head = tl.maximum(row_hi - row_lo + BLOCK_Q - 1, 0) // BLOCK_Q
    step = tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    for i in range(per_head * group_size):
        head = head0 + i // per_head
        row0 = row_lo + i % per_head * BLOCK_Q
        seen = step < row_hi - row0
        s = tl.load(sink + head)
        w = tl.load(window + head)
        head64 = head.to(tl.int64)
        at_q = (q_start + row0 + step).to(tl.int64)
        dense = (batch64 * n_heads + head64) * n_rows
        q = load_rows(
            q_ptr + head64 * stride_qh, at_q * stride_qn, seen, HEAD_DIM, BLOCK_D
        )  # [BLOCK_Q, HEAD_DIM]
        lse = load_lse(lse_ptr, dense + at_q, seen)
        p_lo = row0 + offset
        masked = needs_mask(kv0, kv0 + BLOCK_KV, FAR, p_lo, p_lo + BLOCK_Q - 1, s, w)
        probs, tanh = weights(
            dot(k, tl.trans(q)),
            lse[None, :],
            kv[:, None],
            p_lo + step[None, :],
            s,
            w,
            kv_len,
            masked,
            qk_scale,
            cap,
            SOFTCAP,
        )  # fmt: skip [BLOCK_KV, BLOCK_Q]
        dout = load_rows(dout_ptr + dense * V_DIM, at_q * V_DIM, seen, V_DIM, BLOCK_DV)
        dv = dot(probs.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + dense + at_q, mask=seen, other=0.0)
        dscores = score_gradient(probs, tanh, dot(v, tl.trans(dout)), delta[None, :], SOFTCAP)
        dk = dot(dscores.to(q.dtype), q, dk)
    dk *= scale

    if PARTIAL:
        part = (chunk_id.to(tl.int64) * n_kv_heads + kv_head) * (n_sink * BLOCK_KV) + kv
        store_rows(dk_part, part * HEAD_DIM, valid, dk, HEAD_DIM, BLOCK_D)
        store_rows(dv_part, part * V_DIM, valid, dv, V_DIM, BLOCK_DV)
    else:
        if summed:
            first = batch * n_chunks
            if cu_seqlens_q is not None:
                first = tl.load(first_chunk + seq)
            for c in range(tl.maximum((q_len + chunk - 1) // chunk - 1, 0)):
                part = ((first + c).to(tl.int64) * n_kv_heads + kv_head) * (n_sink * BLOCK_KV) + kv
                dk += load_rows(dk_part, part * HEAD_DIM, valid, HEAD_DIM, BLOCK_D)
                dv += load_rows(dv_part, part * V_DIM, valid, V_DIM, BLOCK_DV)
        at += (batch64 * n_kv_heads + kv_head) * n_keys
        store_rows(dk_ptr, at * HEAD_DIM, valid, dk, HEAD_DIM, BLOCK_D)
        store_rows(dv_ptr, at * V_DIM, valid, dv, V_DIM, BLOCK_DV)
