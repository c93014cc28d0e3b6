"""What the streaming kernels must reach, from counts alone: keys, FLOPs, bytes, roofline time.

    python benchmarks/model_streaming.py            # needs no GPU and no triton

For every pattern: the keys a tile plan visits against the keys the mask needs, and the time the
visited work takes at the datasheet's rates. Our tiles are two halves of 64 rows that share the keys
both see; beside them are plain tiles of 64 and 128 rows and FlexAttention's blocks of 128. `bound`
is the roofline of the needed work, each tensor read or written once by each pass: what "within 2 x
of the roofline" refers to. `kernels` is the roofline of what the plan's kernels do. These are
predictions; measured times are in results/*.json and nowhere else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

PATTERNS = ((64, 256), (4, 64), (128, 1024))  # (sink, window) in tokens
TARGETS = {(64, 256): 1.25, (4, 64): 2.2}  # visited / needed, at most
FLEX_BLOCK = 128
BYTES = 2  # of a bfloat16
FORWARD_PRODUCTS = 2  # q k' and p v
DQ_PRODUCTS, DKDV_PRODUCTS = 3, 4  # s, dp, dq; s, dp, dv, dk


class Device(NamedTuple):
    """Datasheet rates: dense bfloat16 FLOP/s, device memory bytes/s, and an estimate for the L2."""

    name: str
    flops: float
    memory: float
    l2: float


# the L2 rates are no datasheet's: published microbenchmarks give about this much
DEVICES = (Device("A100", 312e12, 2.0e12, 4.0e12), Device("H200", 989e12, 4.8e12, 5.5e12))


class Visit(NamedTuple):
    """Keys that a program reads, and the sum of those that each of its tiles of rows visits."""

    read: int
    visited: int


class Moves(NamedTuple):
    """Tensors that cross device memory: those with query heads, and those with kv heads."""

    query: int
    kv: int


FORWARD_MOVES = Moves(2, 2)  # q, out; k, v
LEAST_BACKWARD_MOVES = Moves(4, 4)  # q, out, dout, dq; k, v, dk, dv
# a kernel for dq and delta, one for dk and dv: q and dout, k and v are read by both
OUR_BACKWARD_MOVES = Moves(6, 6)
# out and dout for delta; one kernel for dq, dk and dv finds in the L2 what it reads twice
FLEX_BACKWARD_MOVES = Moves(5, 4)


class Plan(NamedTuple):
    """How a kernel cuts the work: rows of one head in a tile, its keys, heads sharing keys."""

    name: str
    rows: int
    halves: int  # tiles of rows in a program, which reads their keys once
    kv: int
    dkdv_kv: int  # keys of a tile of the kernel for dk and dv, which walks rows,
    dkdv_rows: int  # so many at a time
    pack: int
    visit: Callable[..., Visit]
    backward_moves: Moves


class Count(NamedTuple):
    """Work of one attention call over all heads."""

    needed: float  # (row, key) pairs
    visited: float
    visited_dkdv: float
    l2_bytes: float  # keys and values read by the forward kernel's tiles, mostly from the L2
    l2_bytes_dkdv: float  # rows of q and dout read by the tiles of keys
    query_bytes: float  # of a tensor with query heads
    kv_bytes: float


def cdiv(a: int, b: int) -> int:
    """Rounded up."""
    return -(-a // b)


def needed_keys(p: int, sink: int, window: int) -> int:
    """Keys that the row at position p keeps."""
    return min(p + 1, window) + max(0, min(sink, p + 1 - window))


def visit_by_tiles(
    row0: int, row1: int, sink: int, window: int, plan: Plan, rest: int = 16
) -> Visit:
    """Of rows row0..row1: `schedule` and `halve` in streaming_schedule.py, written out."""
    kv, end = plan.kv, row1 + 1
    sink = min(sink, end)
    start = min(max(row0 - window + 1, 0), end) if window > 0 else end
    small = sink % kv if sink % kv <= rest else 0
    n_sink = cdiv(sink - small, kv)
    n_tiles = n_sink + cdiv(end - start, kv)
    small = rest if small else 0
    if start < sink or cdiv(end, kv) <= n_tiles:
        n_sink, n_tiles, start, small = 0, cdiv(end, kv), 0, 0
    if plan.halves == 1:
        return Visit(n_tiles * kv + small, n_tiles * kv + small)
    middle = row0 + plan.rows
    n_seen = min(n_sink + cdiv(max(min(middle, end) - start, 0), kv), n_tiles)
    n_lower = min(max(middle - window + 1 - start, 0) // kv, n_seen - n_sink) if start else 0
    return Visit(n_tiles * kv + small, (n_seen + n_tiles - n_lower) * kv + 2 * small)


def visit_by_blocks(row0: int, row1: int, sink: int, window: int, plan: Plan) -> Visit:
    """Keys in the aligned blocks that hold a kept pair: what a BlockMask schedules."""
    last = row1 // plan.kv
    first = max(0, row0 - window + 1) // plan.kv
    n_sink = cdiv(min(sink, row1 + 1), plan.kv)
    keys = (last - first + 1 + min(first, n_sink)) * plan.kv
    return Visit(keys, keys)


def _ours(name: str, rows: int, halves: int, pack: int = 1) -> Plan:
    return Plan(name, rows, halves, 64, 64, 64, pack, visit_by_tiles, OUR_BACKWARD_MOVES)


PLANS = {
    plan.name: plan
    for plan in (
        _ours("ours", 64, 2),
        _ours("ours, 4 heads packed", 32, 1, 4),
        _ours("64 rows", 64, 1),
        _ours("128 rows", 128, 1),
        Plan("flex 128", FLEX_BLOCK, 1, *[FLEX_BLOCK] * 3, 1, visit_by_blocks, FLEX_BACKWARD_MOVES),
    )
}


def count(
    plan: Plan, sink: int, window: int, length: int, n_heads: int, n_kv_heads: int, d: int
) -> Count:
    """Pairs needed and visited, and bytes, of q_len = kv_len = length."""
    needed = sum(needed_keys(p, sink, window) for p in range(length))
    visited = keys = 0
    rows = plan.rows * plan.halves
    for row0 in range(0, length, rows):
        row1 = min(row0 + rows, length) - 1
        seen = plan.visit(row0, row1, sink, window, plan)
        keys += seen.read
        visited += seen.visited * plan.rows
    l2_bytes = keys * 2 * d * BYTES * n_heads / plan.pack
    # a key is seen by the rows of its window, a sink by all that follow it
    kv, step = plan.dkdv_kv, plan.dkdv_rows
    seen_by = cdiv(length, kv) * cdiv(window + kv - 1, step) * step + cdiv(sink, kv) * length
    l2_dkdv = seen_by * 2 * d * BYTES * n_heads
    one = length * d * BYTES
    return Count(
        needed * n_heads, visited * n_heads, seen_by * kv * n_heads, l2_bytes, l2_dkdv,
        one * n_heads, one * n_kv_heads,
    )  # fmt: skip


def steady_ratio(plan: Plan, sink: int, window: int) -> float:
    """Visited / needed far from the first row, where every row of tiles is alike."""
    row0 = 1 << 20
    seen = plan.visit(row0, row0 + plan.rows * plan.halves - 1, sink, window, plan)
    return seen.visited / plan.halves / (sink + window)


def memory_traffic(work: Count, moves: Moves | None) -> float:
    """Bytes that cross device memory: forward, and backward where its moves are given."""
    query, kv = map(sum, zip(FORWARD_MOVES, moves or (0, 0), strict=True))
    return query * work.query_bytes + kv * work.kv_bytes


def times(
    work: Count, plan: Plan, device: Device, d: int, backward: bool
) -> tuple[float, float, float]:
    """Seconds: the roofline of the needed work; of what the kernels do; the latter with the L2."""
    # 5 products are the least a backward pass needs, 7 what two passes without atomics do
    least = FORWARD_PRODUCTS + (5 if backward else 0)
    moved = memory_traffic(work, LEAST_BACKWARD_MOVES if backward else None)
    bound = max(work.needed * 2 * d * least / device.flops, moved / device.memory)
    moved = memory_traffic(work, plan.backward_moves if backward else None)
    mine = max(flops(work, d, backward) / device.flops, moved / device.memory)
    return bound, mine, max(mine, l2_traffic(work, backward) / device.l2)


def flops(work: Count, d: int, backward: bool) -> float:
    """Of the pairs that tiles visit."""
    products = work.visited * FORWARD_PRODUCTS
    if backward:
        products += work.visited * DQ_PRODUCTS + work.visited_dkdv * DKDV_PRODUCTS
    return products * 2 * d


def l2_traffic(work: Count, backward: bool) -> float:
    """Bytes that tiles read; the kernel of dq walks keys as the forward kernel does."""
    return 2 * work.l2_bytes + work.l2_bytes_dkdv if backward else work.l2_bytes


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()

    print("keys visited / keys needed, far from the first row")
    print(f"{'':22}" + "".join(f"{f'{s}, {w}':>12}" for s, w in PATTERNS))
    for plan in PLANS.values():
        ratios = (steady_ratio(plan, s, w) for s, w in PATTERNS)
        print(f"{plan.name:22}" + "".join(f"{ratio:>12.3f}" for ratio in ratios))
    targets = (TARGETS.get(pattern) for pattern in PATTERNS)
    print(f"{'target, at most':22}" + "".join(f"{x if x else '-':>12}" for x in targets))

    print(
        f"\nmilliseconds, {args.length} tokens, {args.heads} heads on {args.kv_heads} kv heads, "
        f"head_dim {args.head_dim}, bf16, batch 1"
    )
    print("bound: roofline of the keys needed; kernels: of what they do; + L2: with L2 traffic")
    head = f"{'':6}{'(s, w)':>12}  {'plan':22}{'pass':9}{'GFLOP':>9}{'MB':>8}{'L2 MB':>9}"
    print(head + f"{'bound':>9}{'kernels':>9}{'+ L2':>9}")
    for device in DEVICES:
        for s, w in PATTERNS:
            for plan in PLANS.values():
                if args.heads // args.kv_heads % plan.pack:
                    continue
                work = count(plan, s, w, args.length, args.heads, args.kv_heads, args.head_dim)
                for backward in (False, True):
                    bound, mine, l2 = times(work, plan, device, args.head_dim, backward)
                    name = "fwd+bwd" if backward else "fwd"
                    gflop = flops(work, args.head_dim, backward) / 1e9
                    moved = memory_traffic(work, plan.backward_moves if backward else None) / 1e6
                    print(
                        f"{device.name:6}{f'{s}, {w}':>12}  {plan.name:22}"
                        f"{name:9}{gflop:>9.0f}{moved:>8.0f}"
                        f"{l2_traffic(work, backward) / 1e6:>9.0f}"
                        f"{bound * 1e3:>9.3f}{mine * 1e3:>9.3f}{l2 * 1e3:>9.3f}"
                    )


if __name__ == "__main__":
    main()
