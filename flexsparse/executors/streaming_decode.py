"""Few query rows against many keys: split over the keys, read from pages or from a plain tensor.

With one query row per sequence there is no row of tiles to fill a GPU with, so the key tiles of a
row are dealt to several programs and their results merged by log-sum-exp. All heads of a group and
all rows share one tile of queries: each key is read once. The same kernel, unsplit, serves chunked
prefill from pages. No gradients: nobody trains through a KV cache.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"
# ruff: noqa: N803 - capitals are the habit for compile-time constants of a kernel

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexsparse.executors.eager import is_watched
from flexsparse.executors.streaming_forward import LOWEST, forward_tile, no_keys_yet, out_and_lse
from flexsparse.executors.streaming_schedule import FAR, cuts, key_tile, schedule
from flexsparse.executors.streaming_tiles import (
    cdiv,
    dims,
    launch_options,
    padded,
    score_factors,
    strides,
)
from flexsparse.executors.streaming_walk import load_rows, store_rows

DECODE_ROWS = 64  # up to this many rows (query rows x heads of a group) splitting pays
DECODE_PROGRAMS = 264  # splits are made up to so many: two a multiprocessor of an H200
MIN_SPLIT = 256  # keys: a smaller part costs more to merge than to read
ROWS = (16, 32, 64)


@triton.jit(do_not_specialize=["q_len", "kv_len", "n_splits", "n_pages"])
def streaming_decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sink, window, q_offset, page_table, kv_lens,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    n_heads, group_size, q_len, kv_len, n_splits, n_pages, qk_scale, cap,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write out and lse of BLOCK_ROWS (row, head) pairs over one part of their key tiles.

    Pair r is query row r // group_size of head r % group_size of one kv head's group.
    """
    # only the first axis of a grid can be long
    split = tl.program_id(1)
    n_kv_heads = n_heads // group_size
    n_row_tiles = (q_len * group_size + BLOCK_ROWS - 1) // BLOCK_ROWS
    pair = tl.program_id(0) // n_row_tiles
    batch = pair // n_kv_heads
    kv_head = pair % n_kv_heads
    if kv_lens is not None:
        kv_len = tl.load(kv_lens + batch)
    offset = kv_len - q_len
    if q_offset is not None:
        offset = tl.load(q_offset + batch)
    r0 = tl.program_id(0) % n_row_tiles * BLOCK_ROWS
    r = r0 + tl.arange(0, BLOCK_ROWS)
    row = r // group_size  # [BLOCK_ROWS]
    head = kv_head * group_size + r % group_size
    p = row + offset
    s = tl.load(sink + head)
    w = tl.minimum(tl.load(window + head), FAR)
    s_min, w_min = tl.min(s), tl.min(w)
    s_max, w_max = tl.minimum(tl.max(s), kv_len), tl.max(w)
    p_lo = r0 // group_size + offset
    p_hi = tl.minimum((r0 + BLOCK_ROWS - 1) // group_size, q_len - 1) + offset
    n_sink, n_tiles, win_lo, sink_hi, kv_hi, _ = schedule(
        p_lo, p_hi, s_max, w_max, kv_len, BLOCK_KV, 0
    )

    batch64 = batch.to(tl.int64)
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    q_row = tl.minimum(row, q_len - 1).to(tl.int64)
    q_offsets = batch64 * stride_qb + head.to(tl.int64) * stride_qh + q_row * stride_qn
    q = load_rows(q_ptr, q_offsets, HEAD_DIM, BLOCK_D)  # [BLOCK_ROWS, HEAD_DIM]
    state = no_keys_yet(BLOCK_ROWS, BLOCK_DV)
    per_split = (n_tiles + n_splits - 1) // n_splits
    last = tl.minimum((split + 1) * per_split, n_tiles)
    for i in range(split * per_split, last):
        start, limit = key_tile(i, n_sink, win_lo, sink_hi, kv_hi, BLOCK_KV)
        kv = tl.minimum(start + tl.arange(0, BLOCK_KV), limit - 1)  # [BLOCK_KV]
        if PAGE_SIZE > 0:
            entry = batch64 * n_pages + kv // PAGE_SIZE
            page = tl.load(page_table + entry).to(tl.int64)
            slot = (kv % PAGE_SIZE).to(tl.int64)
            k_offset = page * stride_kb + slot * stride_kn
            v_offset = page * stride_vb + slot * stride_vn
        else:
            k_offset = batch64 * stride_kb + kv.to(tl.int64) * stride_kn
            v_offset = batch64 * stride_vb + kv.to(tl.int64) * stride_vn
        k = load_rows(k_ptr, k_offset, HEAD_DIM, BLOCK_D)  # [BLOCK_KV, HEAD_DIM]
        v = load_rows(v_ptr, v_offset, V_DIM, BLOCK_DV)  # [BLOCK_KV, V_DIM]
        cut = cuts(start, start + BLOCK_KV, limit, p_lo, p_hi, s_min, w_min)
        state = forward_tile(
            state, q, (p, s, w), k, v, start, limit, cut, qk_scale, cap, BLOCK_KV, SOFTCAP
        )

    out, lse = out_and_lse(state)
    n_batch = tl.num_programs(0) // n_row_tiles // n_kv_heads
    at = ((split * n_batch + batch) * n_heads + head).to(tl.int64) * q_len + row
    store_rows(out_ptr, at * V_DIM, row < q_len, out, V_DIM, BLOCK_DV)
    tl.store(lse_ptr + at, lse, mask=row < q_len)


@triton.jit(do_not_specialize=["n_splits", "n_rows"])
def streaming_merge_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, n_splits, n_rows,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One row's parts weighted by exp(lse): parts without a key have lse -inf and weigh nothing."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MAX_SPLITS)
    at = tl.minimum(i, n_splits - 1).to(tl.int64) * n_rows + row  # [MAX_SPLITS]
    part_lse = tl.load(part_lse_ptr + at, mask=i < n_splits, other=float("-inf"))
    top = tl.maximum(tl.max(part_lse), LOWEST)
    weight = tl.exp(part_lse - top)  # [MAX_SPLITS]
    total = tl.sum(weight)
    parts = load_rows(part_ptr, at * V_DIM, V_DIM, BLOCK_DV)  # [MAX_SPLITS, V_DIM]
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    d = tl.arange(0, BLOCK_DV)
    tl.store(out_ptr + row * V_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < V_DIM)
    tl.store(lse_ptr + row, tl.where(total == 0.0, float("-inf"), top + tl.log(total)))


def splits_for(programs: int, max_keys: int) -> int:
    """How many parts to cut each row's keys into: enough programs for the device, none tiny."""
    wanted = cdiv(DECODE_PROGRAMS, programs)
    return int(max(1, min(wanted, cdiv(max_keys, MIN_SPLIT), 64)))


def tile_for(rows: int, widest: int, dtype: torch.dtype) -> tuple[int, int]:
    """Keys in a tile and warps, the largest that spill no registers on sm_80, sm_90 and sm_100."""
    if dtype == torch.float32:
        return 32, 4
    if widest <= 128:
        return (64, 8) if rows == 64 else (64, 4)
    return (32, 8) if rows == 64 else (32, 4)


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    q_offset: Tensor | None,
    page_table: Tensor | None,
    kv_lens: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Launch the decode kernel and, where keys were split, the merge: out, lse."""
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    batch, n_heads, q_len, _ = q.shape
    n_kv_heads = k.shape[1]
    group_size = n_heads // n_kv_heads
    rows = next((n for n in ROWS if q_len * group_size <= n), ROWS[-1])
    programs = batch * n_kv_heads * cdiv(q_len * group_size, rows)
    n_pages = 0 if page_table is None else page_table.shape[1]
    page_size = 0 if page_table is None else k.shape[2]
    max_keys = k.shape[2] if page_table is None else n_pages * page_size
    n_splits = splits_for(programs, max_keys)
    part, part_lse = out, lse
    if n_splits > 1:
        part = torch.empty((n_splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((n_splits, *lse.shape), dtype=torch.float32, device=q.device)
    shape = dims(q, v)
    block_kv, warps = tile_for(rows, max(q.shape[-1], v.shape[-1]), q.dtype)
    with torch.cuda.device_of(q):
        streaming_decode_kernel[(programs, n_splits)](
            q, k, v, part, part_lse, sink, window, q_offset, page_table, kv_lens,
            *strides(q, k, v), n_heads, group_size, q_len, k.shape[2], n_splits, n_pages,
            *score_factors(scale, softcap), **shape, BLOCK_ROWS=rows, BLOCK_KV=block_kv,
            PAGE_SIZE=page_size, SOFTCAP=softcap > 0, **launch_options(warps, stages=2),
        )  # fmt: skip
        if n_splits > 1:
            streaming_merge_kernel[(lse.numel(),)](
                part, part_lse, out, lse, n_splits, lse.numel(), V_DIM=shape["V_DIM"],
                BLOCK_DV=shape["BLOCK_DV"], MAX_SPLITS=padded(n_splits), num_warps=8,
            )  # fmt: skip
    return out, lse


streaming_decode = torch.library.custom_op(
    "flexsparse::streaming_decode", launch_decode, mutates_args=()
)


@streaming_decode.register_fake
def _(q, k, v, sink, window, q_offset, page_table, kv_lens, scale, softcap):
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return q.new_empty((*q.shape[:3], v.shape[-1])), lse


def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What `streaming_decode` gives, by the shortest way: out, lse."""
    launch = streaming_decode if is_watched(q, k, v, *rest[:5]) else launch_decode
    return launch(q, k, v, *rest)
