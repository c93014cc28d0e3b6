"""Triton kernels for heads of the form `causal & (sink(s) | window(w))`, forward and backward.

With p = q_row + offset, the position of a query row among the keys, a row keeps the keys

    kv_idx <= p  and  (kv_idx < s  or  p - kv_idx < w)

so a tile of query rows needs two runs of keys and nothing between them:

    |0 .. s)  sink tiles          [p_lo - w + 1 .. p_hi]  window tiles
    ####......................########

The runs are walked as one list of tiles of BLOCK_KV keys, so that loads are prefetched across the
seam. A short rest of the sink (4 sinks are common) gets a tile of BLOCK_SINK keys of its own. Where
the runs would meet they are merged into one run from key 0, so no key can be counted twice.

Numbers of the mask are read from tensors, one per query head: a new size compiles nothing. Heads
that share a kv head are packed into one program (PACK of them), which reads each key once for all.
Addresses are int64: 1M tokens x 32 heads x 128 does not fit int32.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806 - capitals are the habit for compile-time constants of a kernel

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# stands for "any distance": large, yet far enough from int32's end to add a length to it
FAR = tl.constexpr(1 << 30)
# the running maximum starts here and not at -inf, so that a masked score never gives inf - inf
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def locate(
    tile, batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, tiles, BLOCK: tl.constexpr
):
    """Where tile number `tile` lies: sequence, first row or key, and the sequence's extent."""
    q_start = 0
    kv_start = 0
    seq = batch
    first = tile * BLOCK
    if cu_seqlens_q is not None:
        seq = tl.load(tiles + 2 * tile)
        first = tl.load(tiles + 2 * tile + 1)
        q_start = tl.load(cu_seqlens_q + seq)
        kv_start = tl.load(cu_seqlens_k + seq)
        q_len = tl.load(cu_seqlens_q + seq + 1) - q_start
        kv_len = tl.load(cu_seqlens_k + seq + 1) - kv_start
    offset = kv_len - q_len
    if q_offset is not None:
        offset = tl.load(q_offset + seq)
    return seq, first, q_start, kv_start, q_len, kv_len, offset


