"""Triton kernels for heads of the form `causal & (sink(s) | window(w))`, forward and backward.

With p = q_row + offset, the position of a query row among the keys, a row keeps the keys

    kv_idx <= p  and  (kv_idx < s  or  p - kv_idx < w)

so a tile of query rows needs two runs of keys and nothing between them:

    |0 .. s)  sink tiles          [p_lo - w + 1 .. p_hi]  window tiles
    ####......................########

The runs are walked as one list of tiles of BLOCK_KV keys, so that loads are prefetched across the
seam. A short rest of the sink (4 sinks are common) gets a tile of BLOCK_SINK keys of its own. Where
the runs would meet they are merged into one run from key 0, so no key can be counted twice.

A program may take two such tiles of rows, HALVES that follow each other. Most of their keys are the
same, are read once, and stay in shared memory for both; the others are seen by one half alone:

    lower half  ####    ################
    upper half  ####        ################
                sink    |1 |   both     | 1|

Numbers of the mask are read from tensors, one per query head: a new size compiles nothing. Heads
that share a kv head are packed into one program (PACK of them), which reads each key once for all.
Addresses are int64: 1M tokens x 32 heads x 128 does not fit int32. The strides of keys and values
are constants, or computing addresses would take an eighth of the instructions.
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
def keep_keys(mask, start, limit, BLOCK_KV: tl.constexpr):
    """The mask of a tile of keys [ROWS, BLOCK_KV]; `limit` ends the run that it belongs to."""
    p, s, w = mask
    # all relative to the tile: columns are constants then, not positions with a register each
    column = tl.arange(0, BLOCK_KV)[None, :]
    last = (tl.minimum(p, limit - 1) - start)[:, None]
    before_window = (p - w - start)[:, None]
    return (column <= last) & ((column < (s - start)[:, None]) | (column > before_window))


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
def halve(walk, p_mid, w_max, BLOCK_KV: tl.constexpr):
    """Cut a schedule for rows before p_mid, the lower half, and rows from p_mid on, the upper.

    Returns (n_lower, n_seen): the first n_lower window tiles are the lower half's alone, and tiles
    n_seen and later the upper half's.
    """
    n_sink, n_tiles, win_lo, _, kv_hi, _ = walk
    seen = tl.maximum(tl.minimum(p_mid, kv_hi) - win_lo, 0)
    n_seen = tl.minimum(n_sink + (seen + BLOCK_KV - 1) // BLOCK_KV, n_tiles)
    n_lower = tl.maximum(p_mid - w_max + 1 - win_lo, 0) // BLOCK_KV
    # a run from key 0 holds the sink
    n_lower = tl.where(win_lo > 0, tl.minimum(n_lower, n_seen - n_sink), 0)
    return n_lower, n_seen


@triton.jit
def row_offsets(half, stride_h, stride_n, BLOCK_Q: tl.constexpr, PACK: tl.constexpr):
    """Where the rows of a half lie [ROWS], from the program's first row of its first head."""
    r = tl.arange(0, PACK * BLOCK_Q)
    row = half * BLOCK_Q + r % BLOCK_Q
    return (r // BLOCK_Q).to(tl.int64) * stride_h + row.to(tl.int64) * stride_n


@triton.jit
def rows_exist(half, n_left, BLOCK_Q: tl.constexpr, PACK: tl.constexpr):
    """Which rows of a half come before the end of the sequence [ROWS]."""
    return half * BLOCK_Q + tl.arange(0, PACK * BLOCK_Q) % BLOCK_Q < n_left


@triton.jit
def load_half(
    ptr, half, n_left, stride_h, stride_n, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The rows of a half [ROWS, DIM]."""
    at = row_offsets(half, stride_h, stride_n, BLOCK_Q, PACK)
    return load_rows(ptr, at, rows_exist(half, n_left, BLOCK_Q, PACK), DIM, BLOCK_D)


@triton.jit
def row_mask(p_lo, sink, window, head0, s_min, w_min, BLOCK_Q: tl.constexpr, PACK: tl.constexpr):
    """Position, sink and window of each row of the first half [ROWS]."""
    r = tl.arange(0, PACK * BLOCK_Q)
    if PACK == 1:
        s = tl.zeros_like(r) + s_min
        w = tl.zeros_like(r) + w_min
    else:
        s = tl.load(sink + head0 + r // BLOCK_Q)
        w = tl.minimum(tl.load(window + head0 + r // BLOCK_Q), FAR)
    return p_lo + r % BLOCK_Q, s, w


@triton.jit
def step_each(
    step: tl.constexpr, states, rows, mask, bounds, k, v, start, limit, qk_scale, cap,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A step of each half over the same keys; `mask` and `bounds` are the first one's."""
    p, s, w = mask
    p_lo, s_min, w_min = bounds
    end = start + BLOCK_KV
    masked = needs_mask(start, end, limit, p_lo, p_lo + BLOCK_Q - 1, s_min, w_min)
    first = step(
        states[0], rows[0], mask, k, v, start, limit, masked, qk_scale, cap, BLOCK_KV, SOFTCAP
    )
    if len(states) == 1:
        return (first,)
    else:
        p_lo += BLOCK_Q
        mask = (p + BLOCK_Q, s, w)
        masked = needs_mask(start, end, limit, p_lo, p_lo + BLOCK_Q - 1, s_min, w_min)
        second = step(
            states[1], rows[1], mask, k, v, start, limit, masked, qk_scale, cap, BLOCK_KV, SOFTCAP
        )
        return first, second


@triton.jit
def load_tile(keys, start, limit, LAYOUT: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Keys and values from `start` on; 0 from `limit` on."""
    k_ptr, v_ptr, kv_start = keys
    STRIDE_KN: tl.constexpr = LAYOUT[0]
    STRIDE_VN: tl.constexpr = LAYOUT[1]
    HEAD_DIM: tl.constexpr = LAYOUT[2]
    V_DIM: tl.constexpr = LAYOUT[3]
    BLOCK_D: tl.constexpr = LAYOUT[4]
    BLOCK_DV: tl.constexpr = LAYOUT[5]
    kv = start + tl.arange(0, BLOCK_KV)  # [BLOCK_KV]
    at = (kv_start + kv).to(tl.int64)
    k = load_rows(k_ptr, at * STRIDE_KN, kv < limit, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
    v = load_rows(v_ptr, at * STRIDE_VN, kv < limit, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
    return k, v


@triton.jit
def walk_run(
    step: tl.constexpr, states, rows, mask, bounds, run, keys, qk_scale, cap,
    LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`states` after a step over each tile of a run; `rows` is what the step knows of rows."""
    n_sink, n_tiles, win_lo, sink_hi, kv_hi = run
    # with invariants in registers the two halves would not fit
    for i in tl.range(0, n_tiles, disable_licm=True):
        start, limit = key_tile(i, n_sink, win_lo, sink_hi, kv_hi, BLOCK_KV)
        k, v = load_tile(keys, start, limit, LAYOUT, BLOCK_KV)
        states = step_each(
            step, states, rows, mask, bounds, k, v, start, limit, qk_scale, cap,
            BLOCK_Q, BLOCK_KV, SOFTCAP,
        )  # fmt: skip
    return states


@triton.jit
def walk_keys(
    step: tl.constexpr, states, rows, row0, q_len, offset, sink, window, head0, kv_len, keys,
    qk_scale, cap, LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_SINK: tl.constexpr, PACK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`states`, one for each half of the rows, after a step over every key tile they need."""
    s_min, s_max, w_min, w_max = head_range(sink, window, head0, kv_len, PACK)
    p_lo = row0 + offset
    p_hi = tl.minimum(row0 + BLOCK_Q * len(states), q_len) - 1 + offset
    walk = schedule(p_lo, p_hi, s_max, w_max, kv_len, BLOCK_KV, BLOCK_SINK)
    n_sink, n_tiles, win_lo, sink_hi, kv_hi, rest = walk
    p, s, w = row_mask(p_lo, sink, window, head0, s_min, w_min, BLOCK_Q, PACK)
    mask = (p, s, w)
    bounds = (p_lo, s_min, w_min)
    # a loop even if it has one tile: behind an `if`, ptxas serialises the wgmma of the others
    run = (0, (rest + BLOCK_SINK - 1) // BLOCK_SINK, sink_hi - rest, 0, sink_hi)
    states = walk_run(
        step,
        states,
        rows,
        mask,
        bounds,
        run,
        keys,
        qk_scale,
        cap,
        LAYOUT,
        BLOCK_Q,
        BLOCK_SINK,
        SOFTCAP,
    )
    if len(states) == 1:
        run = (n_sink, n_tiles, win_lo, sink_hi, kv_hi)
        return walk_run(
            step,
            states,
            rows,
            mask,
            bounds,
            run,
            keys,
            qk_scale,
            cap,
            LAYOUT,
            BLOCK_Q,
            BLOCK_KV,
            SOFTCAP,
        )
    else:
        n_lower, n_seen = halve(walk, p_lo + BLOCK_Q, w_max, BLOCK_KV)
        run = (0, n_lower, win_lo, 0, kv_hi)
        lower = walk_run(
            step, states[:1], rows[:1], mask, bounds, run, keys, qk_scale, cap,
            LAYOUT, BLOCK_Q, BLOCK_KV, SOFTCAP,
        )  # fmt: skip
        run = (n_sink, n_seen - n_lower, win_lo + n_lower * BLOCK_KV, sink_hi, kv_hi)
        states = walk_run(
            step, lower + states[1:], rows, mask, bounds, run, keys, qk_scale, cap,
            LAYOUT, BLOCK_Q, BLOCK_KV, SOFTCAP,
        )  # fmt: skip
        run = (0, n_tiles - n_seen, win_lo + (n_seen - n_sink) * BLOCK_KV, 0, kv_hi)
        mask = (p + BLOCK_Q, s, w)
        bounds = (p_lo + BLOCK_Q, s_min, w_min)
        upper = walk_run(
            step, states[1:], rows[1:], mask, bounds, run, keys, qk_scale, cap,
            LAYOUT, BLOCK_Q, BLOCK_KV, SOFTCAP,
        )  # fmt: skip
        return states[:1] + upper


@triton.jit
def forward_tile(
    state, q, mask, k, v, start, limit, masked, qk_scale, cap,
    BLOCK_KV: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys of a tile; qk_scale is positive."""
    m, norm, acc = state
    scores = dot(q, tl.trans(k))  # [ROWS, BLOCK_KV]
    if SOFTCAP:
        scores, _ = cap_scores(scores, qk_scale, cap, SOFTCAP)
        qk_scale = 1.0
    if masked:
        scores = tl.where(keep_keys(mask, start, limit, BLOCK_KV), scores, float("-inf"))
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
    state, out_ptr, lse_ptr, half, n_left, n_rows,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Write out and lse of a half's rows; both are contiguous."""
    out, lse = out_and_lse(state)
    exist = rows_exist(half, n_left, BLOCK_Q, PACK)
    at = row_offsets(half, n_rows, 1, BLOCK_Q, PACK)
    store_rows(out_ptr, at * V_DIM, exist, out, V_DIM, BLOCK_DV)
    tl.store(lse_ptr + at, lse, mask=exist)


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def streaming_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sink, window,
    q_offset, cu_seqlens_q, cu_seqlens_k, tiles,
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
    _, row0, q_start, kv_start, q_len, kv_len, offset = locate(
        tl.program_id(0), batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, tiles,
        HALVES * BLOCK_Q,
    )  # fmt: skip
    n_left = q_len - row0
    if n_left <= 0:
        return
    at = (q_start + row0).to(tl.int64)
    batch64, head64, kv_head = batch.to(tl.int64), head0.to(tl.int64), head0 // group_size
    q_ptr += batch64 * stride_qb + head64 * stride_qh + at * stride_qn
    k_ptr += batch64 * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += batch64 * stride_vb + kv_head.to(tl.int64) * stride_vh
    dense = (batch64 * n_heads + head64) * n_rows + at
    out_ptr += dense * V_DIM
    lse_ptr += dense
    rows = ()
    states = ()
    for half in tl.static_range(HALVES):
        q = load_half(q_ptr, half, n_left, stride_qh, stride_qn, HEAD_DIM, BLOCK_D, BLOCK_Q, PACK)
        rows += (q,)
        states += (no_keys_yet(PACK * BLOCK_Q, BLOCK_DV),)
    keys = (k_ptr, v_ptr, kv_start)
    LAYOUT: tl.constexpr = (stride_kn, stride_vn, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV)
    states = walk_keys(
        forward_tile, states, rows, row0, q_len, offset, sink, window, head0, kv_len, keys,
        qk_scale, cap, LAYOUT, BLOCK_Q, BLOCK_KV, BLOCK_SINK, PACK, SOFTCAP,
    )  # fmt: skip
    for half in tl.static_range(HALVES):
        store_out(
            states[half], out_ptr, lse_ptr, half, n_left, n_rows, V_DIM, BLOCK_DV, BLOCK_Q, PACK
        )
