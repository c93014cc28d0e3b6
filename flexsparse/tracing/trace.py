"""from_mask_mod: any FlexAttention mask_mod as an expression, by running it once on index tensors.

    >>> window = 256
    >>> print(from_mask_mod(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window))
    q_idx - kv_idx < 256

The aten operators it calls are translated one by one as they are called. Those that no index has a
part in run for real. One without a rule becomes an opaque operator: a function that the mask calls,
exact as ever, of which the analysis knows nothing.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import torch

from flexsparse.arguments import usable_device
from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.tracing.stand_in import ReadsEntries, ValueNeededError
from flexsparse.tracing.tracer import Tracer
from flexsparse.tree import VARIABLES
from flexsparse.uncompiled import uncompiled


@uncompiled
def from_mask_mod(fn: Callable[..., Any], *, device: torch.device | str | None = None) -> Mask:
    """The mask that a FlexAttention mask_mod computes, as an expression.

    Captured integers are read now. Captured tensors are kept and not copied: write to one, and
    compiling the mask raises. `mask.opaque_operators` names what the analysis has no rule for.

    Args:
        fn: mask_mod(b, h, q_idx, kv_idx) of 0-dimensional index tensors, returning a boolean one.
        device: of the index tensors; the CPU by default, which also reads tensors elsewhere.

    Raises:
        MaskError: fn is no mask_mod; the text says what was found, and where.
    """
    if isinstance(fn, Mask):
        return fn
    name = _describe(fn)
    reason = _not_a_mask_mod(fn, name)
    if reason is not None:
        raise MaskError(reason)
    tracer = Tracer(usable_device("cpu" if device is None else device))
    try:
        with torch.no_grad(), tracer, ReadsEntries():
            result = fn(*tracer.indices)
        return tracer.mask(result, name)
    except ValueNeededError as error:
        raise MaskError(
            f"{name} depends on the value of an index{_where_in(error)}: an `if`, `and`, `not`, "
            "int(), .item(), a slice, or a shape. It is traced once for all places; choose between "
            "values with torch.where, combine masks with & | ~, and read tensors with table[index]."
        ) from None
    except MaskError as error:
        raise MaskError(f"{name} cannot be traced{_where_in(error)}. {error}") from None
    except Exception as error:
        raise MaskError(
            f"{name} raised {type(error).__name__}{_where_in(error)} when called with "
            f"0-dimensional index tensors, as FlexAttention calls it: {error}"
        ) from error


def _describe(fn: Any) -> str:
    name = getattr(fn, "__qualname__", None) or type(fn).__name__
    return f"The mask_mod {name.replace('<locals>.', '')}"


def _not_a_mask_mod(fn: Any, name: str) -> str | None:
    """Why this cannot be a mask_mod, or None if it may be one."""
    takes = "A mask_mod is a function of (b, h, q_idx, kv_idx) that returns a boolean tensor"
    if not callable(fn):
        return f"from_mask_mod got {type(fn).__name__}: {fn!r}. {takes}."
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*VARIABLES)
    except TypeError:
        hint = " A score_mod takes the score as well, and is not a mask." * (
            len(signature.parameters) == 5
        )
        return f"{name} takes {signature}. {takes}.{hint}"
    return None


def _where_in(error: BaseException) -> str:
    """The line of the user's that an error came from, as ' at file:line (source)'."""
    own = __file__.rpartition("/tracing/")[0] + "/"
    torch_files = torch.__file__.rpartition("/")[0]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((own, torch_files))
    ]
    if not frames:
        return ""
    line = f" ({frames[-1].line})" if frames[-1].line else ""
    return f" at {frames[-1].filename}:{frames[-1].lineno}{line}"
