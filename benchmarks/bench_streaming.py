"""The streaming kernels against flex (at its best block size) and dense SDPA, on one CUDA GPU.

    python benchmarks/bench_streaming.py --save results/streaming_h200.json --plot results/
    python benchmarks/bench_streaming.py --tune        # tries tile sizes and prints what it found
    python benchmarks/bench_streaming.py --dry-run     # no GPU: every case's numbers, nothing run

Per length and (sink, window): forward, and forward + backward, of ours; of flex_attention with the
same mask; of dense causal SDPA; and of half the heads dense and half streaming, as
Block-Sparse-Attention measures it. Times are medians of single runs, in milliseconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from model_streaming import DEVICES, PATTERNS, PLANS, count, times
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

LENGTHS = tuple(1024 * n for n in (2, 4, 8, 16, 32, 64, 128))
FLEX_BLOCKS = (128, 64)  # flex is given the better of these
CANDIDATES = [  # tiles to try, (rows, kv, warps, stages), for fwd, dq and dkdv alike
    (rows, kv, warps, stages)
    for rows in (32, 64, 128)
    for kv in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3)
]


def median_ms(run: Callable[[], Any], budget_ms: float = 150.0) -> float:
    """Median of single runs between CUDA events, after two runs to compile and warm up."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    found: list[float] = []
    while len(found) < 5 or (sum(found) < budget_ms and len(found) < 50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def passes(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> dict[str, float]:
    """Milliseconds of the forward pass, and of it with the backward pass."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(attend(q, k, v))

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, dout)

    with torch.no_grad():
        forward = median_ms(lambda: attend(q, k, v))
    return {"fwd": forward, "fwd_bwd": median_ms(both)}


def streaming_block_mask(sink: int, window: int, length: int, block: int, device: str) -> BlockMask:
    """The mask's BlockMask, from its block classes: no [length, length] tensor is made."""
    first = torch.arange(0, length, block)
    q_lo, kv_lo = first[:, None], first[None, :]
    q_hi, kv_hi = q_lo + block - 1, kv_lo + block - 1
    some = (kv_lo <= q_hi) & ((kv_lo < sink) | (q_lo - kv_hi < window))
    full = (kv_hi <= q_lo) & ((kv_hi < sink) | (q_hi - kv_lo < window))
    lists: list[Tensor] = []
    for chosen in (some & ~full, full):
        order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True).int()
        lists += [chosen.sum(1).int()[None, None].to(device), order[None, None].to(device)]
    s, w = (torch.tensor(x, device=device) for x in (sink, window))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ((kv_idx < s) | (q_idx - kv_idx < w))

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=mask_mod)


def main() -> None:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tune", action="store_true", help="try tile sizes at the first length")
    parser.add_argument("--dry-run", action="store_true", help="run nothing: print each case")
    parser.add_argument("--save", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path, help="a folder for the plots")
    args = parser.parse_args()
    if args.dry_run:
        for case in cases(args):
            print(case)
        return
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if args.tune:
        tune(args)
        return
    rows = []
    for case in cases(args):
        rows.append(case | measure(case, args))
        print(json.dumps(rows[-1]), flush=True)
        record = about() | {"rows": rows}
        if args.save:  # after every case: an interrupted run keeps what it has
            args.save.parent.mkdir(parents=True, exist_ok=True)
            args.save.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, each with the model's prediction."""
    packed = args.heads // args.kv_heads % 4 == 0
    plan = PLANS["ours, 4 heads packed" if packed else "ours"]
    found = []
    for length in args.lengths:
        for sink, window in PATTERNS:
            work = count(plan, sink, window, length, args.heads, args.kv_heads, args.head_dim)
            bound = [times(work, DEVICES[1], args.head_dim, b)[0] * 1e3 for b in (False, True)]
            found.append(
                {"length": length, "sink": sink, "window": window}
                | {"h200_bound_ms": {"fwd": round(bound[0], 4), "fwd_bwd": round(bound[1], 4)}}
            )
    return found


def tensors(args: argparse.Namespace, length: int) -> list[Tensor]:
    """q, k, v of one case."""
    torch.manual_seed(0)
    heads = (args.heads, args.kv_heads, args.kv_heads)
    shapes = [(1, n, length, args.head_dim) for n in heads]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]


