"""A step of decoding over a cache of N keys, beside torch's way and dense attention.

    python benchmarks/bench_decoding.py       # 3 minutes; writes benchmarks/results/decoding.json

8 query heads on 4 kv heads of 64, float32 on CPU and bfloat16 on a GPU, each step at the next
position:

- plan: row = attend.row(position), once for a step, whatever the layers
- step: plan, and row(q, k, v) in the first layer
- layer: row(q, k, v) in a later layer
- grown: attend.at(1, position + 1)(q, k, v), keys so far alone
- flex: compiled flex_attention with the row of blocks cut out of the whole BlockMask, as torch's
  examples do, and a mask_mod that adds the position; flex_layer is its later layer
- dense: scaled_dot_product_attention over the keys so far
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import flexsparse as fs
from flexsparse.benchmark.harness import environment, take_turns
from flexsparse.masks import causal, sink, window

MASK = causal & (sink(64) | window(256))
LENGTHS = (4096, 16384, 65536, 131072)
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
RESULTS = Path(__file__).parent / "results" / "decoding.json"


def steps(length: int, device: torch.device, dtype: torch.dtype) -> dict:
    """What each way of decoding does next, by name."""
    attend = fs.compile_mask(MASK, length, length, device=device)
    whole = attend.block_mask
    q = torch.randn(1, HEADS, 1, HEAD_DIM, device=device, dtype=dtype)
    k, v = torch.randn(2, 1, KV_HEADS, length, HEAD_DIM, device=device, dtype=dtype)
    compiled = torch.compile(
        lambda q, k, v, block_mask: flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True),
        dynamic=True,
    )
    place = {
        name: itertools.count(length // 2) for name in ("plan", "step", "grown", "flex", "dense")
    }

    def grown():
        position = next(place["grown"])
        so_far = slice(0, position + 1)
        return attend.at(1, position + 1)(q, k[:, :, so_far], v[:, :, so_far])

    def row_of_torch(position):
        offset = torch.tensor(position, device=device)
        row = whole[:, :, position // 128]
        row.seq_lengths = (1, length)
        row.mask_mod = lambda b, h, q_idx, kv_idx: whole.mask_mod(b, h, q_idx + offset, kv_idx)
        return row

    def dense():
        so_far = slice(0, next(place["dense"]) + 1)
        return scaled_dot_product_attention(q, k[:, :, so_far], v[:, :, so_far], enable_gqa=True)

    planned, planned_by_torch = attend.row(length // 2), row_of_torch(length // 2)
    return {
        "plan": lambda: attend.row(next(place["plan"])),
        "step": lambda: attend.row(next(place["step"]))(q, k, v),
        "layer": lambda: planned(q, k, v),
        "grown": grown,
        "flex": lambda: compiled(q, k, v, row_of_torch(next(place["flex"]))),
        "flex_layer": lambda: compiled(q, k, v, planned_by_torch),
        "dense": dense,
    }


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for length in LENGTHS:
        calls = steps(length, device, dtype)
        same = calls["step"](), calls["grown"](), calls["flex"]()
        for out in same[1:]:
            torch.testing.assert_close(out, same[0], atol=2e-2, rtol=2e-2)
        for call in calls.values():
            for _ in range(3):
                call()
        times = take_turns(calls, device, budget=20)
        row = {"length": length}
        row |= {f"{name}_ms": round(taken.median, 4) for name, taken in times.items()}
        row["layer_to_dense"] = round(times["layer"].median / times["dense"].median, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    report = {
        "benchmark": "decoding",
        "command": "python benchmarks/bench_decoding.py",
        "mask": MASK.name,
        "shape": f"{HEADS} heads, {KV_HEADS} kv heads, head_dim {HEAD_DIM}, {dtype}",
        **environment(device),
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
