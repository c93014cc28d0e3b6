"""From mask to BlockMask: time and peak memory, ours against torch's create_block_mask.

Every row is measured in a process of its own, so that its peak memory is its own; a baseline and
ours at one length run one after the other on the same machine. Run it with

    python benchmarks/bench_compile.py            # writes benchmarks/results/compile.json and .png
    python benchmarks/bench_compile.py --quick    # up to 16K, a minute
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask

import flexsparse
from flexsparse import PerHead, compile_mask, per_head
from flexsparse.benchmark.case import bytes_of
from flexsparse.benchmark.harness import device_name
from flexsparse.masks import causal, dilated, prefix, same_document, sink, window

RESULTS = Path(__file__).parent / "results"
K = 1024
STREAMING = causal & (sink(64) | window(256))


def documents(n: int):
    """Packed documents of 700 to 6,000 tokens each."""
    lengths = torch.randint(700, 6000, (n // 700 + 1,), generator=torch.Generator().manual_seed(0))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[:n]
    return same_document(ids) & causal


def traced_documents(n: int):
    """The same packed documents as a mask_mod function, as the FlexAttention blog writes it."""
    ids = documents(n).tables[0].tensor

    def mask_mod(b, h, q_idx, kv_idx):
        return (ids[q_idx] == ids[kv_idx]) & (q_idx >= kv_idx)

    return mask_mod


def one(mask):
    return lambda n: mask


MASKS = {
    "causal": one(causal),
    "causal & window(512)": one(causal & window(512)),
    "causal & (sink(64) | window(256))": one(STREAMING),
    "packed documents & causal": documents,
    "prefix(1024)": one(prefix(1024)),
    "causal & dilated(512, 3)": one(causal & dilated(512, 3)),
    "a mask_mod: documents & causal": traced_documents,
    "32 heads: 8 causal, 24 streaming": one(per_head([causal] * 8 + [STREAMING] * 24)),
}
LONGEST = {"causal & dilated(512, 3)": 256 * K, "32 heads: 8 causal, 24 streaming": 128 * K}
TORCH_LENGTHS = {"torch eager": [8 * K, 16 * K], "torch compiled": [8 * K, 16 * K, 32 * K, 64 * K]}
OUR_LENGTHS = [8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K, 1024 * K]


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory held above what was held on entry, sampled every half millisecond."""

    def __enter__(self) -> Peak:
        self.start = self.most = resident()
        self.running = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        """Keep the largest figure until told to stop."""
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.bytes = max(self.most, resident()) - self.start