def measure(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every way to compute one case."""
    from flexsparse.executors.streaming import streaming_attention

    length, s, w = case["length"], case["sink"], case["window"]
    q, k, v = tensors(args, length)
    sink, window = (torch.full((args.heads,), n, dtype=torch.int32, device="cuda") for n in (s, w))
    half, kv_half = args.heads // 2, args.kv_heads // 2

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[1]
        out = streaming_attention(q, k, v, sink[:n], window[:n], max_sink=s)
        assert isinstance(out, Tensor)
        return out

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def hybrid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = dense(q[:, :half], k[:, :kv_half], v[:, :kv_half])
        return torch.cat((first, ours(q[:, half:], k[:, kv_half:], v[:, kv_half:])), 1)

    found: dict[str, Any] = {"ours": passes(ours, q, k, v)}
    torch._dynamo.reset()  # or the ninth length would silently run unfused
    compiled = torch.compile(flex_attention, dynamic=False)
    flex: dict[int, dict[str, float]] = {}
    for block in FLEX_BLOCKS:
        mask = streaming_block_mask(s, w, length, block, "cuda")
        try:
            flex[block] = passes(
                lambda q, k, v, mask=mask: compiled(q, k, v, block_mask=mask, enable_gqa=True),
                q, k, v,
            )  # fmt: skip
        except Exception as error:  # a block size this torch cannot compile is no result
            found[f"flex_{block}_failed"] = str(error)[:200]
    if 128 in flex:  # the two must agree before their times mean anything
        mask = streaming_block_mask(s, w, length, 128, "cuda")
        theirs = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        found["difference"] = (ours(q, k, v).float() - theirs.float()).abs().max().item()
    for name in ("fwd", "fwd_bwd"):
        best = min(flex, key=lambda block: flex[block][name], default=None)
        if best is not None:
            found.setdefault("flex", {})[name] = flex[best][name]
            found.setdefault("flex_block", {})[name] = best
    if s == PATTERNS[0][0]:  # dense does not depend on the pattern
        found["dense"] = passes(dense, q, k, v)
        found["hybrid"] = passes(hybrid, q, k, v)
    return found


def tune(args: argparse.Namespace) -> None:
    """Time every candidate tile per kernel at the first length; print the best first."""
    from flexsparse.executors import streaming, streaming_ops, streaming_tiles

    length = args.lengths[0]
    q, k, v = tensors(args, length)
    packed = args.heads > args.kv_heads
    usual = streaming_tiles.tiles_for(q, v)
    for s, w in PATTERNS:
        sink, window = (
            torch.full((args.heads,), n, dtype=torch.int32, device="cuda") for n in (s, w)
        )

        def attend(q: Tensor, k: Tensor, v: Tensor, sink=sink, window=window, s=s) -> Tensor:  # type: ignore[no-untyped-def]
            return streaming.streaming_attention(q, k, v, sink, window, max_sink=s)  # type: ignore[return-value]

        for kernel in ("fwd_packed" if packed else "fwd", "dq_packed" if packed else "dq", "dkdv"):
            found = []
            for numbers in CANDIDATES:
                tiles = usual._replace(**{kernel: streaming_tiles.Tile(*numbers)})
                streaming_ops.tiles_for = lambda q, v, tiles=tiles: tiles  # type: ignore[misc]
                try:
                    result = passes(attend, q, k, v)
                except Exception:  # out of shared memory, or a tile triton cannot lay out
                    continue
                key = "fwd" if kernel.startswith("fwd") else "fwd_bwd"
                found.append((result[key], numbers))
            print(f"({s}, {w}) {kernel}, in use {tuple(getattr(usual, kernel))}")
            for ms, numbers in sorted(found)[:5]:
                print(f"    {ms:8.3f} ms  (rows, kv, warps, stages) = {numbers}", flush=True)


def about() -> dict[str, Any]:
    """What the numbers were measured on."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": str(datetime.date.today()),
        "timing": "median of 5 to 50 runs, CUDA events, milliseconds",
    }


def plot(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Time over length, one picture for each pattern and pass."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for s, w in PATTERNS:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        mine = [row for row in rows if (row["sink"], row["window"]) == (s, w)]
        for axis, name in zip(axes, ("fwd", "fwd_bwd"), strict=True):
            for way in ("ours", "flex", "dense", "hybrid", "h200_bound_ms"):
                points = [(r["length"], r[way][name]) for r in mine if way in r]
                if points:
                    axis.loglog(*zip(*points, strict=True), marker="o", label=way)
            axis.set(title=f"sink {s}, window {w}: {name}", xlabel="tokens", ylabel="ms")
            axis.legend()
        figure.savefig(folder / f"streaming_{s}_{w}.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
