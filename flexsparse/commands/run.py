"""`flexsparse run`: a mask on random tensors, checked against the reference and timed."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from flexsparse.benchmark.harness import first_call
from flexsparse.commands.arguments import (
    CommandError,
    dense_attention,
    device_here,
    device_text,
    free_bytes,
    medians,
    positive,
    ratio,
    read_heads,
    waiting,
)
from flexsparse.commands.show import add_mask_arguments, compiled_from
from flexsparse.compiler import CompiledMask
from flexsparse.cost import time_text
from flexsparse.heads import PerHead

# the largest error of an output, relative to the largest output, that still counts as equal
ALLOWED_ERROR = {"float32": 1e-5, "bfloat16": 2**-6, "float16": 2**-9}
REFERENCE_COPIES = 5  # of the float32 scores that the reference holds at once, at most


def add_to(commands: Any) -> None:
    """Add this command to those of the parser."""
    parser = commands.add_parser(
        "run",
        help="run a mask on random tensors: check it and time it",
        description="Compile a mask, run it on random tensors on the device that is there, check "
        "the output against the dense float32 reference, and time it beside torch's own dense "
        "attention.",
    )
    add_mask_arguments(parser)
    parser.add_argument("--batch", type=positive, default=1, help="batch rows (default: 1)")
    parser.add_argument(
        "--heads", type=positive, help="query heads (default: those of the mask, or 8)"
    )
    parser.add_argument("--kv-heads", type=positive, help="kv heads (default: as many)")
    parser.add_argument("--head-dim", type=positive, default=64, help="(default: 64)")
    parser.add_argument(
        "--dtype", choices=list(ALLOWED_ERROR), default="float32", help="(default: float32)"
    )
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Run, check and time a mask; 1 if its output is not the reference's."""
    device = device_here()
    mask = read_heads(args.mask)
    n_heads = args.heads or (mask.n_heads if isinstance(mask, PerHead) else 8)
    q, k, v = _random_tensors(args, n_heads, device)
    attend = compiled_from(args, mask, n_heads, str(device))
    print(attend)
    print(
        f"\nOn {device_text(device)}: q {list(q.shape)}, k and v {list(k.shape)}, {args.dtype}, "
        "random."
    )
    with waiting("Compiling kernels"):
        out, first_ms = first_call(lambda: attend(q, k, v), device)
    first = time_text(first_ms / 1e3)
    print(f"  first call      {first:>10}   kernels compiled for this structure of mask")

    square = q.shape[2] == k.shape[2]
    with waiting("Timing"):
        (ours, dense), runs = medians(
            [lambda: attend(q, k, v), lambda: dense_attention(q, k, v, causal=square)], device
        )
    kind = "causal" if square else "no mask"
    print(f"  this mask       {time_text(ours):>10}   median of {runs} calls")
    print(f"  dense attention {time_text(dense):>10}   torch's own, {kind}, in turns with ours")
    print(f"  this mask is {ratio(ours, dense)} dense attention")
    return _check(attend, q, k, v, out, ALLOWED_ERROR[args.dtype])


def _random_tensors(
    args: argparse.Namespace, n_heads: int, device: torch.device
) -> tuple[Tensor, ...]:
    dtype = getattr(torch, args.dtype)
    kv_heads = args.kv_heads or n_heads
    shapes = [
        (args.batch, heads, n, args.head_dim)
        for heads, n in (
            (n_heads, args.q_len or args.kv_len),
            (kv_heads, args.kv_len),
            (kv_heads, args.kv_len),
        )
    ]
    # q, k, v, and outputs: ours twice and the dense one
    need = 3 * sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    free = free_bytes(device)
    if need > free:
        raise CommandError(
            f"q, k, v and the outputs take {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are "
            "free; make --len, --heads or --batch smaller."
        )
    generator = torch.Generator(device).manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes
    )


def _check(
    attend: CompiledMask, q: Tensor, k: Tensor, v: Tensor, out: Tensor, allowed: float
) -> int:
    """Compare an output with the reference where that fits in memory, and say what was found."""
    group_size = q.shape[1] // k.shape[1]
    # heads and batch rows that share a mask can be checked one by one, in less memory
    whole = attend.n_heads is not None or attend.batch is not None
    planes = q.shape[0] * q.shape[1] if whole else group_size
    need = REFERENCE_COPIES * 4 * planes * q.shape[2] * k.shape[2]
    free = free_bytes(q.device)
    if need > free * 0.8:
        print(
            f"  not checked: the dense reference takes {need / 2**30:.1f} GiB at these lengths, "
            f"and {free / 2**30:.1f} GiB are free; a shorter --len is checked"
        )
        return 0
    if whole:
        parts = [(slice(None), slice(None), slice(None))]
    else:
        parts = [
            (slice(b, b + 1), slice(n * group_size, (n + 1) * group_size), slice(n, n + 1))
            for b in range(q.shape[0])
            for n in range(k.shape[1])
        ]
    error = largest = 0.0
    with waiting("Checking", len(parts)) as progress:
        for b, heads, kv_heads in parts:
            expected = attend(q[b, heads], k[b, kv_heads], v[b, kv_heads], executor="reference")
            error = max(error, float((out[b, heads] - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            progress.tick()
    relative = error / largest if largest else error
    agrees = relative <= allowed
    print(
        f"  {'agrees' if agrees else 'DOES NOT AGREE'} with the dense reference: the largest "
        f"error is {error:.1e}, {relative:.1e} of the largest output ({allowed:.0e} is allowed)"
    )
    return 0 if agrees else 1
