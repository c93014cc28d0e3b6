"""What another mask costs: the first call of the n-th one, and numbers as data against constants.

Three questions, each row in a process of its own with an empty cache of compiled code:

    first calls   the n-th mask of a process, ours against raw torch.compile(flex_attention) with
                  mask_mod closures, which compiles each structure (with dynamic=False each number)
                  and runs dense once dynamo's recompile limit (8) is met
    constants     a kernel that reads the numbers of its mask, against one that has them compiled in
    terms         a kernel with the whole mask, against one with only what matters inside the
                  partial blocks; both have the same block lists

    python benchmarks/bench_recompile.py            # writes results/recompile.json and .png
    python benchmarks/bench_recompile.py --quick    # 10 masks instead of 32; writes nothing
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import and_masks, create_block_mask, or_masks

from flexsparse import compile_mask, kv_idx
from flexsparse.benchmark.harness import device_name
from flexsparse.executors import flex
from flexsparse.lower import lower
from flexsparse.masks import block_sparse, causal, chunked, local_stride, sink, strided, window

RESULTS = Path(__file__).parent / "results"
# transformers and attention-gym compile it with dynamic=False
SYSTEMS = {
    "flexsparse": None,
    "torch.compile(flex_attention)": None,
    "torch.compile(flex_attention, dynamic=False)": False,
}
N_MASKS = 32
CALLS = 200  # of each kernel, alternating


# the patterns as mask_mods over Python ints, as users of FlexAttention write them
def causal_mod(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def window_mod(size):
    return lambda b, h, q_idx, kv_idx: q_idx - kv_idx < size


def sink_mod(size):
    return lambda b, h, q_idx, kv_idx: kv_idx < size


def strided_mod(stride):
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % stride == 0


def chunked_mod(size):
    return lambda b, h, q_idx, kv_idx: q_idx // size == kv_idx // size


def summaries_mod(stride):
    return lambda b, h, q_idx, kv_idx: kv_idx % stride == stride - 1


def local_stride_mod(local_blocks, vert_stride, block_size):
    def mask_mod(b, h, q_idx, kv_idx):
        q_block, kv_block = q_idx // block_size, kv_idx // block_size
        return (q_block - kv_block < local_blocks) | (kv_block % vert_stride == 0)

    return mask_mod


def summaries(stride):
    """The last key of every `stride`."""
    return (kv_idx % stride).equals(stride - 1)


TERMS = [
    (window(100), window_mod(100)),
    (sink(8), sink_mod(8)),
    (strided(7), strided_mod(7)),
    (chunked(64), chunked_mod(64)),
    (summaries(16), summaries_mod(16)),
    (local_stride(1, 5, 16), local_stride_mod(1, 5, 16)),
]


def windows(system: str) -> list:
    """Masks of one structure and different numbers."""
    sizes = [40 + 13 * n for n in range(N_MASKS)]
    if system == "flexsparse":
        return [causal & window(size) for size in sizes]
    return [and_masks(causal_mod, window_mod(size)) for size in sizes]


def structures(system: str) -> list:
    """Masks of different structures: causal, and any of some terms."""
    subsets = [subset for n in range(1, len(TERMS)) for subset in itertools.combinations(TERMS, n)][
        :N_MASKS
    ]
    if system == "flexsparse":
        return [causal & functools.reduce(lambda a, b: a | b, [m for m, _ in x]) for x in subsets]
    return [and_masks(causal_mod, or_masks(*[mod for _, mod in x])) for x in subsets]


SERIES = {"windows": windows, "structures": structures}


def inputs(n: int) -> list[torch.Tensor]:
    return [torch.randn(1, 4, n, 64) for _ in range(3)]


def timed(call) -> tuple[float, object]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def first_calls(series: str, system: str, n_masks: int) -> list[dict]:
    """Seconds of the first call of each mask in turn, its BlockMask included, and of later ones."""
    q, k, v = inputs(1024)
    raw = torch.compile(torch_flex.flex_attention, dynamic=SYSTEMS[system])

    def prepared(mask):
        if system == "flexsparse":
            return functools.partial(compile_mask(mask, 1024, 1024), q, k, v)
        lists = create_block_mask(mask, None, None, 1024, 1024, "cpu")
        return functools.partial(raw, q, k, v, block_mask=lists)

    rows = []
    for n, mask in enumerate(SERIES[series](system)[:n_masks], 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch_flex._WARNINGS_SHOWN.clear()
            made, call = timed(lambda m=mask: prepared(m))
            try:
                first, out = timed(call)
            except Exception as error:  # some masks do not compile in C++ (torch 2.13)
                rows.append({"n": n, "error": str(error).strip().splitlines()[0]})
                continue
        later = statistics.median(timed(call)[0] for _ in range(9))
        zero, tokens = torch.tensor(0), torch.arange(1024)
        kept = mask(zero, zero, tokens[:, None], tokens)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
        rows.append(
            {
                "n": n,
                "mask_seconds": made,
                "first_seconds": made + first,
                "later_seconds": later,
                "is_dense": any("unfused" in str(x.message) for x in caught),
            }
        )
    return rows


# numbers written out: torch takes those of closures as data where lengths are
def window_256(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 256)


def sink_64_window_256(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((kv_idx < 64) | (q_idx - kv_idx < 256))


def local_stride_4_8_64(b, h, q_idx, kv_idx):
    q_block, kv_block = q_idx // 64, kv_idx // 64
    return (q_idx >= kv_idx) & ((q_block - kv_block < 4) | (kv_block % 8 == 0))


def strided_7(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((q_idx - kv_idx) % 7 == 0)


#        as ours, with constants; nearly all blocks of the last are partial
CONSTANTS = {
    "causal & window(256)": (causal & window(256), window_256),
    "causal & (sink(64) | window(256))": (
        causal & (sink(64) | window(256)),
        sink_64_window_256,
    ),
    "local_stride(4, 8, 64)": (local_stride(4, 8, 64), local_stride_4_8_64),
    "causal & strided(7)": (causal & strided(7), strided_7),
}


def kernel(dynamic: bool):
    """A compiled flex_attention whose cache is its own."""

    def attend(q, k, v, block_mask):
        return torch_flex.flex_attention(q, k, v, block_mask=block_mask)

    own = types.FunctionType(attend.__code__.replace(), attend.__globals__)
    return torch.compile(own, dynamic=dynamic, fullgraph=True)


def constants(name: str) -> dict:
    """Milliseconds of kernels for one mask: numbers as data or constants, lengths likewise."""
    mask, mask_mod = CONSTANTS[name]
    data = compile_mask(mask, 4096, 4096).block_mask
    baked = copy.copy(data)
    baked.mask_mod = mask_mod
    return alternating(
        {
            "data": (kernel(True), data),
            "constants": (kernel(True), baked),
            "data, fixed lengths": (kernel(False), data),
            "constants, fixed lengths": (kernel(False), baked),
        }
    )


KEPT = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.3
#        the whole mask; inside its partial blocks `causal` says all
DROPPED = {
    "local_stride(4, 8, 128)": local_stride(4, 8, 128),
    "causal & block_sparse(30 % of blocks)": causal & block_sparse(KEPT | torch.eye(32).bool()),
}


def terms(name: str) -> dict:
    """Milliseconds of kernels with all terms of a mask and with those that matter alone."""
    whole = compile_mask(DROPPED[name], 4096, 4096).block_mask
    less = copy.copy(whole)
    less.mask_mod = lower(causal, torch.device("cpu"))

    def run(q, k, v, block_mask):
        return flex.run(q, k, v, block_mask)[0]

    return alternating({"whole mask": (run, whole), "causal alone": (run, less)})


def alternating(kernels: dict) -> dict:
    """The median of each kernel, and of its ratio to the first in the same round."""
    q, k, v = inputs(4096)
    outs = [run(q, k, v, lists) for run, lists in kernels.values()]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in kernels}
    deadline = time.perf_counter() + 60
    while len(times[next(iter(times))]) < CALLS and time.perf_counter() < deadline:
        for name, (run, lists) in kernels.items():
            times[name].append(timed(lambda r=run, m=lists: r(q, k, v, m))[0])
    base = next(iter(times))
    return {
        name: {
            "ms": statistics.median(values) * 1e3,
            "ratio": statistics.median(x / y for x, y in zip(values, times[base], strict=True)),
            "rounds": len(values),
        }
        for name, values in times.items()
    }


def jobs() -> list[tuple[str, ...]]:
    found = [("first calls", series, system) for series in SERIES for system in SYSTEMS]
    found += [("constants", name) for name in CONSTANTS]
    return found + [("terms", name) for name in DROPPED]


def measure(job: list[str], n_masks: int) -> object:
    question, name, *system = job
    if question == "first calls":
        return first_calls(name, system[0], n_masks)
    return constants(name) if question == "constants" else terms(name)


def in_a_process(job: tuple[str, ...], n_masks: int) -> dict:
    """One job, with nothing compiled before."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, "--masks", str(n_masks), "--job", *job],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )
    if done.returncode:
        return {"job": job, "error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    return {"job": job, "result": json.loads(done.stdout.splitlines()[-1])}


def shown(row: dict) -> str:
    """A row of results in a line."""
    if "error" in row:
        return row["error"]
    result = row["result"]
    if isinstance(result, dict):
        return ", ".join(f"{k} {v['ms']:.2f} ms ({v['ratio']:.3f})" for k, v in result.items())
    ran = [x for x in result if "error" not in x]
    first = ", ".join(f"{x['n']}: {x['first_seconds']:.3f}" for x in (*ran[:3], ran[-1]))
    dense = [x["n"] for x in ran if x["is_dense"]]
    return (
        f"first call, s: {first}; then {ran[0]['later_seconds'] * 1e3:.1f} to "
        f"{ran[-1]['later_seconds'] * 1e3:.1f} ms"
        + f"; dense from mask {dense[0] if dense else 0}" * bool(dense)
        + f"; {len(result) - len(ran)} did not compile" * (len(ran) < len(result))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 masks, and write nothing")
    parser.add_argument(
        "--only", default="", help="measure the rows with this in their name, and keep the others"
    )
    parser.add_argument("--masks", type=int, default=N_MASKS, help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.job, options.masks)))
        return
    path = RESULTS / "recompile.json"
    rows = []
    if options.only and path.exists():
        kept = json.loads(path.read_text())["rows"]
        rows = [row for row in kept if options.only not in ", ".join(row["job"])]
    for job in jobs():
        if options.only not in ", ".join(job):
            continue
        rows.append(in_a_process(job, 10 if options.quick else N_MASKS))
        print(f"{', '.join(job):60} {shown(rows[-1])}", flush=True)
    if options.quick:
        return
    report = {
        "benchmark": "recompile",
        "command": "python benchmarks/bench_recompile.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{torch.get_num_threads()} threads of {device_name(torch.device('cpu'))}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot(report)


def plot(report: dict) -> None:
    """The first call and the later calls against the number of the mask."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, sharey="row")
    colors = dict(zip(SYSTEMS, ("tab:blue", "tab:orange", "tab:gray"), strict=True))
    for row in report["rows"]:
        if row["job"][0] != "first calls" or "error" in row:
            continue
        _, series, system = row["job"]
        column = list(SERIES).index(series)
        for place, field in enumerate(("first_seconds", "later_seconds")):
            ran = [x for x in row["result"] if "error" not in x]
            axes[place, column].semilogy(
                [x["n"] for x in ran],
                [x[field] * 1e3 for x in ran],
                marker="o",
                markersize=3,
                color=colors[system],
                label=system,
            )
    for column, title in enumerate(("one structure, other numbers", "other structures")):
        axes[0, column].set_title(title, fontsize=9)
        axes[1, column].set_xlabel("number of the mask in its process")
    axes[0, 0].set_ylabel("first call, BlockMask included, ms")
    axes[1, 0].set_ylabel("later calls, ms")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    if axes[0, 0].lines:
        axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"1,024 tokens, 4 heads of 64; {report['device']}, torch {report['torch']}, "
        f"{report['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(RESULTS / "recompile.png", dpi=110)


if __name__ == "__main__":
    main()