@triton.jit
def load_rows(ptr, offset, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix, 0 where not valid; BLOCK_D is DIM rounded up to a power of two."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if DIM != BLOCK_D:
        mask = mask & (d < DIM)[None, :]
    return tl.load(ptr + offset[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offset, valid, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of load_rows."""
    d = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if DIM != BLOCK_D:
        mask = mask & (d < DIM)[None, :]
    tl.store(ptr + offset[:, None] + d[None, :], rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc=None):
    """Matrix product in float32; float32 inputs are not rounded to tf32, they are for tests."""
    PRECISION: tl.constexpr = "ieee" if a.dtype == tl.float32 else "tf32"
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cap_scores(qk, qk_scale, cap, SOFTCAP: tl.constexpr):
    """Scores in base 2, and tanh of the soft-cap (the scores again where there is none)."""
    x = qk * qk_scale
    if SOFTCAP:
        x = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))  # tanh, exact at both ends
        return x * (cap * LOG2E), x
    return x, x


@triton.jit
def keep(kv, p, s, w, limit):
    """The mask. `limit` ends the run of keys that the tile belongs to."""
    return (kv <= p) & ((kv < s) | (p - kv < w)) & (kv < limit)


@triton.jit
def head_range(sink, window, head0, kv_len, COUNT: tl.constexpr):
    """Smallest and largest sink and window of COUNT heads, clipped so that sums stay in int32."""
    s_min = tl.load(sink + head0)
    w_min = tl.load(window + head0)
    s_max = s_min
    w_max = w_min
    for i in tl.static_range(1, COUNT):
        s = tl.load(sink + head0 + i)
        w = tl.load(window + head0 + i)
        s_min, s_max = tl.minimum(s_min, s), tl.maximum(s_max, s)
        w_min, w_max = tl.minimum(w_min, w), tl.maximum(w_max, w)
    return s_min, tl.minimum(s_max, kv_len), tl.minimum(w_min, FAR), tl.minimum(w_max, FAR)


@triton.jit
def schedule(p_lo, p_hi, s_max, w_max, kv_len, BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr):
    """The key tiles that rows at positions p_lo..p_hi need.

    Returns (n_sink, n_tiles, win_lo, sink_hi, kv_hi, rest): tile i < n_sink starts at
    i * BLOCK_KV and ends before sink_hi; a later one starts at win_lo + (i - n_sink) * BLOCK_KV
    and ends before kv_hi; `rest` keys before sink_hi are left for a tile of BLOCK_SINK keys.
    """
    kv_hi = tl.maximum(tl.minimum(p_hi + 1, kv_len), 0)
    sink_hi = tl.maximum(tl.minimum(s_max, kv_hi), 0)
    win_lo = tl.minimum(tl.maximum(p_lo - w_max + 1, 0), kv_hi)
    win_lo = tl.where(w_max > 0, win_lo, kv_hi)
    rest = sink_hi % BLOCK_KV
    rest = tl.where(rest <= BLOCK_SINK, rest, 0)
    n_sink = (sink_hi - rest + BLOCK_KV - 1) // BLOCK_KV
    n_window = (kv_hi - win_lo + BLOCK_KV - 1) // BLOCK_KV
    n_all = (kv_hi + BLOCK_KV - 1) // BLOCK_KV
    # one run from key 0 when the runs touch, or when it is no more work
    merged = (win_lo < sink_hi) | (n_all <= n_sink + n_window)
    n_sink = tl.where(merged, 0, n_sink)
    n_tiles = tl.where(merged, n_all, n_sink + n_window)
    return (
        n_sink,
        n_tiles,
        tl.where(merged, 0, win_lo),
        sink_hi,
        kv_hi,
        tl.where(merged, 0, rest),
    )


@triton.jit
def key_tile(i, n_sink, win_lo, sink_hi, kv_hi, BLOCK_KV: tl.constexpr):
    """First key of tile i of a schedule, and the end of its run."""
    is_sink = i < n_sink
    start = tl.where(is_sink, i * BLOCK_KV, win_lo + (i - n_sink) * BLOCK_KV)
    return start, tl.where(is_sink, sink_hi, kv_hi)


@triton.jit
def needs_mask(start, end, limit, p_lo, p_hi, s_min, w_min):
    """False where every row of the tile keeps every one of its keys."""
    full = (end <= limit) & (end - 1 <= p_lo) & ((end <= s_min) | (p_hi - start < w_min))
    return full == 0


@triton.jit
def forward_tile(
    q, k_ptr, v_ptr, k_offset, v_offset, kv, limit, masked, p, s, w, m, norm, acc, qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys `kv`."""
    valid = kv < limit
    k = load_rows(k_ptr, k_offset, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
    scores, _ = cap_scores(dot(q, tl.trans(k)), qk_scale, cap, SOFTCAP)  # [ROWS, BLOCK_KV]
    if masked:
        seen = keep(kv[None, :], p[:, None], s[:, None], w[:, None], limit)
        scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    probs = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    norm = norm * alpha + tl.sum(probs, 1)
    v = load_rows(v_ptr, v_offset, valid, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
    acc = dot(probs.to(v.dtype), v, acc * alpha[:, None])
    return m_new, norm, acc


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def streaming_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sink, window,
    q_offset, cu_seqlens_q, cu_seqlens_k, tiles,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    n_heads, group_size, q_len, kv_len, qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr,
    PACK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write out and lse of BLOCK_Q query rows of PACK heads that share a kv head."""
    head0 = tl.program_id(1) * PACK
    batch = tl.program_id(2)
    n_rows = q_len
    _, row0, q_start, kv_start, q_len, kv_len, offset = locate(
        tl.program_id(0), batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, tiles, BLOCK_Q
    )
    if row0 >= q_len:
        return
    r = tl.arange(0, PACK * BLOCK_Q)
    head = head0 + r // BLOCK_Q  # [ROWS]
    row = row0 + r % BLOCK_Q
    valid = row < q_len
    p = row + offset
    s = tl.load(sink + head)
    w = tl.load(window + head)
    p_lo = row0 + offset
    p_hi = tl.minimum(row0 + BLOCK_Q, q_len) - 1 + offset
    s_min, s_max, w_min, w_max = head_range(sink, window, head0, kv_len, PACK)
    n_sink, n_tiles, win_lo, sink_hi, kv_hi, rest = schedule(
        p_lo, p_hi, s_max, w_max, kv_len, BLOCK_KV, BLOCK_SINK
    )

    at = (q_start + row).to(tl.int64)
    kv_head = (head0 // group_size).to(tl.int64)
    q_ptr += batch.to(tl.int64) * stride_qb
    k_ptr += batch.to(tl.int64) * stride_kb + kv_head * stride_kh
    v_ptr += batch.to(tl.int64) * stride_vb + kv_head * stride_vh
    q = load_rows(
        q_ptr, head.to(tl.int64) * stride_qh + at * stride_qn, valid, HEAD_DIM, BLOCK_D
    )  # [ROWS, HEAD_DIM]
    m = tl.full([PACK * BLOCK_Q], LOWEST, tl.float32)
    norm = tl.zeros([PACK * BLOCK_Q], tl.float32)
    acc = tl.zeros([PACK * BLOCK_Q, BLOCK_DV], tl.float32)

    if rest > 0:
        kv = sink_hi - rest + tl.arange(0, BLOCK_SINK)
        at_kv = (kv_start + kv).to(tl.int64)
        m, norm, acc = forward_tile(
            q, k_ptr, v_ptr, at_kv * stride_kn, at_kv * stride_vn, kv, sink_hi, True, p, s, w,
            m, norm, acc, qk_scale, cap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, SOFTCAP,
        )  # fmt: skip
    for i in range(n_tiles):
        start, limit = key_tile(i, n_sink, win_lo, sink_hi, kv_hi, BLOCK_KV)
        kv = start + tl.arange(0, BLOCK_KV)  # [BLOCK_KV]
        at_kv = (kv_start + kv).to(tl.int64)
        masked = needs_mask(start, start + BLOCK_KV, limit, p_lo, p_hi, s_min, w_min)
        m, norm, acc = forward_tile(
            q, k_ptr, v_ptr, at_kv * stride_kn, at_kv * stride_vn, kv, limit, masked, p, s, w,
            m, norm, acc, qk_scale, cap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, SOFTCAP,
        )  # fmt: skip

    empty = norm == 0.0
    acc = acc / tl.where(empty, 1.0, norm)[:, None]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(norm)) * LN2)
    at += (batch * n_heads + head).to(tl.int64) * n_rows  # out and lse are contiguous
    store_rows(out_ptr, at * V_DIM, valid, acc, V_DIM, BLOCK_DV)
    tl.store(lse_ptr + at, lse, mask=valid)


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
def dq_tile(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_offset, v_offset, kv, limit, masked, p, s, w,
    qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The rows' dq, with the keys `kv` added (still without the softmax scale)."""
    valid = kv < limit
    k = load_rows(k_ptr, k_offset, valid, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
    scores, tanh = cap_scores(dot(q, tl.trans(k)), qk_scale, cap, SOFTCAP)  # [ROWS, BLOCK_KV]
    probs = tl.exp2(scores - lse[:, None])
    if masked:
        seen = keep(kv[None, :], p[:, None], s[:, None], w[:, None], limit)
        probs = tl.where(seen, probs, 0.0)
    v = load_rows(v_ptr, v_offset, valid, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
    dscores = probs * (dot(dout, tl.trans(v)) - delta[:, None])
    if SOFTCAP:
        dscores *= 1.0 - tanh * tanh
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
    r = tl.arange(0, PACK * BLOCK_Q)
    head = head0 + r // BLOCK_Q  # [ROWS]
    row = row0 + r % BLOCK_Q
    valid = row < q_len
    p = row + offset
    s = tl.load(sink + head)
    w = tl.load(window + head)
    p_lo = row0 + offset
    p_hi = tl.minimum(row0 + BLOCK_Q, q_len) - 1 + offset
    s_min, s_max, w_min, w_max = head_range(sink, window, head0, kv_len, PACK)
    n_sink, n_tiles, win_lo, sink_hi, kv_hi, rest = schedule(
        p_lo, p_hi, s_max, w_max, kv_len, BLOCK_KV, BLOCK_SINK
    )

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
    lse = tl.load(lse_ptr + at, mask=valid, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # an empty row: every weight is 0
    dq = tl.zeros([PACK * BLOCK_Q, BLOCK_D], tl.float32)

    if rest > 0:
        kv = sink_hi - rest + tl.arange(0, BLOCK_SINK)
        at_kv = (kv_start + kv).to(tl.int64)
        dq = dq_tile(
            dq, q, dout, lse, delta, k_ptr, v_ptr, at_kv * stride_kn, at_kv * stride_vn, kv,
            sink_hi, True, p, s, w, qk_scale, cap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, SOFTCAP,
        )  # fmt: skip
    for i in range(n_tiles):
        start, limit = key_tile(i, n_sink, win_lo, sink_hi, kv_hi, BLOCK_KV)
        kv = start + tl.arange(0, BLOCK_KV)  # [BLOCK_KV]
        at_kv = (kv_start + kv).to(tl.int64)
        masked = needs_mask(start, start + BLOCK_KV, limit, p_lo, p_hi, s_min, w_min)
        dq = dq_tile(
            dq, q, dout, lse, delta, k_ptr, v_ptr, at_kv * stride_kn, at_kv * stride_vn, kv,
            limit, masked, p, s, w, qk_scale, cap,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, SOFTCAP,
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
        # a row past the end, or an empty one, has lse = inf here: its weights are all 0
        lse = tl.load(lse_ptr + dense + at_q, mask=seen, other=float("inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        scores, tanh = cap_scores(dot(k, tl.trans(q)), qk_scale, cap, SOFTCAP)
        probs = tl.exp2(scores - lse[None, :])  # [BLOCK_KV, BLOCK_Q]
        p_lo = row0 + offset
        if needs_mask(kv0, kv0 + BLOCK_KV, FAR, p_lo, p_lo + BLOCK_Q - 1, s, w):
            probs = tl.where(keep(kv[:, None], p_lo + step[None, :], s, w, kv_len), probs, 0.0)
        dout = load_rows(dout_ptr + dense * V_DIM, at_q * V_DIM, seen, V_DIM, BLOCK_DV)
        dv = dot(probs.to(dout.dtype), dout, dv)
        delta = tl.load(delta_ptr + dense + at_q, mask=seen, other=0.0)
        dscores = probs * (dot(v, tl.trans(dout)) - delta[None, :])
        if SOFTCAP:
            dscores *= 1.0 - tanh * tanh
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
