"""Which keys a tile of query rows needs, and which it keeps: `causal & (sink(s) | window(w))`.

With p = q_row + offset, the position of a query row among the keys, a row keeps the keys

    kv_idx <= p  and  (kv_idx < s  or  p - kv_idx < w)

so a tile of query rows needs two runs of keys and nothing between them:

    |0 .. s)  sink tiles          [p_lo - w + 1 .. p_hi]  window tiles
    ####......................########

The runs are one list of tiles of BLOCK_KV keys, so that loads are prefetched across the seam. A
short rest of the sink (4 sinks are common) gets a tile of BLOCK_SINK keys of its own. Where the
runs would meet they are merged into one run from key 0, so no key can be counted twice.
"""

# mypy: ignore-errors
# ruff: noqa: N803 - capitals are the habit for compile-time constants of a kernel

import triton
import triton.language as tl

# stands for "any distance": large, yet far enough from int32's end to add a length to it
FAR = tl.constexpr(1 << 30)


@triton.jit
def first_slot(seq, cu_seqlens, exists, SIZE, SPARE: tl.constexpr):
    """The first of a packed sequence's slots, as `find_sequence` counts them."""
    begin = tl.load(cu_seqlens + seq, mask=exists, other=FAR) - tl.load(cu_seqlens)
    return begin // SIZE + SPARE * seq


@triton.jit
def find_sequence(slot, cu_seqlens, n_seqs, SIZE, SPARE: tl.constexpr):
    """The packed sequence that a slot is for, and the slot's number in it.

    Slots are programs. The device alone knows the lengths, so there are as many as any lengths
    could need, shared out by where sequences begin. With SPARE = 1 that is a slot for every SIZE
    tokens of a sequence; with SPARE = 0 for every 2 * SIZE of one that is longer than those.
    """
    i = tl.arange(0, 1024)
    seq = -1
    for first in range(0, n_seqs, 1024):
        exists = first + i < n_seqs
        begins = exists & (first_slot(first + i, cu_seqlens, exists, SIZE, SPARE) <= slot)
        seq += tl.sum(begins.to(tl.int32))
    return seq, slot - first_slot(seq, cu_seqlens, seq >= 0, SIZE, SPARE)


@triton.jit
def extent(seq, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k):
    """Where a sequence's queries and keys start, how many there are, and its first position."""
    q_start = 0
    kv_start = 0
    if cu_seqlens_q is not None:
        q_start = tl.load(cu_seqlens_q + seq)
        kv_start = tl.load(cu_seqlens_k + seq)
        q_len = tl.load(cu_seqlens_q + seq + 1) - q_start
        kv_len = tl.load(cu_seqlens_k + seq + 1) - kv_start
    offset = kv_len - q_len
    if q_offset is not None:
        offset = tl.load(q_offset + seq)
    return q_start, kv_start, q_len, kv_len, offset


@triton.jit
def locate_rows(
    tile, batch, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k, n_seqs, BLOCK: tl.constexpr
):
    """The first row of tile number `tile`, and what `extent` says of its sequence."""
    seq = batch
    if cu_seqlens_q is not None:
        seq, tile = find_sequence(tile, cu_seqlens_q, n_seqs, BLOCK, 1)
    q_start, kv_start, q_len, kv_len, offset = extent(
        seq, q_len, kv_len, q_offset, cu_seqlens_q, cu_seqlens_k
    )
    return tile * BLOCK, q_start, kv_start, q_len, kv_len, offset


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
    s_min, s_max = tl.minimum(s_min, kv_len), tl.minimum(s_max, kv_len)
    return s_min, s_max, tl.minimum(w_min, FAR), tl.minimum(w_max, FAR)


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
def cuts(start, end, limit, p_lo, p_hi, s_min, w_min):
    """Whether some row of a tile comes before one of its keys, and whether some left one behind."""
    at_end = (end > limit) | (end - 1 > p_lo)
    at_start = (end > s_min) & (p_hi - start >= w_min)
    return at_end, at_start


@triton.jit
def keep_keys(x, otherwise, mask, cut, start, limit, BLOCK_KV: tl.constexpr):
    """Write `otherwise` into x [ROWS, BLOCK_KV] where a row does not keep a key of the tile.

    `limit` ends the run that the tile belongs to. Most tiles that are cut are cut on one side.
    """
    p, s, w = mask
    at_end, at_start = cut
    # all relative to the tile: columns are constants then, not positions with a register each
    column = tl.arange(0, BLOCK_KV)[None, :]
    if at_end:
        last = (tl.minimum(p, limit - 1) - start)[:, None]
        x = tl.where(column <= last, x, otherwise)
    if at_start:
        before_window = (p - w - start)[:, None]
        x = tl.where((column < (s - start)[:, None]) | (column > before_window), x, otherwise)
    return x
