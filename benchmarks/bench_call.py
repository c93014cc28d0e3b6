"""What attend(q, k, v) costs over raw compiled flex_attention with the same BlockMask.

    python benchmarks/bench_call.py       # writes benchmarks/results/call.json

The inputs are as small as they can be, so that the kernel takes as little as it can. The two take
turns in one process; the figure is the difference of the medians.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import flex_attention

from flexsparse import compile_mask
from flexsparse.benchmark.harness import environment, take_turns
from flexsparse.masks import causal, sink, window


def main() -> None:
    torch.set_num_threads(1)
    attend = compile_mask(causal & (sink(4) | window(64)), 128, 128)
    q, k, v = (torch.randn(1, 1, 128, 16) for _ in range(3))
    block_mask = attend.launches[0].block_mask((0,))

    def attention(q, k, v, block_mask):
        return flex_attention(q, k, v, block_mask=block_mask)

    raw = torch.compile(attention, dynamic=True, fullgraph=True)
    calls = {"attend": lambda: attend(q, k, v), "raw": lambda: raw(q, k, v, block_mask)}
    for _ in range(200):
        for call in calls.values():
            call()
    device = torch.device("cpu")
    times = take_turns(calls, device, budget=10)
    microseconds = {name: taken.median * 1e3 for name, taken in times.items()}
    report = {
        "benchmark": "call",
        "command": "python benchmarks/bench_call.py",
        **environment(device),
        "attend_us": round(microseconds["attend"], 1),
        "raw_us": round(microseconds["raw"], 1),
        "overhead_us": round(microseconds["attend"] - microseconds["raw"], 1),
    }
    print(json.dumps(report, indent=1))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "call.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