def measure(name: str, system: str, n: int) -> dict:
    """One row: seconds of the first call and the median of the next, and peak memory."""
    mask = MASKS[name](n)
    n_heads = getattr(mask, "n_heads", None)
    if system == "flexsparse plan":

        def build():
            return compile_mask(mask, n, n, device="cpu")
    elif system == "flexsparse":

        def build():
            if isinstance(mask, PerHead):
                return compile_mask(mask, n, n, device="cpu").block_mask
            return flexsparse.create_block_mask(mask, None, None, n, n, "cpu")
    else:
        mask_mod = mask.mask(torch.device("cpu")) if n_heads else mask
        function = (
            torch.compile(create_block_mask) if system == "torch compiled" else create_block_mask
        )

        def build():
            return function(mask_mod, None, n_heads, n, n, "cpu")

    compile_mask(causal, 128, 128)  # what any first call in a process pays for, on both sides
    with Peak() as peak:
        started = time.perf_counter()
        result = build()
        first = time.perf_counter() - started
    size = 0 if system == "flexsparse plan" else bytes_of(result)
    del result
    times = []
    while len(times) < 3 or (sum(times) < 1 and len(times) < 200):
        if sum(times) > 5:
            break  # seconds a run: one more says nothing new
        started = time.perf_counter()
        build()
        times.append(time.perf_counter() - started)
    row = {
        "mask": name,
        "system": system,
        "tokens": n,
        "seconds": sorted(times)[len(times) // 2],
        "first_seconds": first,
        "result_bytes": size,
        "peak_bytes": peak.bytes,
        "runs": len(times),
    }
    if system == "flexsparse" and name == "causal":
        row["write_seconds"] = write_time(size)
    return row


def write_time(size: int) -> float:
    """Seconds to fill new memory of the size of the result: the least that making it can take."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.empty(size // 4, dtype=torch.int32).fill_(1)
        times.append(time.perf_counter() - started)
    return sorted(times)[2]


def jobs(quick: bool) -> list[tuple[str, str, int]]:
    found = []
    for name in MASKS:
        heads = "32 heads" in name
        lengths = [(n, "flexsparse") for n in OUR_LENGTHS if n <= LONGEST.get(name, 1024 * K)]
        for system, theirs in TORCH_LENGTHS.items():
            # with 32 heads torch evaluates 32 masks: 21 GiB at 8K when eager
            lengths += [
                (n, system) for n in theirs if not heads or (n <= 8 * K and system != "torch eager")
            ]
        if heads:
            # the plan that runs keeps lists for each distinct mask, not for each head
            lengths += [(n, "flexsparse plan") for n in OUR_LENGTHS]
        if "a mask_mod" in name:
            lengths.append((128 * K, "torch compiled"))
        found += [
            (name, system, n) for n, system in sorted(lengths) if n <= (16 * K if quick else n)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="lengths up to 16K")
    parser.add_argument("--mask", choices=MASKS, help="measure all rows of one mask again")
    parser.add_argument(
        "--row", nargs=3, metavar=("MASK", "SYSTEM", "TOKENS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.row:
        name, system, n = options.row
        print(json.dumps(measure(name, system, int(n))))
        return
    rows = []
    for name, system, n in jobs(options.quick):
        if options.mask not in (None, name):
            continue
        command = [sys.executable, __file__, "--row", name, system, str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"killed ({done.returncode})"])[-1]
            row = {"mask": name, "system": system, "tokens": n, "error": error}
        else:
            row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        took = (
            f"{row['seconds'] * 1e3:10.1f} ms {row['peak_bytes'] / 2**20:8.0f} MiB"
            if "seconds" in row
            else row["error"]
        )
        print(f"{name:36} {system:15} {n:9,} {took}", flush=True)
    report = {
        "benchmark": "compile",
        "command": "python benchmarks/bench_compile.py" + (" --quick" if options.quick else ""),
        "date": datetime.date.today().isoformat(),
        "device": f"{torch.get_num_threads()} threads of {device_name(torch.device('cpu'))}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    if options.quick:
        return
    if options.mask:
        # the rows of one mask are one run of their own; the date and command above are the others'
        again = f"python benchmarks/bench_compile.py --mask {options.mask!r}"
        report = json.loads((RESULTS / "compile.json").read_text())
        kept = [row for row in report["rows"] if row["mask"] != options.mask]
        report["rows"] = kept + [{**row, "command": again} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compile.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report)


def plot(report: dict) -> None:
    """Time against length, a panel for each mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(15, 6.5), sharex=True, sharey=True)
    styles = {
        "torch eager": ("tab:gray", "s-"),
        "torch compiled": ("tab:orange", "^-"),
        "flexsparse": ("tab:blue", "o-"),
        "flexsparse plan": ("tab:blue", "D--"),
    }
    for ax, name in zip(axes.flat, MASKS, strict=False):
        for system, (color, style) in styles.items():
            rows = [
                r
                for r in report["rows"]
                if (r["mask"], r["system"]) == (name, system) and "seconds" in r
            ]
            if rows:
                ax.loglog(
                    [r["tokens"] for r in rows],
                    [r["seconds"] * 1e3 for r in rows],
                    style,
                    color=color,
                    label=system,
                )
        ax.set_title(name, fontsize=9)
        ax.grid(alpha=0.3)
        ax.set_xticks([8 * K, 64 * K, 1024 * K], ["8K", "64K", "1M"])
    for ax in (axes.flat[0], axes.flat[-1]):
        ax.legend(loc="upper right", fontsize=8)
    figure.supylabel("mask to BlockMask, ms")
    figure.supxlabel("tokens (q_len = kv_len)")
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {report['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "compile.png", dpi=110)


if __name__ == "__main__":
    main()
