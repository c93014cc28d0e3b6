"""The walk of query rows over their key tiles, whatever is done with them: the forward and dq.

A program may take two tiles of rows, HALVES that follow each other. Most of their keys are the
same, are read once, and stay in shared memory for both; the others are seen by one half alone:

    lower half  ####    ################
    upper half  ####        ################
                sink    |1 |   both     | 1|

Heads that share a kv head are packed into one program (PACK of them), which reads each key once for
all. Addresses are int64: 1M tokens x 32 heads x 128 does not fit int32. The strides of keys and
values are constants, or computing addresses would take an eighth of the instructions.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806 - capitals are the habit for compile-time constants of a kernel

import triton
import triton.language as tl

from flexsparse.executors.streaming_schedule import (
    cuts,
    halve,
    key_tile,
    row_mask,
    schedule,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, offset, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix, all of which exist; BLOCK_D is DIM rounded up to a power of two.

    Where a tile has more rows than there are, the caller asks for the last one again: a mask for
    each row would take more instructions than its address.
    """
    d = tl.arange(0, BLOCK_D)
    at = (ptr + d)[None, :] + offset[:, None]
    if DIM == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, offset, valid, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of load_rows, of those rows that are valid."""
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
def starts(
    q_ptr, k_ptr, v_ptr, batch, head, row, group_size,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_vb, stride_vh,
):  # fmt: skip
    """Pointers to a row of q and to the keys and values of its head."""
    kv_head = (head // group_size).to(tl.int64)
    batch = batch.to(tl.int64)
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qn
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    return q_ptr, k_ptr, v_ptr


@triton.jit
def dense_row(batch, head, row, n_heads, n_rows):
    """The number of a row among those of a contiguous [batch, n_heads, n_rows]."""
    return (batch.to(tl.int64) * n_heads + head) * n_rows + row


@triton.jit
def rows_exist(half, n_left, BLOCK_Q: tl.constexpr, PACK: tl.constexpr):
    """Which rows of a half come before the end of the sequence [ROWS]."""
    return half * BLOCK_Q + tl.arange(0, PACK * BLOCK_Q) % BLOCK_Q < n_left


@triton.jit
def row_offsets(half, last, stride_h, stride_n, BLOCK_Q: tl.constexpr, PACK: tl.constexpr):
    """Where the rows of a half lie [ROWS], from the program's first row of its first head.

    Rows past `last` are that one again, so that all can be loaded; None where they are stored.
    """
    r = tl.arange(0, PACK * BLOCK_Q)
    row = half * BLOCK_Q + r % BLOCK_Q
    if last is not None:
        row = tl.minimum(row, last)
    return (r // BLOCK_Q).to(tl.int64) * stride_h + row.to(tl.int64) * stride_n


@triton.jit
def load_tile(keys, start, limit, LAYOUT: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Keys and values from `start` on; from `limit` on the last one again, so that all exist."""
    k_ptr, v_ptr = keys
    STRIDE_KN: tl.constexpr = LAYOUT[0]
    STRIDE_VN: tl.constexpr = LAYOUT[1]
    HEAD_DIM: tl.constexpr = LAYOUT[2]
    V_DIM: tl.constexpr = LAYOUT[3]
    BLOCK_D: tl.constexpr = LAYOUT[4]
    BLOCK_DV: tl.constexpr = LAYOUT[5]
    kv = tl.minimum(start + tl.arange(0, BLOCK_KV), limit - 1).to(tl.int64)  # [BLOCK_KV]
    k = load_rows(k_ptr, kv * STRIDE_KN, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
    v = load_rows(v_ptr, kv * STRIDE_VN, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
    return k, v


@triton.jit
def step_each(
    step: tl.constexpr, states, rows, mask, bounds, k, v, start, limit, qk_scale, cap,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A step of each half over the same keys; `mask` and `bounds` are the first one's."""
    p, s, w = mask
    p_lo, s_min, w_min = bounds
    end = start + BLOCK_KV
    cut = cuts(start, end, limit, p_lo, p_lo + BLOCK_Q - 1, s_min, w_min)
    first = step(
        states[0], rows[0], mask, k, v, start, limit, cut, qk_scale, cap, BLOCK_KV, SOFTCAP
    )
    if len(states) == 1:
        return (first,)
    else:
        p_lo += BLOCK_Q
        mask = (p + BLOCK_Q, s, w)
        cut = cuts(start, end, limit, p_lo, p_lo + BLOCK_Q - 1, s_min, w_min)
        second = step(
            states[1], rows[1], mask, k, v, start, limit, cut, qk_scale, cap, BLOCK_KV, SOFTCAP
        )
        return first, second


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
    step: tl.constexpr, states, rows, row0, q_len, offset, sink, window, ranges, head0, kv_len,
    keys, qk_scale, cap, LAYOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_SINK: tl.constexpr, PACK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`states`, one for each half of the rows, after a step over every key tile they need.

    `ranges` is the head_range of the program's heads.
    """
    s_min, s_max, w_min, w_max = ranges
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
        step, states, rows, mask, bounds, run, keys, qk_scale, cap,
        LAYOUT, BLOCK_Q, BLOCK_SINK, SOFTCAP,
    )  # fmt: skip
    if len(states) == 1:
        run = (n_sink, n_tiles, win_lo, sink_hi, kv_hi)
        return walk_run(
            step, states, rows, mask, bounds, run, keys, qk_scale, cap,
            LAYOUT, BLOCK_Q, BLOCK_KV, SOFTCAP,
        )  # fmt: skip
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
