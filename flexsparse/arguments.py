"""Arguments that several doors of the library take, checked: each broken rule is a MaskError."""

from __future__ import annotations

from typing import Any

import torch

from flexsparse.errors import MaskError

LONGEST = 2**31 - 1  # tokens or batch rows: kernels count in int32
MOST_HEADS = 2**16  # each is looked at by itself


def check_size(name: str, n: Any, most: int, *, optional: bool = False) -> None:
    """Refuse what is not an int of 1 to `most`, nor None where that may be left out."""
    if n is None and optional:
        return
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise MaskError(f"{name}={n!r}; it must be an int of 1 or more{', or None' * optional}.")
    if n > most:
        raise MaskError(f"{name}={n}; it must be at most {most:,}.")


def usable_device(device: torch.device | str) -> torch.device:
    """A device as the tensors on it report it: "cuda" becomes "cuda:0"."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise MaskError(f"device={device!r} cannot be used here: {error}") from None
