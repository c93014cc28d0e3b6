"""The streaming kernels against flex (at its best block size) and dense SDPA, on one CUDA GPU.

    python benchmarks/bench_streaming.py --save results/streaming_h200.json --plot results/
    python benchmarks/bench_streaming.py --warm --lengths 16384          # compiles alone
    TRITON_INTERPRET=1 python benchmarks/bench_streaming.py --dry-run    # no GPU: means nothing

Per length and (sink, window): forward, and forward + backward, of ours; of flex_attention with the
same mask; of dense causal SDPA; and of a compiled mask whose heads are half dense, half streaming,
as Block-Sparse-Attention measures it. Times are medians of single runs on the GPU, in milliseconds,
for which the ways take turns: a GPU that gets warm gets slower, for all alike. `kernels` has those
of our kernels alone, `host` what it takes the host to ask for a call, while the GPU waits for none.
Compiling takes longer than measuring, and can be done for all lengths at once: what `--warm` leaves
in the caches of triton and inductor is found there by the run that measures.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from model_streaming import DEVICES, PATTERNS, PLANS, count, times
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import flexsparse as fs
from flexsparse.executors.streaming import streaming_attention
from flexsparse.masks import causal, sink, window

LENGTHS = tuple(1024 * n for n in (2, 4, 8, 16, 32, 64, 128))
PASSES = ("fwd", "fwd_bwd")
# flex is given the better of these; the tiles of its forward kernel must divide the block
FLEX_BLOCKS: dict[int, dict[str, Any]] = {128: {}, 64: {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}}
HYBRID_PATTERN = PATTERNS[0]
SECONDS_OF_TURNS = 1.5  # for each pass of a case, within these bounds
MIN_TURNS, MAX_TURNS = 5, 30

Run = Callable[[], Any]


@functools.cache
def gigabyte() -> Tensor:
    """Memory for nothing else."""
    return torch.empty(1 << 30, dtype=torch.int8, device="cuda")


def empty_cache() -> None:
    """Empty the L2 cache, and take about 2 ms for it: longer than the host to ask for a run."""
    for _ in range(8):
        gigabyte().zero_()


def in_turns(runs: dict[str, Run]) -> dict[str, float]:
    """Median milliseconds of each run on the GPU."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {way: [] for way in runs}

    def take_turns(n: int) -> None:
        for _ in range(n):
            for way, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                empty_cache()
                start.record()
                run()
                end.record()
                events[way].append((start, end))
        torch.cuda.synchronize()

    def median(way: str) -> float:
        return statistics.median(start.elapsed_time(end) for start, end in events[way])

    take_turns(2)
    seconds = sum(map(median, runs)) / 1e3
    for taken in events.values():
        taken.clear()
    take_turns(round(min(max(SECONDS_OF_TURNS / seconds, MIN_TURNS), MAX_TURNS)))
    return {way: median(way) for way in runs}


def kernel_times(run: Run) -> dict[str, float]:
    """Median milliseconds of each of our kernels in a run, by torch's profiler."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(12):
            empty_cache()
            run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        if found := re.match(r"streaming_(\w+)_kernel", event.name):
            times.setdefault(found[1], []).append(event.device_time / 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def host_milliseconds(run: Run) -> float:
    """What the host needs to ask for a run."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def once(run: Run) -> float:
    """Milliseconds of a single run, which may compile."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def run_of(name: str, attend: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor) -> Run:
    """The forward pass, or it with the backward pass."""
    if name == "fwd":
        return torch.no_grad()(lambda: attend(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)


def streaming_block_mask(
    n_sink: int, n_window: int, length: int, block: int, device: str
) -> BlockMask:
    """The mask's BlockMask, from its block classes: no [length, length] tensor is made."""
    first = torch.arange(0, length, block)
    q_lo, kv_lo = first[:, None], first[None, :]
    q_hi, kv_hi = q_lo + block - 1, kv_lo + block - 1
    some = (kv_lo <= q_hi) & ((kv_lo < n_sink) | (q_lo - kv_hi < n_window))
    whole = (kv_hi <= q_lo) & ((kv_hi < n_sink) | (q_hi - kv_lo < n_window))
    lists: list[Tensor] = []
    for chosen in (some & ~whole, whole):
        order = torch.argsort(chosen.int(), dim=1, descending=True, stable=True).int()
        lists += [chosen.sum(1).int()[None, None].to(device), order[None, None].to(device)]
    s, w = (torch.tensor(x, device=device) for x in (n_sink, n_window))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ((kv_idx < s) | (q_idx - kv_idx < w))

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=mask_mod)


