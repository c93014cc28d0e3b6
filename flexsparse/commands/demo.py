"""`flexsparse demo`: a pattern of its own for every head of a real language model, measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.benchmark.harness import first_call
from flexsparse.commands.arguments import (
    dense_attention,
    device_here,
    device_text,
    fraction,
    medians,
    positive,
    ratio,
)
from flexsparse.commands.real_model import Layer, add_model_argument, layers_of, model_name
from flexsparse.compiler import compile_mask
from flexsparse.cost import time_text
from flexsparse.expr import Mask
from flexsparse.heads import per_head
from flexsparse.masks import causal, sink, window
from flexsparse.progress import Progress
from flexsparse.report import table
from flexsparse.text import amount, named_text

ELEMENTS_AT_ONCE = 1 << 22
WINDOWS = (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
SAMPLE = 8  # patterns are tried on every 8th query
SINKS = (4, 128)

COLUMNS = """
How to read the tables, a line for each query head:
  pattern         which keys a query sees: `causal` is all before it, `sink(n)` the first n tokens
                  of the text, `window(n)` the n most recent; `&` is and, `|` is or
  blocks          how many 128 x 128 blocks of attention scores are computed
  of causal       the same as a part of what dense causal attention computes
  mass kept       how much of the dense attention weight falls on keys the pattern keeps, mean
                  over all queries (100 % means that nothing is lost)
  output error    |sparse - dense| / |dense|, of the head's output
"""

NEXT = """
Try next:
  flexsparse demo{source} --keep 0.99                 lose less, compute more
  flexsparse demo{source} --len 8192                  longer text: the sparse share falls
  flexsparse show "causal & (sink(64) | window(256))" --len 131072     draw a mask
  flexsparse run "causal & (sink(64) | window(256))" --len 8192        check and time one
