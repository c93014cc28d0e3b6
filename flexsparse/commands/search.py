"""`flexsparse search`: find the plan that changes a model least within a budget of blocks."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from flexsparse.commands.arguments import check_writable, device_here, fraction, positive, read_mask
from flexsparse.commands.eval import add_text_arguments, sequences_of, text_of
from flexsparse.commands.real_model import load
from flexsparse.plan import SparsePlan
from flexsparse.search import CRITERIA, search

DTYPES = ("float32", "bfloat16", "float16")


def add_to(commands: Any) -> None:
    """Add this command to those of the parser."""
    parser = commands.add_parser(
        "search",
        help="find a plan for a real model under a budget of blocks",
        description="From a text, choose a mask for each head of a language model, such that the "
        "model changes least and computes no more than a part of the blocks of dense attention.",
    )
    parser.add_argument("plan", metavar="PLAN.json", help="where the plan is saved")
    parser.add_argument(
        "--density", type=fraction, required=True, help="blocks computed, as a part of all: 0.25"
    )
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="divergence",
        help="what is to be small: the attention mass lost, the error of a head's output, the "
        "divergence of the predictions if one head of the dense model changes, or, round by "
        "round, if one head of the plan changes (default)",
    )
    parser.add_argument(
        "--candidate",
        action="append",
        metavar="MASK",
        help="a mask to choose from; again for each (default: blocks at the start, latest blocks, "
        "stripes of blocks, and everything)",
    )
    parser.add_argument(
        "--start",
        metavar="PLAN.json",
        help="go on from this plan, within the density, and not from one mask for all heads",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--every",
        type=positive,
        default=4,
        help="compare predictions at every EVERY-th token (default: 4)",
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, help="of measuring and solving (default: 3)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: float32 on CPU, else bfloat16)"
    )
    parser.set_defaults(command=run, sequences=4)


def run(args: argparse.Namespace) -> int:
    """Search, print what was found, and save it."""
    text = text_of(args)
    candidates = args.candidate and [read_mask(mask) for mask in args.candidate]
    start = args.start and SparsePlan.load(args.start)
    check_writable(args.plan)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, tokenizer = load(args.model, device_here(), dtype)
    ids = sequences_of(args, model, tokenizer, text)
    found = search(
        model,
        ids,
        args.density,
        criterion=args.criterion,
        candidates=candidates,
        layers=args.layers,
        start=start,
        every=args.every,
        rounds=args.rounds,
    )
    found.plan.save(args.plan)
    print(found)
    print(f"\nSaved: {args.plan}. Try: flexsparse eval {args.plan}")
    return 0
