"""Triton kernels of the backward pass: dq walks keys as the forward does, dk and dv walk rows.

No atomics: every sum has one order, so gradients have the same bits on every run.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806 - capitals are the habit for compile-time constants of a kernel

import triton
import triton.language as tl

from flexsparse.executors.streaming_schedule import (
    FAR,
    cuts,
    extent,
    find_sequence,
    first_slot,
    head_range,
    keep_keys,
    locate_rows,
)
from flexsparse.executors.streaming_walk import (
    LOG2E,
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


@triton.jit
def weights(qk, lse, qk_scale, cap, SOFTCAP: tl.constexpr):
    """The softmax weights, from lse, and tanh of the soft-cap; lse broadcasts to qk."""
    scores, tanh = cap_scores(qk, qk_scale, cap, SOFTCAP)
    return tl.exp2(scores - lse), tanh


@triton.jit
def score_gradient(probs, tanh, dprobs, delta, SOFTCAP: tl.constexpr):
    """The gradient of scale * q k', through the softmax and the soft-cap."""
    dscores = probs * (dprobs - delta)
    if SOFTCAP:
        dscores *= 1.0 - tanh * tanh
    return dscores


@triton.jit
def dq_tile(
    dq, rows, mask, k, v, start, limit, cut, qk_scale, cap,
    BLOCK_KV: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The rows' dq, with the keys of a tile added (still without the softmax scale)."""
    q, dout, lse, delta = rows
    qk = dot(q, tl.trans(k))  # [ROWS, BLOCK_KV]
    probs, tanh = weights(qk, lse[:, None], qk_scale, cap, SOFTCAP)
    probs = keep_keys(probs, 0.0, mask, cut, start, limit, BLOCK_KV)
    dscores = score_gradient(probs, tanh, dot(dout, tl.trans(v)), delta[:, None], SOFTCAP)
    return dot(dscores.to(k.dtype), k, dq)


@triton.jit
def load_dq_rows(
    q_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, half, n_left, stride_qh, stride_qn, n_rows,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """What a half's rows come with: q, dout, out, lse and dlse."""
    at_q = row_offsets(half, n_left - 1, stride_qh, stride_qn, BLOCK_Q, PACK)
    at = row_offsets(half, n_left - 1, n_rows, 1, BLOCK_Q, PACK)
    q = load_rows(q_ptr, at_q, HEAD_DIM, BLOCK_D)  # [ROWS, HEAD_DIM]
    dout = load_rows(dout_ptr, at * V_DIM, V_DIM, BLOCK_DV)  # [ROWS, V_DIM]
    out = load_rows(out_ptr, at * V_DIM, V_DIM, BLOCK_DV)
    lse = tl.load(lse_ptr + at)
    dlse = 0.0
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + at)
    return q, dout, out, lse, dlse


@triton.jit
def dq_rows(loaded, stats_ptr, half, n_left, n_rows, BLOCK_Q: tl.constexpr, PACK: tl.constexpr):
    """What dq_tile knows of a half's rows; writes lse and delta for the kernel of dk and dv."""
    q, dout, out, lse, dlse = loaded
    # what the softmax takes off every score's gradient
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1) - dlse
    # in base 2, and inf in empty rows, so that every weight there is 0
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    exist = rows_exist(half, n_left, BLOCK_Q, PACK)
    at = 2 * row_offsets(half, None, n_rows, 1, BLOCK_Q, PACK)
    tl.store(stats_ptr + at, lse, mask=exist)
    tl.store(stats_ptr + (at + 1), delta, mask=exist)
    return q, dout, lse, delta


