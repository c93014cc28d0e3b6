"""What the commands share: their error, the types of their arguments, and timing."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import flexsparse.masks
from flexsparse.benchmark.harness import first_call
from flexsparse.expr import Mask
from flexsparse.heads import PerHead
from flexsparse.parser import parse, parse_heads
from flexsparse.progress import Progress

BUDGET = 4.0  # seconds for calls that are compared
PATIENCE = 2.0  # seconds without a word
PICTURES = (".pdf", ".png", ".svg")  # what matplotlib writes by itself


class CommandError(Exception):
    """A command cannot go on; the text says why and what to do."""


def positive(text: str) -> int:
    """An argument that counts something: an int of 1 or more; 131_072 and 131,072 are fine."""
    try:
        number = int(text.replace(",", ""))
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def fraction(text: str) -> float:
    """An argument that is a part of something: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def read_mask(text: str) -> Mask:
    """A mask from text, with the pattern library's names."""
    return parse(text, flexsparse.masks)


def read_heads(text: str) -> Mask | PerHead:
    """A mask from text, or the masks of all heads, with the pattern library's names."""
    return parse_heads(text, flexsparse.masks)


def waiting(job: str, total: int = 1) -> Progress:
    """A progress bar for work that mostly is over before anybody wonders, and then says nothing."""
    return Progress(job, total, patience=PATIENCE)


def check_writable(path: str | None) -> None:
    """Raise now, and not after a long run, if a file that is to be written cannot be."""
    if path is None:
        return
    is_new = not os.path.lexists(path)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None
    if is_new:
        os.remove(path)  # the run may fail, and leaves no empty file then


def check_picture(path: str | None) -> None:
    """Raise now if a picture cannot be written there, as its format is the end of its name."""
    if path is not None and not path.lower().endswith(PICTURES):
        raise CommandError(f"--figure {path}: a picture's name ends in {' or '.join(PICTURES)}.")
    check_writable(path)


def device_here() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_text(device: torch.device) -> str:
    """A device in words, with its threads or its model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def medians(calls: Sequence[Callable[[], object]], device: torch.device) -> tuple[list[float], int]:
    """(The median time of each call in seconds, of how many runs); the calls take turns.

    They take turns so that other work on the machine slows all of them alike. Between 3 and 25
    runs each, fewer the longer one takes.
    """
    times: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - started < BUDGET and len(times[0]) < 25):
        for call, own in zip(calls, times, strict=True):
            own.append(first_call(call, device)[1] / 1e3)
    return [statistics.median(own) for own in times], len(times[0])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
) -> Tensor:
    """Dense attention by scaled_dot_product_attention, causal or without a mask."""
    gqa = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def ratio(ours: float, theirs: float) -> str:
    """How our time compares with another: '2.1 x faster than', 'about as fast as'."""
    if max(ours, theirs) < 1.05 * min(ours, theirs):
        return "about as fast as"
    return (
        f"{theirs / ours:.1f} x faster than"
        if theirs > ours
        else f"{ours / theirs:.1f} x slower than"
    )
