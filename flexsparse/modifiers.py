"""What a call does besides its mask: scale, score_mod, dropout, the LSE; checked, and by heads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from flexsparse.dropout import Dropout
from flexsparse.errors import MaskError
from flexsparse.lower import padded
from flexsparse.tensors import ScoreMod


class Modifiers(NamedTuple):
    """The options of a call; score_mod and dropout count heads and rows as q does."""

    scale: float | None
    score_mod: ScoreMod | None
    dropout: Dropout | None
    return_lse: bool

    def checked(self) -> Modifiers:
        """The same, its scale a float.

        Raises:
            MaskError: scale is not a finite number, or score_mod is not a function.
        """
        if self.score_mod is not None and not callable(self.score_mod):
            raise MaskError(
                f"score_mod={self.score_mod!r}; it must be a function of (score, b, h, q_idx, "
                "kv_idx) that returns the new score."
            )
        scale = self.scale
        if scale is None:
            return self
        if isinstance(scale, Tensor):
            raise MaskError(
                f"scale is a tensor {tuple(scale.shape)}; it takes a number, and gives no "
                "gradient. For a scale that learns, multiply q by it and pass scale=1.0."
            )
        if not isinstance(scale, Real) or isinstance(scale, bool) or not _is_finite(scale):
            raise MaskError(
                f"scale={scale!r}; it must be a finite number. None is 1 / sqrt(head_dim)."
            )
        return self._replace(scale=float(scale))

    def of_heads(self, heads: Sequence[int], device: torch.device) -> Modifiers:
        """The same for a launch whose head i is head heads[i] of q."""
        if list(heads) == list(range(len(heads))):
            return self
        return self._replace(
            score_mod=self.score_mod and _at_heads(self.score_mod, heads, device),
            dropout=self.dropout and self.dropout.of_heads(heads, device),
        )


def _is_finite(number: Real) -> bool:
    return -math.inf < float(number) < math.inf


def no_score_mod(score_mod: ScoreMod, q: Tensor) -> str | None:
    """Why this is no score_mod, as a sentence, or None if it is one or raises an error itself."""
    name = getattr(score_mod, "__name__", type(score_mod).__name__)
    takes = "score_mod takes (score, b, h, q_idx, kv_idx) and returns the new score, a tensor"
    try:
        inspect.signature(score_mod).bind(*"sbhqk")
    except TypeError:
        return f"{takes}; {name}{inspect.signature(score_mod)} takes something else."
    except ValueError:
        pass  # a builtin, which has no signature
    zero = torch.zeros((), dtype=torch.int64, device=q.device)
    try:
        # activation checkpointing ends a forward by an error, and counts what a graph saves
        with torch.no_grad():
            score = score_mod(q.new_zeros(()), zero, zero, zero, zero)
    except Exception:
        return None
    return None if isinstance(score, Tensor) else f"{takes}; {name} returned {score!r}."


def _at_heads(score_mod: ScoreMod, heads: Sequence[int], device: torch.device) -> ScoreMod:
    """A score_mod of query heads as one of the heads of a launch."""
    table = padded(torch.tensor(heads, device=device))

    def at_heads(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, table[h], q_idx, kv_idx)

    return at_heads
