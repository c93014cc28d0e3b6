"""Tries tile sizes of the streaming kernels on this GPU and prints what it found, the best first.

    python benchmarks/tune_streaming.py --length 16384
    TRITON_INTERPRET=1 python benchmarks/tune_streaming.py --dry-run     # no GPU: means nothing

Each kernel is tuned with the others as flexsparse/executors/streaming_tiles.py has them; the
numbers are entries of its table. tests/test_streaming_aot.py finds those that spill or do not fit.
Processes side by side compile all candidates first, into triton's cache; `--warm` stops there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

from bench_streaming import PATTERNS, Bench, kernel_times, once, run_of

from flexsparse.executors import streaming_ops, streaming_tiles
from flexsparse.executors.streaming_tiles import Tile, Tiles

# (rows, keys, warps, stages, halves), at head_dim 128 on sm_90 those that spill least; first those
# that leave room for 12 or 16 warps a multiprocessor, which were not measured yet
WALK_KEYS = (
    (64, 32, 4, 2, 1), (64, 64, 4, 1, 1), (128, 32, 8, 2, 1), (64, 64, 8, 2, 1),
    (64, 64, 4, 2, 2), (64, 64, 4, 3, 2), (64, 32, 4, 2, 2), (64, 32, 4, 3, 2), (64, 64, 8, 2, 2),
    (64, 128, 8, 2, 2), (64, 32, 4, 3, 1), (64, 64, 4, 2, 1), (64, 64, 4, 3, 1), (128, 32, 8, 3, 1),
    (128, 64, 8, 2, 1), (128, 64, 8, 3, 1), (128, 128, 8, 2, 1),
)  # fmt: skip
WALK_ROWS = (
    (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2),
    (32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2),
)  # fmt: skip
CANDIDATES = {"fwd": WALK_KEYS, "dq": WALK_KEYS, "dkdv": WALK_ROWS}


COMPILE_LENGTH = 4096  # enough for every kernel of the backward pass


def tiles_in_use(bench: Bench) -> Tiles:
    """What the table has for this GPU and shape."""
    q, _, v, _ = bench.tensors(1)
    pack = streaming_tiles.pack_of(bench.args.heads // bench.args.kv_heads)
    return streaming_tiles.tiles_for(q, v, 0.0, pack)


def attempt(
    bench: Bench, kernel: str, tile: Tile, pattern: tuple[int, int], length: int, is_warming: bool
) -> float | str:
    """Milliseconds of a kernel with this tile, or why there are none."""
    *tensors, dout = bench.tensors(length)
    usual = tiles_in_use(bench)
    streaming_ops.tiles_for = lambda *args: usual._replace(**{kernel: tile})
    name = "fwd" if kernel == "fwd" else "fwd_bwd"
    run = run_of(name, bench.ours(*pattern), tensors, dout)
    try:
        return once(run) if is_warming else kernel_times(run)[kernel]
    except Exception as error:  # shared memory, or a tile triton cannot lay out
        return str(error).splitlines()[0][:90]


def compile_candidate(args: argparse.Namespace, candidate: tuple[str, Tile]) -> None:
    """Leave what a candidate needs in triton's cache."""
    attempt(Bench(args), *candidate, PATTERNS[0], min(args.length, COMPILE_LENGTH), True)


def main() -> None:
    """Time every candidate for each kernel and pattern."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=240, help="start no candidate after these")
    parser.add_argument("--warm", action="store_true", help="compile alone, for a later run")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")
    args = parser.parse_args()
    stop = time.perf_counter() + args.seconds
    candidates, patterns = CANDIDATES, PATTERNS
    if args.dry_run:
        args.length, args.heads, args.kv_heads, args.head_dim = 128, 2, 1, 32
        candidates, patterns = {name: x[:1] for name, x in CANDIDATES.items()}, PATTERNS[:1]
    tiles = [(kernel, Tile(*x)) for kernel, numbers in candidates.items() for x in numbers]
    processes = max(1, (os.cpu_count() or 1) // 2)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(functools.partial(compile_candidate, args), tiles))
    if args.warm:
        return

    bench = Bench(args)
    usual = tiles_in_use(bench)._asdict()
    found: dict[tuple[str, tuple[int, int]], list[tuple[float, Tile]]] = {}
    for (kernel, tile), pattern in itertools.product(tiles, patterns):
        if time.perf_counter() > stop:
            print("out of time")
            break
        result = attempt(bench, kernel, tile, pattern, args.length, args.dry_run)
        if isinstance(result, str):
            print(f"{kernel} {tuple(tile)}: {result}")
        else:
            found.setdefault((kernel, pattern), []).append((result, tile))
    for (kernel, pattern), results in found.items():
        print(f"{kernel}, (sink, window) {pattern}; in use {usual[kernel]}")
        for ms, tile in sorted(results)[:6]:
            print(f"    {ms:8.3f} ms  {tile}", flush=True)


if __name__ == "__main__":
    main()
