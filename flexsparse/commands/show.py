"""`flexsparse show`: what a mask decides, block by block, as a report and a picture."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from flexsparse.arguments import INT32_MAX
from flexsparse.commands.arguments import CommandError, positive, read_heads, waiting
from flexsparse.compiler import CompiledMask, compile_mask
from flexsparse.drawing.terminal import Ink, picture
from flexsparse.expr import Mask
from flexsparse.heads import PerHead, numbered
from flexsparse.text import shown

MOST_BLOCKS = 1 << 20  # along the queries or the keys; the diagonal of so many takes seconds
MASK_HELP = "a mask, quoted for the shell: 'causal & (sink(64) | window(256))'"


def add_to(commands: Any) -> None:
    """Add this command to those of the parser."""
    parser = commands.add_parser(
        "show",
        help="report on a mask and draw it",
        description="Compile a mask, report what was decided, and draw its blocks.",
    )
    add_mask_arguments(parser)
    parser.add_argument("--heads", type=positive, help="query heads; needed if the mask reads h")
    parser.add_argument("--batch", type=positive, help="batch rows; needed if the mask reads b")
    parser.set_defaults(command=show)


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which mask is meant, and at which lengths."""
    parser.add_argument("mask", metavar="MASK", help=MASK_HELP)
    parser.add_argument(
        "--len", type=positive, required=True, help="keys, in tokens", dest="kv_len"
    )
    parser.add_argument("--q-len", type=positive, help="queries, in tokens (default: as many)")
    parser.add_argument(
        "--q-offset", type=int, help="position of the first query (default: the last is at the end)"
    )
    parser.add_argument("--block-size", type=positive, default=128, help="tokens (default: 128)")


def compiled_from(
    args: argparse.Namespace, mask: Mask | PerHead, n_heads: int | None, device: str = "cpu"
) -> CompiledMask:
    """A mask, or the masks of all heads, compiled at the lengths of the command line."""
    longest = max(args.q_len or args.kv_len, args.kv_len)
    if MOST_BLOCKS * args.block_size < longest <= INT32_MAX:
        raise CommandError(
            f"{longest:,} tokens are {-(-longest // args.block_size):,} blocks of "
            f"{args.block_size}, and at most {MOST_BLOCKS:,} in a row are looked at. Give a larger "
            "--block-size, or fewer tokens."
        )
    masks = mask.distinct if isinstance(mask, PerHead) else (mask,)
    variables = {variable for one in masks for variable in one.variables}
    for variable, option, n, what in (
        ("h", "heads", n_heads, "query heads"),
        ("b", "batch", args.batch, "batch rows"),
    ):
        if variable in variables and n is None:
            raise CommandError(f"The mask reads {variable}: give --{option}, how many {what}.")
    with waiting("Compiling the mask"):
        return compile_mask(
            mask,
            args.q_len or args.kv_len,
            args.kv_len,
            batch=args.batch if "b" in variables else None,
            n_heads=n_heads if "h" in variables or isinstance(mask, PerHead) else None,
            q_offset=args.q_offset,
            device=device,
            block_size=args.block_size,
        )


def show(args: argparse.Namespace) -> int:
    """Print the report and the picture of a mask, or a picture for each mask that heads have."""
    mask = read_heads(args.mask)
    compiled = compiled_from(args, mask, args.heads)
    ink = Ink.of(sys.stdout)
    print(compiled)
    if isinstance(mask, Mask):
        print(f"\n{_drawn(compiled, ink)}")
        return 0
    for place, own in enumerate(mask.distinct):
        print(f"\n{shown(own)}, {numbered('head', mask.heads_of(place))}:")
        print(_drawn(compiled_from(args, own, None), ink))
    return 0


def _drawn(compiled: CompiledMask, ink: Ink) -> str:
    with waiting("Drawing"):
        return picture(compiled, ink)
