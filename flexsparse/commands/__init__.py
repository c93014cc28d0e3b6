"""The command line: `flexsparse show`, `run`, `demo`, `bench`, `eval` and `search`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from flexsparse.commands import bench, demo, eval, run, search, show
from flexsparse.commands.arguments import CommandError
from flexsparse.errors import ExecutorError, MaskError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if its check failed, 2 if it could not run, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="flexsparse",
        description="Compile sparse attention masks, look at them, and run them.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (show, run, demo, bench, eval, search):
        command.add_to(commands)
    args = parser.parse_args(argv)
    if sys.stdout is None:  # closed, or of a program without a console
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        status: int = args.command(args)
        sys.stdout.flush()
        return status
    except (MaskError, ExecutorError, CommandError) as error:
        print(f"flexsparse: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nflexsparse: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader, `head` for instance, has seen enough
        _write_no_more()
        return 0
    except OSError as error:
        _write_no_more()
        print(f"flexsparse: {error}", file=sys.stderr)
        return 2


def _write_no_more() -> None:
    """Keep the exit from flushing into a stdout that takes nothing."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
