"""Block-sparse attention against dense: relative run time by sparsity, as its library publishes it.

A causal call of block_sparse_attn_func (all heads of type 1, a random base_blockmask) against dense
causal attention of the same q, k and v, forward and forward + backward. Sparsity is the share of
the causal triangle's blocks that is left out; dense work times (1 - sparsity) is the ideal line.
Dense and sparse take turns, and a time is the median of the repeats. Calls are timed whole, the
look-up of the plan included; the first one with a mask, which makes the plan and may compile a
kernel, is first_call_s. On CPU dense is scaled_dot_product_attention, in float32. On a GPU it is
that too, and apart from it FlashAttention-2 (its FLASH_ATTENTION backend), in float16.

    python benchmarks/bench_block_sparse.py           # writes results/block_sparse.json and .png
    python benchmarks/bench_block_sparse.py --quick   # one short length, a minute, no files

Block-Sparse-Attention publishes, for an A100 at 90 %: 0.18 at 16K and 0.13 at 64K, forward.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexsparse.benchmark.harness import device_name, first_call
from flexsparse.compat.block_sparse_attn import block_sparse_attn_func

RESULTS = Path(__file__).parent / "results"
K = 1024
BLOCK = 128
SPARSITIES = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
#          lengths, heads, head_dim, dtype
USUAL = (
    ([8 * K, 16 * K, 32 * K, 64 * K], 32, 128, torch.float16)
    if ON_GPU
    else ([4 * K, 8 * K], 8, 128, torch.float32)
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_blocks(n: int, heads: int, sparsity: float, one_for_all: bool) -> Tensor:
    """[1, heads, n, n]: of each row of the triangle as many blocks as its share, at least one."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(1 if one_for_all else heads, n, n, dtype=torch.bool)
    for mask in masks:
        for row in range(n):
            count = max(1, round((1 - sparsity) * (row + 1)))
            mask[row, torch.randperm(row + 1, generator=generator)[:count]] = True
    return masks.expand(heads, n, n)[None].to(DEVICE)


def sparse(blocks: Tensor, length: int) -> Attend:
    """block_sparse_attn_func of q, k and v [tokens, heads, D]."""
    heads = blocks.shape[1]
    types = torch.ones(heads, dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([0, length], dtype=torch.int32, device=DEVICE)
    return lambda q, k, v: block_sparse_attn_func(
        q, k, v, ends, ends, types, None, blocks, length, length, 0.0, is_causal=True
    )


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return dense(q, k, v)


def forward(attend: Attend, qkv: list[Tensor], weights: Tensor) -> None:
    attend(*[x.detach() for x in qkv])


def forward_backward(attend: Attend, qkv: list[Tensor], weights: Tensor) -> None:
    torch.autograd.grad(attend(*qkv), qkv, weights)


def seconds(run: Callable[[], None]) -> float:
    return first_call(run, torch.device(DEVICE))[1] / 1e3


def measure(
    length: int, heads: int, head_dim: int, dtype: torch.dtype, sparsity: float, options: object
) -> list[dict]:
    """Rows of one length and sparsity: forward, and forward + backward."""
    torch.manual_seed(0)
    qkv = [
        torch.randn(length, heads, head_dim, device=DEVICE, dtype=dtype, requires_grad=True)
        for _ in range(3)
    ]
    weights = torch.randn_like(qkv[0])
    n = length // BLOCK
    blocks = random_blocks(n, heads, sparsity, options.one_mask)
    kept = float(blocks.sum() / (heads * n * (n + 1) / 2))
    systems: dict[str, Attend] = {"flexsparse": sparse(blocks, length), "sdpa": dense}
    if ON_GPU:
        systems["flash_attention_2"] = flash
    rows = []
    for phase in (forward, forward_backward):
        # the first call of a mask makes its plan, and may compile a kernel
        first = seconds(lambda phase=phase: phase(systems["flexsparse"], qkv, weights))
        taken: dict[str, list[float]] = {name: [] for name in systems}
        for turn in range(options.repeats + 1):
            for name, attend in systems.items():
                spent = seconds(lambda a=attend, phase=phase: phase(a, qkv, weights))
                if turn:  # the first turn warms up
                    taken[name].append(spent)
        medians = {name: statistics.median(times) for name, times in taken.items()}
        row = {
            "tokens": length,
            "phase": phase.__name__,
            "sparsity": round(1 - kept, 4),
            "first_call_s": round(first, 4),
            **{f"{name}_s": round(value, 6) for name, value in medians.items()},
            **{
                f"relative_to_{name}": round(medians["flexsparse"] / value, 4)
                for name, value in medians.items()
                if name != "flexsparse"
            },
            "ideal": round(kept, 4),
        }
        rows.append(row)
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    return rows


def main() -> None:
    lengths, heads, head_dim, dtype = USUAL
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, few sparsities")
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="multiples of 128")
    parser.add_argument("--heads", type=int, default=heads)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one-mask", action="store_true", help="one mask for all heads, as theirs")
    options = parser.parse_args()
    sparsities = SPARSITIES
    if options.quick:
        options.lengths, options.repeats, sparsities = [K], 3, [0.0, 0.5, 0.9]
    rows = [
        row
        for length in options.lengths
        for sparsity in sparsities
        for row in measure(length, options.heads, head_dim, dtype, sparsity, options)
    ]
    if options.quick:
        return
    device = device_name(torch.device(DEVICE))
    report = {
        "benchmark": "block_sparse",
        "command": " ".join(["python benchmarks/bench_block_sparse.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": device if ON_GPU else f"{torch.get_num_threads()} threads of {device}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "heads": options.heads,
        "head_dim": head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    name = "block_sparse_gpu" if ON_GPU else "block_sparse"
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, RESULTS / f"{name}.png")


def plot(report: dict, path: Path) -> None:
    """Relative run time against sparsity, a panel for each phase, and the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    baseline = "flash_attention_2" if ON_GPU else "sdpa"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for ax, phase in zip(axes, ("forward", "forward_backward"), strict=True):
        for length in sorted({row["tokens"] for row in report["rows"]}):
            rows = [
                row for row in report["rows"] if (row["tokens"], row["phase"]) == (length, phase)
            ]
            x = [100 * row["sparsity"] for row in rows]
            y = [row[f"relative_to_{baseline}"] for row in rows]
            ax.plot(x, y, marker="o", label=f"{length:,} tokens")
        ax.plot([0, 100], [1, 0], color="tab:gray", linestyle="--", label="ideal: 1 - sparsity")
        ax.set_title(phase.replace("_", " + "), fontsize=10)
        ax.set_xlabel("blocks left out of the causal triangle, %")
        ax.grid(alpha=0.3)
    highest = max(row[f"relative_to_{baseline}"] for row in report["rows"])
    axes[0].set_ylim(0, max(1.0, highest) * 1.05)
    axes[0].set_ylabel(f"run time / dense causal ({baseline})")
    axes[0].legend(fontsize=8)
    shape = f"{report['heads']} heads, D {report['head_dim']}, {report['dtype']}"
    figure.suptitle(f"{report['device']}, torch {report['torch']}, {shape}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
