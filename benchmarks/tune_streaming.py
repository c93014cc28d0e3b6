"""Tries tile sizes of the streaming kernels on this GPU and prints what it found, the best first.

    python benchmarks/tune_streaming.py --length 16384
    TRITON_INTERPRET=1 python benchmarks/tune_streaming.py --dry-run     # no GPU: means nothing

Each kernel is tuned with the others as flexsparse/executors/streaming_tiles.py has them; the
numbers are entries of its table. tests/test_streaming_aot.py finds those that spill or do not fit.
"""

from __future__ import annotations

import argparse
import itertools
import time

from bench_streaming import PATTERNS, Bench, measure_pass

from flexsparse.executors import streaming_ops, streaming_tiles
from flexsparse.executors.streaming_tiles import Tile

# (rows, keys, warps, stages, halves), at head_dim 128 on sm_90 those that spill least
WALK_KEYS = (
    (64, 64, 4, 2, 2), (64, 64, 4, 3, 2), (64, 32, 4, 2, 2), (64, 32, 4, 3, 2), (64, 64, 8, 2, 2),
    (64, 128, 8, 2, 2), (64, 32, 4, 3, 1), (64, 64, 4, 2, 1), (64, 64, 4, 3, 1), (128, 32, 8, 3, 1),
    (128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 128, 8, 2, 1),
)  # fmt: skip
WALK_ROWS = (
    (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2),
    (32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2),
)  # fmt: skip
CANDIDATES = {"fwd": WALK_KEYS, "dq": WALK_KEYS, "dkdv": WALK_ROWS}


def main() -> None:
    """Time every candidate for each kernel and pattern."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=540, help="start no candidate after these")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")
    args = parser.parse_args()
    n_candidates, patterns = None, PATTERNS
    if args.dry_run:
        args.length, args.heads, args.kv_heads, args.head_dim = 128, 2, 1, 32
        n_candidates, patterns = 1, PATTERNS[:1]
    bench, stop = Bench(args), time.perf_counter() + args.seconds
    *tensors, dout = bench.tensors(args.length)
    usual = streaming_tiles.tiles_for(tensors[0], tensors[2], softcap=0.0)
    for kernel, candidates in CANDIDATES.items():
        name = "fwd" if kernel == "fwd" else "fwd_bwd"
        found = []
        # patterns share what is compiled for a candidate
        for numbers, (s, w) in itertools.product(candidates[:n_candidates], patterns):
            tile = Tile(*numbers)
            tiles = usual._replace(**{kernel: tile})
            streaming_ops.tiles_for = lambda *args, tiles=tiles: tiles
            if time.perf_counter() > stop:
                print("out of time")
                break
            try:
                ms = measure_pass(name, bench.ours(s, w), tensors, dout)
            except Exception as error:  # shared memory, or a tile triton cannot lay out
                print(f"{kernel} {tuple(tile)}: {str(error).splitlines()[0][:90]}")
                continue
            found.append(((s, w), ms, tile))
        for pattern in patterns:
            in_use = getattr(usual, kernel)
            print(f"{kernel}, (sink, window) {pattern}, {name}; in use {in_use}")
            for _, ms, tile in sorted(x for x in found if x[0] == pattern)[:6]:
                print(f"    {ms:8.3f} ms  {tile}", flush=True)


if __name__ == "__main__":
    main()
