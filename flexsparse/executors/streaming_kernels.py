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
def query_rows(
    row0, q_len, offset, sink, window, head0, kv_len,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows of PACK heads: head and row of each [ROWS], `mask` and `walk` of walk_keys."""
    r = tl.arange(0, PACK * BLOCK_Q)
    head = head0 + r // BLOCK_Q  # [ROWS]
    row = row0 + r % BLOCK_Q
    s_min, s_max, w_min, w_max = head_range(sink, window, head0, kv_len, PACK)
    p_lo = row0 + offset
    p_hi = tl.minimum(row0 + BLOCK_Q, q_len) - 1 + offset
    mask = (row + offset, tl.load(sink + head), tl.load(window + head))
    walk = schedule(p_lo, p_hi, s_max, w_max, kv_len, BLOCK_KV, BLOCK_SINK)
    return head, row, mask, (p_lo, p_hi, s_min, w_min), walk


@triton.jit
def walk_keys(
    step: tl.constexpr, state, rows, mask, bounds, walk, k_ptr, v_ptr, kv_start,
    stride_kn, stride_vn, qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_SINK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`state` after a step over each tile of a schedule; `rows` is what the step knows of rows."""
    n_sink, n_tiles, win_lo, sink_hi, kv_hi, rest = walk
    p_lo, p_hi, s_min, w_min = bounds
    if rest > 0:
        kv = sink_hi - rest + tl.arange(0, BLOCK_SINK)
        at = (kv_start + kv).to(tl.int64)
        state = step(
            state, rows, mask, k_ptr, v_ptr, at * stride_kn, at * stride_vn, kv, sink_hi, True,
            qk_scale, cap, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, SOFTCAP,
        )  # fmt: skip
    for i in range(n_tiles):
        start, limit = key_tile(i, n_sink, win_lo, sink_hi, kv_hi, BLOCK_KV)
        kv = start + tl.arange(0, BLOCK_KV)  # [BLOCK_KV]
        at = (kv_start + kv).to(tl.int64)
        masked = needs_mask(start, start + BLOCK_KV, limit, p_lo, p_hi, s_min, w_min)
        state = step(
            state, rows, mask, k_ptr, v_ptr, at * stride_kn, at * stride_vn, kv, limit, masked,
            qk_scale, cap, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, SOFTCAP,
        )  # fmt: skip
    return state


@triton.jit
def forward_tile(
    state, q, mask, k_ptr, v_ptr, k_offset, v_offset, kv, limit, masked, qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys `kv`."""
    m, norm, acc = state
    p, s, w = mask
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
    out = acc / tl.where(empty, 1.0, norm)[:, None]
    return out, tl.where(empty, float("-inf"), (m + tl.log2(norm)) * LN2)


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
    state = walk_keys(
        forward_tile, no_keys_yet(PACK * BLOCK_Q, BLOCK_DV), q, mask, bounds, walk,
        k_ptr, v_ptr, kv_start, stride_kn, stride_vn, qk_scale, cap,
        HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_KV, BLOCK_SINK, SOFTCAP,
    )  # fmt: skip
    out, lse = out_and_lse(state)
    at += (batch * n_heads + head).to(tl.int64) * n_rows  # out and lse are contiguous
    store_rows(out_ptr, at * V_DIM, valid, out, V_DIM, BLOCK_DV)
    tl.store(lse_ptr + at, lse, mask=valid)