In Python:  attend = flexsparse.compile_mask(flexsparse.per_head(patterns), q_len, kv_len)
            out = attend(q, k, v)"""


class Choice(NamedTuple):
    """The pattern of a head, with the blocks it computes and the attention mass it keeps."""

    pattern: Mask
    blocks: int
    mass: float


def add_to(commands: Any) -> None:
    """Add this command to those of the parser."""
    parser = commands.add_parser(
        "demo",
        help="give each head of a real model its own pattern",
        description="Take q, k and v of three layers of a language model on real text, give each "
        "head the cheapest pattern that keeps most of its attention, run them, and compare with "
        "dense attention.",
    )
    which = parser.add_mutually_exclusive_group()
    add_model_argument(which)
    which.add_argument("--synthetic", action="store_true", help="random tensors, no model")
    parser.add_argument("--len", type=positive, default=4096, help="tokens (default: 4096)")
    parser.add_argument(
        "--keep",
        type=fraction,
        default=0.9,
        help="attention mass a head's pattern must keep, 0 to 1 (default: 0.9)",
    )
    parser.set_defaults(command=demo)


def demo(args: argparse.Namespace) -> int:
    """Run the demo and print its tables."""
    device = device_here()
    model = "random tensors" if args.synthetic else model_name(args.model)
    print(
        f"flexsparse demo: {model}, {amount(args.len, 'token')}, on {device_text(device)}.\n"
        "Each attention head gets the cheapest of a list of sparse patterns that keeps "
        f"{args.keep:.0%} of its\nattention (tried on every {SAMPLE}th query). All heads then run "
        "in one call, beside dense\nattention on the same inputs.",
        flush=True,
    )
    if args.synthetic:
        layers = [synthetic_layer(args.len, device)]
    else:
        layers = layers_of(args.model, args.len, device)
    with Progress("Choosing patterns", len(layers)) as progress:
        chosen = []
        for layer in layers:
            progress.step(layer.name)
            chosen.append(choose(layer, _patterns(args.len), args.keep))
    print(COLUMNS, flush=True)
    for layer, choices in zip(layers, chosen, strict=True):
        print("\n".join(_measured(layer, choices, device)), flush=True)
    source = " --synthetic" if args.synthetic else f" --model {args.model}" if args.model else ""
    print(NEXT.format(source=source))
    return 0


def _patterns(length: int) -> list[Mask]:
    """Causal, and first tokens with windows shorter than the text."""
    sizes = [size for size in WINDOWS if size < length]
    return [
        causal,
        *(causal & (sink(first) | window(size)) for size in sizes for first in SINKS),
    ]


def choose(layer: Layer, patterns: Sequence[Mask], keep: float) -> list[Choice]:
    """For each head, the pattern of the fewest blocks that keeps at least `keep` of its mass.

    Judged by a sample of the queries; the mass in the result is of all. One of the patterns must
    be causal, which keeps everything.
    """
    length = layer.q.shape[2]
    blocks = [
        compile_mask(pattern, length, length, device="cpu").launches[0].classes.blocks
        for pattern in patterns
    ]
    cheapest_first = sorted(range(len(patterns)), key=lambda i: blocks[i])
    sampled = mass_kept(layer, patterns, SAMPLE).tolist()
    # the sum over all keys is 1 but for rounding, so `keep` is a part of that
    picked = [next(i for i in cheapest_first if mass[i] >= keep * max(mass)) for mass in sampled]
    distinct = sorted(set(picked))
    exact = mass_kept(layer, [patterns[i] for i in distinct]).tolist()
    return [
        Choice(patterns[i], blocks[i], mass[distinct.index(i)])
        for i, mass in zip(picked, exact, strict=True)
    ]


def mass_kept(layer: Layer, patterns: Sequence[Mask], every: int = 1) -> Tensor:
    """float32[heads, patterns]: the part of causal attention that falls on a pattern's keys.

    A mean over every `every`-th query, computed in chunks of them: the attention matrix of a head
    is never there as a whole.
    """
    q, k = layer.q[0].float(), layer.k[0].float()
    n_heads, length, head_dim = q.shape
    scale = head_dim**-0.5 if layer.scale is None else layer.scale
    keys = k.repeat_interleave(n_heads // k.shape[0], 0)
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    kv_idx = torch.arange(length, device=q.device)[None]
    rows = torch.arange(min(every, length) // 2, length, every, device=q.device)
    total = torch.zeros(n_heads, len(patterns), device=q.device)
    at_once = max(1, ELEMENTS_AT_ONCE // (n_heads * length))
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        q_idx = part[:, None]
        scores = q[:, part] @ keys.mT * scale
        weights = scores.masked_fill(kv_idx > q_idx, -torch.inf).softmax(-1)
        for i, pattern in enumerate(patterns):
            kept = pattern(zero, zero, q_idx, kv_idx).expand(len(part), length)
            total[:, i] += weights.flatten(1) @ kept.float().flatten()
    return total / len(rows)


def _measured(layer: Layer, choices: list[Choice], device: torch.device) -> list[str]:
    """Run a layer sparse and dense; the lines of its table."""
    q, k, v = layer.q, layer.k, layer.v
    length = q.shape[2]
    attend = compile_mask(
        per_head([choice.pattern for choice in choices]), length, length, device=device
    )
    out, first_ms = first_call(lambda: attend(q, k, v, scale=layer.scale), device)
    dense = dense_attention(q, k, v, causal=True, scale=layer.scale)
    miss, size = (torch.linalg.vector_norm(x[0].float(), dim=(1, 2)) for x in (out - dense, dense))
    errors = miss / size
    (ours, theirs), runs = medians(
        [
            lambda: attend(q, k, v, scale=layer.scale),
            lambda: dense_attention(q, k, v, causal=True, scale=layer.scale),
        ],
        device,
    )
    causal_blocks = compile_mask(causal, length, length, device="cpu").launches[0].classes.blocks
    rows: list[tuple[str, ...]] = [
        ("head", "pattern", "blocks", "of causal", "mass kept", "output error")
    ]
    rows += [
        (
            str(head),
            named_text(choice.pattern, 48),
            f"{choice.blocks:,}",
            f"{choice.blocks / causal_blocks:.0%}",
            f"{choice.mass:.1%}",
            f"{error:.1e}",
        )
        for head, (choice, error) in enumerate(zip(choices, errors.tolist(), strict=True))
    ]
    blocks = sum(choice.blocks for choice in choices)
    mean = sum(choice.mass for choice in choices) / len(choices)
    rows.append(
        (
            "all",
            f"{len({choice.pattern.name for choice in choices})} distinct patterns",
            f"{blocks:,}",
            f"{blocks / causal_blocks / len(choices):.0%}",
            f"{mean:.1%}",
            f"{float(miss.norm() / size.norm()):.1e}",
        )
    )
    return [
        f"{layer.name}: {q.shape[1]} query heads on {k.shape[1]} of keys and values, "
        f"head_dim {q.shape[3]}",
        *table(rows),
        f"  Time: {time_text(ours)} for all heads, {time_text(theirs)} for dense attention: "
        f"{ratio(ours, theirs)} dense (median of {runs}).",
        f"  Masks compiled in {time_text(attend.compile_seconds)}; the first call took "
        f"{time_text(first_ms / 1e3)}, kernels included.",
        "",
    ]


def synthetic_layer(length: int, device: torch.device) -> Layer:
    """Four random heads, of which each next looks back eight times as far as the one before.

    The scores of a head fall with distance as a bell, by random Fourier features of the position;
    the first four keys draw attention of their own, as in trained models.
    """
    n_heads, head_dim = 4, 64
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    reach = 16.0 * 8 ** torch.arange(n_heads)[:, None, None]
    angles = torch.arange(length)[:, None] * (normal(n_heads, 1, head_dim // 2) / reach)
    features = torch.cat([angles.cos(), angles.sin()], -1) * 2.0
    q = features + 0.3 * normal(n_heads, length, head_dim)
    k = features + 0.3 * normal(n_heads, length, head_dim)
    q[:, :, 0] = 2.0
    k[:, :4, 0] = 24.0
    v = normal(n_heads, length, head_dim)
    q, k, v = (x[None].to(device) for x in (q, k, v))
    return Layer("Random layer", q, k, v, None)
