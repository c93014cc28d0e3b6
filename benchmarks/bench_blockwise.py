"""The blockwise executor against dense attention on CPU: time, and memory by length.

    python benchmarks/bench_blockwise.py speed  [--save results/blockwise_speed.json]
    python benchmarks/bench_blockwise.py memory [--save results/blockwise_memory.json]

speed: random block lists that keep a tenth of all blocks (every row its tenth or one more, one list
for all heads), 8 heads, D 64, float32, against scaled_dot_product_attention without a mask; dense
and sparse take turns. memory: the peak of forward + backward beyond the inputs, each length in a
process of its own, at a fixed count of blocks a row; the last line is causal attention, all of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from flexsparse.benchmark.harness import environment, take_turns
from flexsparse.executors import blockwise

BLOCK = 128
HEADS, HEAD_DIM = 8, 64

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "memory", "one_length"])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--kept", type=float, default=0.1, help="share of all blocks")
    parser.add_argument("--blocks", type=int, default=16, help="blocks a row, for memory")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each pass")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "one_length":
        print(json.dumps(peak_memory(args.lengths[0], args.blocks)))
        return
    if args.what == "speed":
        rows = [speed(n, args.kept, args.budget) for n in args.lengths or [4096, 8192]]
    else:
        rows = memory(args.lengths or [8192, 16384, 32768, 65536], args.blocks)
    record = environment(torch.device("cpu")) | {"rows": rows}
    if args.save:
        args.save.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def speed(length: int, kept: float, budget: float) -> dict[str, Any]:
    """Medians of alternating runs; the ratio is dense / sparse."""
    rows = length // BLOCK
    block_mask = random_rows(rows, [int(kept * rows) + (r % 5 == 0) for r in range(rows)])
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    attend: dict[str, Attend] = {
        "dense": scaled_dot_product_attention,
        "sparse": lambda q, k, v: blockwise.run(q, k, v, block_mask)[0],
    }
    result: dict[str, Any] = {
        "length": length,
        "blocks_kept": float(block_mask.full_kv_num_blocks.sum() / rows**2),
    }
    for phase, run in (("forward", forward), ("forward_backward", forward_backward)):
        calls = {name: functools.partial(run, one, q, k, v) for name, one in attend.items()}
        for call in calls.values():
            call()
        times = take_turns(calls, q.device, budget)
        result |= {f"{name}_{phase}_ms": round(x.median, 2) for name, x in times.items()}
        result[f"{phase}_ratio"] = round(times["dense"].median / times["sparse"].median, 2)
    return result


def memory(lengths: list[int], blocks: int) -> list[dict[str, Any]]:
    """Peak memory by length, and of all of causal attention at the longest (blocks = 0)."""
    rows = []
    for length, count in [*((n, blocks) for n in lengths), (lengths[-1], 0)]:
        command = [sys.executable, __file__, "one_length", "--lengths", str(length)]
        done = subprocess.run(
            [*command, "--blocks", str(count)], capture_output=True, text=True, check=True
        )
        rows.append(json.loads(done.stdout))
    return rows


def peak_memory(length: int, blocks: int) -> dict[str, Any]:
    """The peak of one forward + backward of one head beyond what stood before, in this process."""
    rows = length // BLOCK
    block_mask = random_rows(rows, [blocks or r + 1 for r in range(rows)], causal=not blocks)
    q, k, v = (torch.randn(1, 1, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    small = random_rows(2, [1, 1])
    attend: Attend = lambda q, k, v: blockwise.run(q, k, v, small)[0]  # noqa: E731
    # the libraries' own memory is there before we measure
    forward_backward(attend, *(x[:, :, : 2 * BLOCK] for x in (q, k, v)))
    before = peak_mib()
    start = time.perf_counter()
    forward_backward(lambda q, k, v: blockwise.run(q, k, v, block_mask)[0], q, k, v)
    return {
        "length": length,
        "blocks_a_row": blocks or "causal",
        "peak_mib": round(peak_mib() - before, 1),
        "seconds": round(time.perf_counter() - start, 2),
    }


def random_rows(rows: int, counts: list[int], causal: bool = False) -> BlockMask:
    """Lists of full blocks: counts[r] random ones in row r, or its first ones."""
    rng = torch.Generator().manual_seed(0)
    width = max(counts)
    indices = torch.zeros(1, 1, rows, width, dtype=torch.int32)
    for row, count in enumerate(counts):
        picked = torch.arange(count) if causal else torch.randperm(rows, generator=rng)[:count]
        indices[0, 0, row, :count] = picked.sort().values
    full = torch.tensor(counts, dtype=torch.int32).view(1, 1, rows)
    return BlockMask(
        seq_lengths=(rows * BLOCK, rows * BLOCK),
        kv_num_blocks=torch.zeros_like(full),
        kv_indices=indices[..., :1],
        full_kv_num_blocks=full,
        full_kv_indices=indices,
        q_num_blocks=None,
        q_indices=None,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= 0,
    )


def forward(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        attend(q, k, v)


def forward_backward(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> None:
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
