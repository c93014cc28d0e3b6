"""Masks named after the call that made them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from flexsparse.expr import Mask
from flexsparse.tensors import Table

Pattern = TypeVar("Pattern", bound=Callable[..., Mask])


def pattern(build: Pattern) -> Pattern:
    """Name the masks that a function returns after the call that made them: window(256).

    Decorate a function of your own with it, and reports and pictures show your name.
    """

    @functools.wraps(build)
    def named(*args: Any, **kwargs: Any) -> Mask:
        shown = [_argument(a) for a in args]
        shown += [f"{key}={_argument(value)}" for key, value in kwargs.items()]
        return build(*args, **kwargs).named(f"{build.__name__}({', '.join(shown)})")

    return named  # type: ignore[return-value]


def _argument(value: Any) -> str:
    if isinstance(value, Tensor):
        return repr(Table(value))
    if isinstance(value, Mask):
        return value.name
    return " ".join(repr(value).split())  # a name is one line
