"""Arguments that several doors of the library take, checked: each broken rule is a MaskError."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from flexsparse.errors import MaskError

INT32_MAX = 2**31 - 1  # kernels count tokens and batch rows in int32
INT_LIMIT = 2**61  # constants and positions beyond this could overflow int64 in the analysis
MOST_HEADS = 2**16  # each is looked at by itself


def check_size(name: str, n: Any, most: int, *, optional: bool = False) -> None:
    """Refuse what is not an int of 1 to `most`, nor None where that may be left out."""
    if n is None and optional:
        return
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise MaskError(f"{name}={n!r}; it must be an int of 1 or more{', or None' * optional}.")
    if n > most:
        raise MaskError(f"{name}={n}; it must be at most {most:,}.")


def check_position(name: str, position: Any, what: str, *, optional: bool = False) -> None:
    """Refuse what is not an int within int64; `what` says what stands at that position."""
    if position is None and optional:
        return
    if not isinstance(position, int) or isinstance(position, bool):
        raise MaskError(f"{name}={position!r}; it must be an int, the position of {what}.")
    if abs(position) >= INT_LIMIT:
        raise MaskError(f"{name}={position}; positions must be within 2**61.")


def check_values() -> None:
    """Refuse to look at a mask where tensors have no values."""
    fake = torch._C._TorchDispatchModeKey.FAKE
    if torch._C._get_dispatch_mode(fake) is not None:
        raise MaskError(
            "FakeTensorMode is on, in which tensors have no values, and blocks are found by "
            "values. Compile the mask outside of it, or before torch.export."
        )


def check_grid(
    where: str, q_len: Any, kv_len: Any, batch: Any, n_heads: Any, q_offset: Any
) -> None:
    """Refuse what is no place to look at a mask; errors begin with `where`."""
    check_values()
    check_size(f"{where}q_len", q_len, INT32_MAX)
    check_size(f"{where}kv_len", kv_len, INT32_MAX)
    check_size(f"{where}batch", batch, INT32_MAX, optional=True)
    check_size(f"{where}n_heads", n_heads, MOST_HEADS, optional=True)
    check_position(f"{where}q_offset", q_offset, "query row 0", optional=True)


def block_sizes(name: str, given: Any) -> tuple[int, int]:
    """A block size, or a pair of them, as (tokens of queries, tokens of keys)."""
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    # integers of numpy as well, and no tensors, whose values may be on a device
    is_whole = (hasattr(n, "__index__") and not isinstance(n, (bool, Tensor)) for n in pair)
    if all(is_whole) and len(pair) == 2:
        q_size, kv_size = map(operator.index, pair)
        if min(q_size, kv_size) >= 1 and max(q_size, kv_size) <= INT32_MAX:
            return q_size, kv_size
    raise MaskError(
        f"{name}={given!r}; it must be an int of 1 to {INT32_MAX:,}, or a pair (of queries, of "
        "keys)."
    )


def usable_device(device: torch.device | str) -> torch.device:
    """A device as the tensors on it report it: "cuda" becomes "cuda:0"."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise MaskError(f"device={device!r} cannot be used here: {error}") from None