class Bench:
    """Measures cases of one shape of model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cpu" if args.dry_run else "cuda"
        self.dtype = torch.float16 if args.dry_run else torch.bfloat16
        self.flex = flex_attention
        if not args.dry_run:
            # a fixed shape for every length, as a user who measures would have it
            torch._dynamo.config.recompile_limit = 1000
            self.flex = torch.compile(flex_attention, dynamic=False)
        self.cannot: dict[tuple[str, str], str] = {}  # (way, pass) -> why there is no kernel

    def tensors(self, length: int) -> list[Tensor]:
        """q, k, v and the gradient of the output."""
        torch.manual_seed(0)
        args = self.args
        heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
        shapes = [(1, n, length, args.head_dim) for n in heads]
        return [torch.randn(s, device=self.device, dtype=self.dtype) for s in shapes]

    def ours(self, s: int, w: int) -> Callable[..., Tensor]:
        """Every head with s sinks and a window of w."""
        numbers = [[n] * self.args.heads for n in (s, w)]
        sinks, windows = torch.tensor(numbers, dtype=torch.int32, device=self.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = streaming_attention(q, k, v, sinks, windows, max_sink=s)
            assert isinstance(out, Tensor)
            return out

        return attend

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every head causal."""
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def hybrid(self, s: int, w: int, length: int) -> fs.CompiledMask:
        """Half of the heads causal, the others with s sinks and a window of w."""
        half = self.args.heads // 2
        heads = [causal] * half + [causal & (sink(s) | window(w))] * half
        return fs.compile_mask(fs.per_head(heads), length, length, device=self.device)

    def with_flex(self, s: int, w: int, length: int, block: int) -> Callable[..., Tensor]:
        """The same mask as `ours` in FlexAttention."""
        mask = streaming_block_mask(s, w, length, block, self.device)
        options = FLEX_BLOCKS[block] or None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.flex(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)

        return attend

    def ways(self, s: int, w: int, length: int) -> dict[str, Callable[..., Tensor]]:
        """Every way to compute a case."""
        found = {"ours": self.ours(s, w)}
        if (s, w) == HYBRID_PATTERN:  # dense does not depend on the pattern
            found |= {"dense": self.dense, "hybrid": self.hybrid(s, w, length)}
        return found | {f"flex_{b}": self.with_flex(s, w, length, b) for b in FLEX_BLOCKS}

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds of every way to compute one case."""
        length, s, w = case["length"], case["sink"], case["window"]
        *tensors, dout = self.tensors(length)
        ways = self.ways(s, w, length)
        found: dict[str, Any] = {}
        for name in PASSES:
            runs = {way: run_of(name, attend, tensors, dout) for way, attend in ways.items()}
            times = {}
            for way, run in runs.items():
                if (way, name) in self.cannot:
                    continue
                try:
                    times[way] = once(run)
                except Exception as error:
                    if not way.startswith("flex"):
                        raise
                    # a block size that this torch has no kernel for
                    self.cannot[way, name] = str(error).splitlines()[0][:200]
            if self.args.warm:
                continue
            if not self.args.dry_run:
                times = in_turns({way: runs[way] for way in times})
                found.setdefault("kernels", {})[name] = kernel_times(runs["ours"])
                host = {way: host_milliseconds(runs[way]) for way in times}
                found.setdefault("host", {})[name] = host
            best = min(
                (way for way in times if way.startswith("flex")), key=times.get, default=None
            )
            if best:
                times["flex"] = times[best]
                found.setdefault("flex_is", {})[name] = best
            for way, ms in times.items():
                found.setdefault(way, {})[name] = ms
        # the two must agree before their times mean anything
        with torch.no_grad():
            ours, theirs = (ways[way](*tensors).float() for way in ("ours", "flex_128"))
        found["difference"] = (ours - theirs).abs().max().item()
        return rounded(found)


def rounded(x: Any) -> Any:
    """The same with its numbers to four digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured, each with the model's prediction."""
    packed = args.heads // args.kv_heads % 4 == 0
    plan = PLANS["ours, 4 heads packed" if packed else "ours"]
    found = []
    for length in args.lengths:
        for s, w in PATTERNS:
            work = count(plan, s, w, length, args.heads, args.kv_heads, args.head_dim)
            bound = [
                times(work, plan, DEVICES[1], args.head_dim, b)[0] * 1e3 for b in (False, True)
            ]
            bounds = {name: round(ms, 4) for name, ms in zip(PASSES, bound, strict=True)}
            found.append({"length": length, "sink": s, "window": w, "h200_bound_ms": bounds})
    return found


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What was aimed at on an H200, and whether it was met."""
    lines = []
    for row in rows:
        pattern = (row["sink"], row["window"])
        aim = {(64, 256): 1.3, (4, 64): 1.7}.get(pattern)
        for name in PASSES:
            where = f"{row['length']} tokens, {pattern}, {name}"
            mine = row["ours"][name]
            if aim and row["length"] >= 16384 and name in row.get("flex", {}):
                ratio, over = row["flex"][name] / mine, mine / row["h200_bound_ms"][name]
                lines.append(f"{where}: {ratio:.2f} x faster than flex (aim: {aim} or more)")
                lines.append(f"{where}: {over:.2f} x the H200's roofline (aim: 2 or less)")
            if "hybrid" in row and row["length"] >= 131072:
                part = row["hybrid"][name] / row["dense"][name]
                lines.append(f"{where}: half streaming takes {part:.3f} of dense (aim: 0.52)")
    return lines


def plot(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Time over length, one picture for each pattern."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for s, w in PATTERNS:
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        mine = [row for row in rows if (row["sink"], row["window"]) == (s, w)]
        mine.sort(key=lambda row: row["length"])
        for axis, name in zip(axes, PASSES, strict=True):
            for way in ("ours", "flex", "dense", "hybrid", "h200_bound_ms"):
                points = [(r["length"], r[way][name]) for r in mine if name in r.get(way, {})]
                if points:
                    axis.loglog(*zip(*points, strict=True), marker="o", label=way)
            axis.set(title=f"sink {s}, window {w}: {name}", xlabel="tokens", ylabel="ms")
            axis.legend()
        figure.savefig(folder / f"streaming_{s}_{w}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on."""
    import triton

    return {
        "device": "dry run on a CPU" if args.dry_run else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": str(datetime.date.today()),
        "shape": f"{args.heads} heads, {args.kv_heads} kv heads, head_dim {args.head_dim}, batch 1",
        "timing": "milliseconds, medians of runs in turns on the GPU, the L2 emptied before each",
    }


def main() -> None:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3600, help="start no case after these")
    parser.add_argument("--warm", action="store_true", help="compile alone, for a later run")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--save", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path, help="a folder for the plots")
    args = parser.parse_args()
    if args.dry_run:
        args.lengths, args.heads, args.kv_heads, args.head_dim = [256, 128], 4, 2, 32
    started = time.perf_counter()
    record = about(args)
    print(record, flush=True)
    bench, rows = Bench(args), []
    left = cases(args)
    if args.warm:  # patterns share their kernels
        for case in left[:: len(PATTERNS)]:
            bench.measure(case)
        return
    while left and time.perf_counter() - started < args.seconds:
        case = left.pop(0)
        rows.append(case | bench.measure(case))
        print(json.dumps(rows[-1]), flush=True)
        cannot = {", ".join(what): why for what, why in bench.cannot.items()}
        record |= {"cannot": cannot, "verdicts": verdicts(rows), "rows": rows}
        if args.save:  # after every case: an interrupted run keeps what it has
            args.save.parent.mkdir(parents=True, exist_ok=True)
            args.save.write_text(json.dumps(record, indent=1) + "\n")
    print(*verdicts(rows), f"{len(left)} cases left out for time", sep="\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