@triton.jit(do_not_specialize=["n_seqs", "q_len", "kv_len"])
def streaming_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, stats_ptr, dq_ptr, sink, window,
    q_offset, cu_seqlens_q, cu_seqlens_k, n_seqs,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn: tl.constexpr,
    stride_vb, stride_vh, stride_vn: tl.constexpr,
    n_heads, group_size, q_len, kv_len, qk_scale, cap, scale,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr,
    PACK: tl.constexpr, HALVES: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write dq of HALVES * BLOCK_Q rows of PACK heads, by the forward kernel's walk.

    And their stats [batch, n_heads, q_len, 2]: lse in base 2, and delta.
    """
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
    dense = dense_row(batch, head0, q_start + row0, n_heads, n_rows)
    out_ptr += dense * V_DIM
    dout_ptr += dense * V_DIM
    lse_ptr += dense
    if dlse_ptr is not None:
        dlse_ptr += dense
    stats_ptr += 2 * dense
    dq_ptr += dense * HEAD_DIM
    # all loads before the first wait for one
    ranges = head_range(sink, window, head0, kv_len, PACK)
    loaded = ()
    for half in tl.static_range(HALVES):
        half_rows = load_dq_rows(
            q_ptr, out_ptr, dout_ptr, lse_ptr, dlse_ptr, half, n_left, stride_qh, stride_qn, n_rows,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_Q, PACK,
        )  # fmt: skip
        loaded += (half_rows,)
    rows = ()
    states = ()
    for half in tl.static_range(HALVES):
        half_rows = dq_rows(loaded[half], stats_ptr, half, n_left, n_rows, BLOCK_Q, PACK)
        rows += (half_rows,)
        states += (tl.zeros([PACK * BLOCK_Q, BLOCK_D], tl.float32),)
    keys = (k_ptr, v_ptr)
    LAYOUT: tl.constexpr = (stride_kn, stride_vn, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV)
    states = walk_keys(
        dq_tile, states, rows, row0, q_len, offset, sink, window, ranges, head0, kv_len, keys,
        qk_scale, cap, LAYOUT, BLOCK_Q, BLOCK_KV, BLOCK_SINK, PACK, SOFTCAP,
    )  # fmt: skip
    for half in tl.static_range(HALVES):
        store_rows(
            dq_ptr, row_offsets(half, None, n_rows, 1, BLOCK_Q, PACK) * HEAD_DIM,
            rows_exist(half, n_left, BLOCK_Q, PACK), states[half] * scale, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit
def group_range(sink, window, head0, group_size):
    """The largest sink and window of the heads of a group."""
    s_max = 0
    w_max = 0
    for h in range(group_size):
        s_max = tl.maximum(s_max, tl.load(sink + head0 + h))
        w_max = tl.maximum(w_max, tl.minimum(tl.load(window + head0 + h), FAR))
    return s_max, w_max


@triton.jit(do_not_specialize=["n_seqs", "q_len", "kv_len", "n_chunks", "n_sink"])
def streaming_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr, dk_part, dv_part,
    sink, window, q_offset, cu_seqlens_q, cu_seqlens_k, n_seqs,
    stride_qb, stride_qh, stride_qn: tl.constexpr, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    n_heads, n_kv_heads, group_size, q_len, kv_len, n_chunks, n_sink, chunk, qk_scale, cap, scale,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BLOCK_KV keys: a loop over the query rows of their heads that see them.

    A window key is seen by w rows, a sink key by all later ones. To keep that from being one
    program's work, the rows of the first n_sink tiles, where they hold a sink, are cut into chunks
    of `chunk` rows: each is a program and writes its sums to dk_part and dv_part, which
    streaming_sum_kernel adds. A sink longer than n_sink tiles is still right: its further tiles
    walk all rows in one program.
    """
    n_pieces = n_chunks * n_sink
    is_piece = tl.program_id(0) < n_pieces
    # the number of a chunk of rows, or of a tile of keys, in all sequences and then in its own
    slot = tl.program_id(0) - n_pieces
    slot = tl.where(is_piece, tl.program_id(0) // tl.maximum(n_sink, 1), slot)
    i = slot
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    n_rows = q_len
    n_keys = kv_len
    seq = batch
    if cu_seqlens_q is not None:
        if is_piece:
            seq, i = find_sequence(slot, cu_seqlens_q, n_seqs, chunk // 2, 0)
        else:
            seq, i = find_sequence(slot, cu_seqlens_k, n_seqs, BLOCK_KV, 1)
    q_start, kv_start, q_len, kv_len, offset = extent(
        seq, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k
    )
    row_first = tl.where(is_piece, i * chunk, 0)
    kv0 = tl.where(is_piece, tl.program_id(0) % tl.maximum(n_sink, 1), i) * BLOCK_KV
    if (row_first >= q_len) | (kv0 >= kv_len):
        return
    head0 = kv_head * group_size
    s_max, w_max = group_range(sink, window, head0, group_size)
    in_sink = kv0 < s_max
    is_cut = in_sink & (kv0 < n_sink * BLOCK_KV) & (q_len > chunk)
    if is_piece != is_cut:
        return
    row_lo = tl.maximum(kv0 - offset, row_first)
    row_hi = tl.where(in_sink, q_len, kv0 + BLOCK_KV - 1 + w_max - offset)
    row_hi = tl.where(in_sink | (w_max > 0), tl.minimum(row_hi, q_len), row_lo)
    row_hi = tl.where(is_piece, tl.minimum(row_hi, row_first + chunk), row_hi)
    # from here on places in the pack
    row_lo += q_start
    row_hi += q_start
    offset -= q_start

    # offsets from the tile's first key, so that storing needs none of the registers of loading
    i_kv = tl.arange(0, BLOCK_KV)
    kv = kv0 + i_kv  # [BLOCK_KV]
    valid = i_kv < kv_len - kv0
    i_kv = tl.minimum(i_kv, kv_len - kv0 - 1).to(tl.int64)
    at = (kv_start + kv0).to(tl.int64)
    batch64 = batch.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)
    q_ptr += batch64 * stride_qb
    k_ptr += batch64 * stride_kb + kv_head64 * stride_kh + at * stride_kn
    v_ptr += batch64 * stride_vb + kv_head64 * stride_vh + at * stride_vn
    k = load_rows(k_ptr, i_kv * stride_kn, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
    v = load_rows(v_ptr, i_kv * stride_vn, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
    dk = tl.zeros([BLOCK_KV, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_KV, BLOCK_DV], tl.float32)
    at += (batch64 * n_kv_heads + kv_head) * n_keys

    # heads and row tiles are one loop, so that loads are prefetched from one head to the next
    per_head = tl.maximum(row_hi - row_lo + BLOCK_Q - 1, 0) // BLOCK_Q
    step = tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    head = head0
    row0 = row_lo
    for _ in tl.range(0, per_head * group_size, disable_licm=True):
        s = tl.load(sink + head)
        w = tl.load(window + head)
        head64 = head.to(tl.int64)
        # rows past the end are the last one again, and masked
        at_q = tl.minimum(row0 + step, row_hi - 1).to(tl.int64)
        dense = (batch64 * n_heads + head64) * n_rows
        q = load_rows(
            q_ptr + head64 * stride_qh, at_q * stride_qn, HEAD_DIM, BLOCK_D
        )  # [BLOCK_Q, HEAD_DIM]
        p_lo = row0 + offset
        at_end, at_start = cuts(kv0, kv0 + BLOCK_KV, FAR, p_lo, p_lo + BLOCK_Q - 1, s, w)
        kq = dot(k, tl.trans(q))  # [BLOCK_KV, BLOCK_Q]
        # one load: of a tensor with fewer elements than threads, each would load all that it needs
        at_stats = tl.arange(0, 2)[:, None] + 2 * (dense + at_q)[None, :]
        lse, delta = tl.split(tl.trans(tl.load(stats_ptr + at_stats)))
        probs, tanh = weights(kq, lse[None, :], qk_scale, cap, SOFTCAP)
        if at_end | at_start | (row0 + BLOCK_Q > row_hi):
            first = kv - p_lo  # the first row that sees a key, and the last, relative
            last = tl.where(kv < s, FAR, first + tl.minimum(w, FAR) - 1)
            last = tl.minimum(last, row_hi - row0 - 1)
            kept = (step[None, :] >= first[:, None]) & (step[None, :] <= last[:, None])
            probs = tl.where(kept, probs, 0.0)
        dout = load_rows(dout_ptr + dense * V_DIM, at_q * V_DIM, V_DIM, BLOCK_DV)
        dv = dot(probs.to(dout.dtype), dout, dv)
        dscores = score_gradient(probs, tanh, dot(v, tl.trans(dout)), delta[None, :], SOFTCAP)
        dk = dot(dscores.to(q.dtype), q, dk)
        row0 += BLOCK_Q
        is_last = row0 >= row_hi
        head += is_last.to(tl.int32)
        row0 = tl.where(is_last, row_lo, row0)

    if is_piece:
        at = part_of(batch * n_chunks + slot, kv_head, kv0, n_kv_heads, n_sink, BLOCK_KV)
        store_rows(dk_part + at * HEAD_DIM, i_kv * HEAD_DIM, valid, dk, HEAD_DIM, BLOCK_D)
        store_rows(dv_part + at * V_DIM, i_kv * V_DIM, valid, dv, V_DIM, BLOCK_DV)
    else:
        store_rows(dk_ptr + at * HEAD_DIM, i_kv * HEAD_DIM, valid, dk * scale, HEAD_DIM, BLOCK_D)
        store_rows(dv_ptr + at * V_DIM, i_kv * V_DIM, valid, dv, V_DIM, BLOCK_DV)


@triton.jit
def part_of(chunk, kv_head, kv0, n_kv_heads, n_sink, BLOCK_KV: tl.constexpr):
    """The row of dk_part and dv_part where a chunk's sum for the tile of keys at kv0 begins."""
    return ((chunk.to(tl.int64) * n_kv_heads + kv_head) * n_sink) * BLOCK_KV + kv0


@triton.jit(do_not_specialize=["n_seqs", "q_len", "kv_len", "n_chunks", "n_sink"])
def streaming_sum_kernel(
    dk_part, dv_part, dk_ptr, dv_ptr, sink, window, cu_seqlens_q, cu_seqlens_k, n_seqs,
    n_kv_heads, group_size, q_len, kv_len, n_chunks, n_sink, chunk, scale,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of BLOCK_SUM keys of a tile whose rows were cut into chunks."""
    batch = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv0 = tl.program_id(2) * BLOCK_SUM
    n_keys = kv_len
    kv_start = 0
    slot = 0
    if cu_seqlens_q is not None:
        seq = batch % n_seqs
        batch = batch // n_seqs
        slot = first_slot(seq, cu_seqlens_q, True, chunk // 2, 0)
        _, kv_start, q_len, kv_len, _ = extent(seq, q_len, kv_len, None, cu_seqlens_q, cu_seqlens_k)
    s_max, _ = group_range(sink, window, kv_head * group_size, group_size)
    if (kv0 >= kv_len) | (kv0 // BLOCK_KV * BLOCK_KV >= s_max) | (q_len <= chunk):
        return
    part = part_of(batch * n_chunks + slot, kv_head, kv0, n_kv_heads, n_sink, BLOCK_KV)
    part_size = n_sink.to(tl.int64) * n_kv_heads * BLOCK_KV
    n_parts = (q_len + chunk - 1) // chunk
    i_kv = tl.arange(0, BLOCK_SUM)
    valid = i_kv < kv_len - kv0
    i_kv = tl.minimum(i_kv, kv_len - kv0 - 1).to(tl.int64)
    dk = tl.zeros([BLOCK_SUM, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_SUM, BLOCK_DV], tl.float32)
    # one loop for both: its time is that of waiting for loads
    for _ in range(n_parts):
        dk += load_rows(dk_part + part * HEAD_DIM, i_kv * HEAD_DIM, HEAD_DIM, BLOCK_D)
        dv += load_rows(dv_part + part * V_DIM, i_kv * V_DIM, V_DIM, BLOCK_DV)
        part += part_size
    at = (batch.to(tl.int64) * n_kv_heads + kv_head) * n_keys + kv_start + kv0
    store_rows(dk_ptr + at * HEAD_DIM, i_kv * HEAD_DIM, valid, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + at * V_DIM, i_kv * V_DIM, valid, dv, V_DIM, BLOCK_DV)
