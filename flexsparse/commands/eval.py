"""`flexsparse eval`: what plans and masks cost a real model in quality."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.commands.arguments import (
    CommandError,
    check_picture,
    device_here,
    device_text,
    positive,
    read_mask,
)
from flexsparse.commands.real_model import add_model_argument, load, manual, model_name
from flexsparse.expr import Mask, everything
from flexsparse.fidelity import (
    Point,
    associative_recall,
    blocks,
    check_length,
    draw_perplexity,
    full_layers,
    head_fidelity,
    layer_inputs,
    needle_in_a_haystack,
    own_mask,
    plan_density,
    recall_sequences,
    sequences,
    token_losses,
)
from flexsparse.plan import SparsePlan, masks_at
from flexsparse.report import table
from flexsparse.text import named_text, shorten

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
RECALL_ROWS, RECALL_PAIRS = 2, 8


class Candidate(NamedTuple):
    """A plan to be evaluated; `is_plan` is False for one mask on all heads."""

    name: str
    plan: SparsePlan
    is_plan: bool


def add_to(commands: Any) -> None:
    """Add this command to those of the parser."""
    parser = commands.add_parser(
        "eval",
        help="measure what plans and masks cost a real model in perplexity",
        description="Run a language model on a text, dense and under plans, and compare its "
        "perplexity; with --heads what each head loses, with --probes what the model still finds "
        "and recalls.",
    )
    parser.add_argument("plans", nargs="*", metavar="PLAN.json", help="a plan that was saved")
    parser.add_argument(
        "--mask", action="append", default=[], metavar="MASK", help="one mask for all heads; again"
    )
    add_text_arguments(parser)
    parser.add_argument("--heads", action="store_true", help="a table of every head of the plans")
    parser.add_argument("--probes", action="store_true", help="a needle in a haystack, and recall")
    parser.add_argument("--figure", metavar="FILE.png", help="perplexity against density")
    parser.set_defaults(command=evaluate)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model reads what."""
    add_model_argument(parser)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 (default: Python's own manual)")
    parser.add_argument("--len", type=positive, default=2048, help="tokens (default: 2048)")
    parser.add_argument("--sequences", type=positive, default=1, help="of that length (default: 1)")
    parser.add_argument(
        "--from", type=positive, default=1, dest="first", help="the first of them (default: 1)"
    )
    parser.add_argument(
        "--step", type=positive, default=1, help="take every STEP-th sequence (default: 1)"
    )
    parser.add_argument(
        "--layers", type=_numbers, metavar="5,11,17", help="(default: those that see everything)"
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers such as 5,11,17") from None


def evaluate(args: argparse.Namespace) -> int:
    """Print the tables and write the picture."""
    text = text_of(args)
    check_picture(args.figure)
    saved = [SparsePlan.load(path) for path in args.plans]
    masks = [read_mask(mask) for mask in args.mask]
    device = device_here()
    model, tokenizer = load(args.model, device)
    config = model.config.get_text_config()
    ids = sequences_of(args, model, tokenizer, text)
    layers = args.layers or full_layers(config)
    candidates = [
        *(Candidate(mask.name, uniform(config, layers, mask), False) for mask in masks),
        *(
            Candidate(Path(path).name, plan, True)
            for path, plan in zip(args.plans, saved, strict=True)
        ),
    ]
    for candidate in candidates:
        reason = candidate.plan.problem(model.config)
        if reason is not None:
            raise CommandError(f"{candidate.name}: {reason}")

    print(
        f"{model_name(args.model)} on {device_text(device)}: {len(ids)} x "
        f"{args.len:,} tokens of {args.text or 'the manual of Python'}.",
        flush=True,
    )
    points = _perplexities(model, config, layers, candidates, ids)
    if args.heads:
        for candidate in candidates:
            print(*_head_table(model, config, candidate, ids[:1]), sep="\n", flush=True)
    if args.probes:
        print(*_probe_table(model, tokenizer, candidates, text, ids), sep="\n", flush=True)
    if args.figure:
        title = f"{ids.shape[0]} x {ids.shape[1]:,} tokens, layers {', '.join(map(str, layers))}"
        draw_perplexity(points[1:], points[0], title).savefig(args.figure)
        print(f"Written: {args.figure}")
    return 0


def text_of(args: argparse.Namespace) -> str:
    """The text of the command line."""
    if args.text is None:
        return manual()
    try:
        return Path(args.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"cannot read --text {args.text}: {reason}") from None


def sequences_of(args: argparse.Namespace, model: Any, tokenizer: Any, text: str) -> Tensor:
    """The sequences of the command line, int64[--sequences, --len]."""
    check_length(model, args.len)
    count = args.first + (args.sequences - 1) * args.step
    return sequences(tokenizer, text, args.len, count)[args.first - 1 :: args.step]


def uniform(config: Any, layers: Sequence[int], mask: Mask) -> SparsePlan:
    """A plan that gives every head of some layers the same mask."""
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            raise CommandError(
                f"layer {layer} does not exist; the model has layers 0 to "
                f"{config.num_hidden_layers - 1}."
            )
    heads = [mask] * config.num_attention_heads
    return SparsePlan([heads if i in layers else None for i in range(config.num_hidden_layers)])


def _perplexities(
    model: Any,
    config: Any,
    layers: Sequence[int],
    candidates: Sequence[Candidate],
    ids: Tensor,
) -> list[Point]:
    """Print the perplexity of the dense model and of each plan."""
    length = ids.shape[1]
    dense = Candidate("dense", uniform(config, layers, everything), False)
    rows: list[tuple[str, ...]] = [("", "blocks", "perplexity", "of dense", "each sequence")]
    points: list[Point] = []
    for candidate in (dense, *candidates):
        losses = token_losses(model, ids, None if candidate is dense else candidate.plan).double()
        density = plan_density(candidate.plan, config, length)
        point = Point(candidate.name, density, float(losses.mean().exp()), candidate.is_plan)
        points.append(point)
        each = " ".join(f"{value:.2f}" for value in losses.mean(1).exp().tolist())
        rows.append(
            (
                shorten(point.name, 48),
                f"{density:.1%}",
                f"{point.perplexity:.3f}",
                f"{point.perplexity / points[0].perplexity:.1%}",
                each,
            )
        )
    print(*table(rows), sep="\n")
    print("Blocks: of 128 x 128 tokens, as a part of all, in the layers that are changed.")
    return points


def _head_table(model: Any, config: Any, candidate: Candidate, ids: Tensor) -> list[str]:
    """What each head of a plan computes, keeps and misses, on the first sequence."""
    length = ids.shape[1]
    masks_of = {
        i: masks_at(layer, length)
        for i, layer in enumerate(candidate.plan.layers)
        if layer is not None
    }
    inputs = layer_inputs(model, ids, list(masks_of))
    rows: list[tuple[str, ...]] = [
        ("layer", "head", "mask", "blocks", "mass kept", "output error"),
    ]
    for i, masks in masks_of.items():
        found = head_fidelity(inputs[i], masks.distinct)
        for head, place in enumerate(masks.which):
            mask = masks.distinct[place]
            rows.append(
                (
                    str(i),
                    str(head),
                    named_text(mask, 48),
                    f"{blocks(own_mask(config, i) & mask, length, head):,}",
                    f"{float(found.mass[head, place]):.1%}",
                    f"{float(found.error[head, place]):.1e}",
                )
            )
    return ["", f"{candidate.name}, each head on its own, in the dense model:", *table(rows)]


def _probe_table(
    model: Any, tokenizer: Any, candidates: Sequence[Candidate], text: str, ids: Tensor
) -> list[str]:
    """How likely the model is to find a needle, by its depth, and to recall pairs."""
    length = ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    words = torch.unique(ids)
    words = words[torch.randperm(len(words), generator=generator)]
    keys, values = words.chunk(2)
    pairs = recall_sequences(RECALL_ROWS, length, RECALL_PAIRS, keys, values, generator=generator)
    rows: list[tuple[str, ...]] = [("", *(f"needle at {depth:.0%}" for depth in DEPTHS), "recall")]
    for name, plan in (("dense", None), *((x.name, x.plan) for x in candidates)):
        found = needle_in_a_haystack(model, tokenizer, text, length, DEPTHS, plan)
        recall = associative_recall(model, *pairs, plan)
        rows.append((shorten(name, 48), *(f"{p:.1%}" for p in found.tolist()), f"{recall:.1%}"))
    return [
        "",
        f"In {length:,} tokens, the probability of a number that stands at a depth, and of "
        f"{RECALL_PAIRS} words that followed others:",
        *table(rows),
    ]
