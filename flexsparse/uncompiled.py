"""Functions that torch.compile calls as they are, and does not look into."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


def uncompiled(build: Callable[Given, Made]) -> Callable[Given, Made]:
    """The same function, at which a graph breaks: torch.compile runs it in plain Python."""
    disabled: Callable[Given, Made] | None = None

    @functools.wraps(build)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        nonlocal disabled
        if disabled is None:
            # torch.compiler.disable imports torch's compiler, which takes seconds
            if "torch._dynamo" not in sys.modules:
                return build(*args, **kwargs)
            disabled = torch.compiler.disable(build)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return call
