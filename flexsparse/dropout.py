"""Dropout as a mask: whether a weight is kept is a function of (seed, b, h, q_idx, kv_idx) alone.

Nothing is stored and no generator advances, so every executor, forward and backward, sees the same
mask. The bits come from two rounds of a 32-bit mixing hash, in plain integer arithmetic on tensors:

    key1, key2 = absorb(seed, b, h, q_idx)       once per query row, 64 bits together
    kept       = mix(kv_idx + key1; key2) >= dropout_p * 2^31

Integer width: int64, in which no product overflows (the multipliers are below 2^31 and the values
below 2^32). `is_kept` casts what it is given, so the int32 indices of a flex kernel are fine.
Constants: hash-prospector's best two-round 32-bit hash (C. Wellons, public domain).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor

from flexsparse.errors import MaskError
from flexsparse.tensors import ScoreMod

Whole = TypeVar("Whole", int, Tensor)

WORD = 0xFFFFFFFF
MULTIPLY = (0x21F0AAAD, 0x735A2D97)
# the two halves of a key differ by where they start; digits of pi
START = (0x243F6A88, 0x13198A2E)
OUTCOMES = 1 << 31  # a weight is compared as a 31-bit number, which fits every signed width


@dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights: each is dropped with chance p, the others divided by 1 - p.

    p: in (0, 1)
    seed: 64 bits
    heads: the query head that each head of a launch stands for; None where they are the same
    """

    p: float
    seed: int | Tensor
    heads: Tensor | None = None

    @classmethod
    def of(cls, dropout_p: float, seed: int | Tensor | None) -> Dropout | None:
        """What a caller asked for: None for no dropout; a seed not given is drawn from torch's."""
        refuse_bad_dropout(dropout_p)
        if isinstance(seed, Tensor):
            if seed.dim() or seed.is_floating_point():
                raise MaskError(
                    f"dropout_seed is a {seed.dtype} tensor {tuple(seed.shape)}; give an int or a "
                    "0-d integer tensor."
                )
        elif seed is not None and not isinstance(seed, int):
            raise MaskError(f"dropout_seed={seed!r}; give an int or a 0-d integer tensor.")
        if not dropout_p:
            return None
        return cls(dropout_p, fresh_seed() if seed is None else seed)

    def of_heads(self, heads: Sequence[int], device: torch.device) -> Dropout:
        """The same dropout for a launch whose head i is query head heads[i]."""
        if tuple(heads) == tuple(range(len(heads))):
            return self
        return replace(self, heads=torch.tensor(heads, device=device))

    def with_seed_of_now(self) -> Dropout:
        """The same, and it stays so if a seed that is a tensor is written to."""
        return replace(self, seed=self.seed.clone()) if isinstance(self.seed, Tensor) else self

    def kept(
        self,
        b: int | Tensor,
        h: Tensor,
        q_idx: Tensor,
        kv_idx: Tensor,
        width: torch.dtype = torch.int64,
    ) -> Tensor:
        """`is_kept` of a launch's own heads."""
        h = h if self.heads is None else self.heads[h]
        return is_kept(self.seed, self.p, b, h, q_idx, kv_idx, width=width)

    def dropping(self, score_mod: ScoreMod | None, device: torch.device) -> ScoreMod:
        """A score_mod, or none, followed by -inf for the scores of dropped weights."""
        # as a tensor, a new seed compiles nothing
        seed = self.seed if isinstance(self.seed, Tensor) else _as_int64(self.seed)
        seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
        dropout = replace(self, seed=seed)

        def drop(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            if score_mod is not None:
                score = score_mod(score, b, h, q_idx, kv_idx)
            return torch.where(dropout.kept(b, h, q_idx, kv_idx), score, -math.inf)

        return drop


def is_kept(
    seed: int | Tensor,
    dropout_p: float,
    b: int | Tensor,
    h: int | Tensor,
    q_idx: Tensor,
    kv_idx: Tensor,
    *,
    width: torch.dtype = torch.int64,
) -> Tensor:
    """Whether dropout keeps the weight at (b, h, q_idx, kv_idx): True with chance 1 - dropout_p.

    Args:
        seed: 64 bits; as a 0-d int64 tensor, a new seed recompiles nothing.
        dropout_p: the chance of False, in [0, 1), to the nearest 2^-31.
        b: batch row; all four are absolute indices below 2^32, which broadcast.
        h: query head.
        q_idx: row of q.
        kv_idx: row of k.
        width: int64, or int32 (3 x faster, the same bits) where arithmetic is known to wrap, as it
            is in eager torch and in Triton but not in C++.
    """
    key1, key2 = row_keys(seed, b, h, q_idx)
    if width == torch.int64:
        column = kv_idx.to(torch.int64)
    else:
        key1, key2, column = (_as_int32(x) for x in (key1, key2, kv_idx.to(torch.int64)))
    x = _mix(_word(column + key1), key2)
    return ((x >> 1) & (OUTCOMES - 1)) >= round(dropout_p * OUTCOMES)


def refuse_bad_dropout(dropout_p: float) -> None:
    """Raise MaskError unless dropout_p is in [0, 1)."""
    if (
        isinstance(dropout_p, (Tensor, bool))
        or not isinstance(dropout_p, (float, Real))  # float first: of Real, it takes longer to tell
        or not 0 <= dropout_p < 1
    ):
        raise MaskError(
            f"dropout_p={dropout_p!r} is not a chance to drop a weight. Use a number, "
            "0 <= dropout_p < 1; 0 is no dropout."
        )
    if round(dropout_p * OUTCOMES) == OUTCOMES:
        raise MaskError(
            f"dropout_p={dropout_p} drops every weight: it counts to the nearest 2^-31. Use "
            "dropout_p <= 1 - 2^-31."
        )


def fresh_seed() -> int:
    """A seed drawn from torch's default generator, so that torch.manual_seed decides it."""
    if torch.compiler.is_exporting():
        raise MaskError(
            "torch.export records no number that is drawn while it runs. Give dropout_seed, an int "
            "or a tensor."
        )
    return int(torch.randint(1 << 62, (), device="cpu").item())


def row_keys(
    seed: int | Tensor, b: int | Tensor, h: int | Tensor, q_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys of each query row, int64: all that matters of an index besides kv_idx."""
    if isinstance(seed, Tensor):
        seed = seed.to(torch.int64)
    words = [x.to(torch.int64) if isinstance(x, Tensor) else x for x in (b, h, q_idx)]
    zero = torch.zeros_like(q_idx, dtype=torch.int64)
    key1, key2 = zero + START[0], zero + START[1]
    for word in (seed & WORD, (seed >> 32) & WORD, *words):
        key1 = _mix(key1 ^ (word & WORD), zero)
        key2 = _mix(key2 ^ (word & WORD), zero)
    return key1, key2


def _mix(x: Tensor, key: Tensor) -> Tensor:
    """A hash of one 32-bit word in which every bit of x moves every bit; key enters half-way.

    Written so that int64 (values kept below 2^32) and wrapping int32 give the same bits: a right
    shift is followed by the mask that makes it unsigned.
    """
    x = x ^ ((x >> 16) & 0xFFFF)
    x = _word(x * MULTIPLY[0])
    x = x ^ ((x >> 15) & 0x1FFFF) ^ key
    x = _word(x * MULTIPLY[1])
    return x ^ ((x >> 15) & 0x1FFFF)


def _word(x: Tensor) -> Tensor:
    # int32 wraps by itself
    return x & WORD if x.dtype == torch.int64 else x


def _as_int32(x: Tensor) -> Tensor:
    return _signed(x).to(torch.int32)


def _as_int64(seed: int) -> int:
    """The integer within int64 of the same two words, which are all that `row_keys` reads."""
    return (_signed(seed >> 32) << 32) + (seed & WORD)


def _signed(word: Whole) -> Whole:
    return (word & WORD ^ OUTCOMES) - OUTCOMES
