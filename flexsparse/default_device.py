"""Masks are analysed on the CPU, also after torch.set_default_device("cuda")."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def cpu_by_default() -> Iterator[None]:
    """Make tensors on the CPU where no device is named: around a block of code, or a decorator."""
    if torch.get_default_device().type == "cpu":
        yield  # the mode below would slow down every operator
        return
    with torch.device("cpu"):
        yield
