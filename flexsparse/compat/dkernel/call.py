"""The call that dkernel's modules share: layouts, lengths, padding, and plans that are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexsparse import (
    CompiledMask,
    Mask,
    MaskError,
    PerHead,
    b,
    compile_mask,
    kv_idx,
    lookup,
    maximum,
    q_idx,
)
from flexsparse.compat.dkernel import inputs
from flexsparse.packed.varlen import varlen
from flexsparse.text import shown

PLANS_KEPT = 64


class BlockAttention(torch.nn.Module):
    """Attention by a pattern of blocks, which a subclass gives in `_mask`.

    n_patterns: heads that the pattern tells apart: query heads or kv heads; 1 if they are all alike
    block_size: tokens of a block of the pattern
    max_seqlen: the longest sequence, in tokens
    seq_dim: 1 for [B, tokens, heads, D], 2 for [B, heads, tokens, D]
    """

    def __init__(
        self, n_patterns: int, block_size: int, max_seqlen: int, seq_dim: int | None
    ) -> None:
        super().__init__()
        if seq_dim not in (None, 1, 2):
            raise MaskError(f"seq_dim={seq_dim!r}; it must be 1, 2, or None, which means 1.")
        self.n_patterns = n_patterns
        self.block_size = block_size
        self.max_seqlen = max_seqlen
        self.seq_dim = 1 if seq_dim is None else seq_dim

    # a compiler above would trace the block analysis, and keep no plan
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        sm_scale: float | None = None,
        *,
        cu_seqlen_k: Tensor | None = None,
        cu_seqlen_q: Tensor | None = None,
        left_paddings: Tensor | None = None,
        seqlens: Tensor | None = None,
        return_lse: bool = False,
        split_qkv: Callable[[Tensor], Any] | None = None,
    ) -> Any:
        """Attention of q to the keys its pattern keeps.

        The last query stands at the last key: q may be a whole prompt, a chunk of one (chunked
        prefill) or one token (decoding with a KV cache). Blocks count from the first token of a
        sequence. The block lists of the latest lengths are kept, and shared by equal modules.

        Args:
            q: [B, q_len, n_heads, D], or [B, n_heads, q_len, D] if seq_dim is 2, or packed
                [total_q, n_heads, D].
            k: likewise, with kv_len tokens and n_kv_heads heads, which divide n_heads (GQA).
            v: as k.
            sm_scale: of the scores; 1 / sqrt(D) by default, and for 0.
            cu_seqlen_k: integer [B + 1], where packed sequences start in k and v, and their end.
            cu_seqlen_q: the same for q; by default that of k, or one token of each sequence if q
                has as many tokens as there are sequences.
            left_paddings: integer [B], tokens of padding in front of each sequence; out is 0 there.
            seqlens: integer [B], the tokens of each sequence; behind them is padding. Where q is
                shorter than k, its rows are the last tokens of each sequence.
            return_lse: also return the log of the sum of exponentials of each row's scores.
            split_qkv: takes a packed tensor apart: q, k, v = split_qkv(q) if k and v are None,
                k, v = split_qkv(k) if only v is.

        Returns:
            out, of q's shape and contiguous, or (out, lse) with lse float32 [B, n_heads, q_len],
            or [n_heads, total_q] for packed sequences.

        Raises:
            MaskError: an argument does not fit the module or another one; the text says which.
        """
        q, k, v = inputs.split(q, k, v, split_qkv)
        inputs.refuse_shapes(q, k, v)
        options: dict[str, Any] = {"scale": sm_scale or None, "return_lse": return_lse}
        if q.dim() == 3:
            inputs.refuse_given("packed", left_paddings=left_paddings, seqlens=seqlens)
            cu_seqlens = inputs.cu_seqlens(len(q), len(k), cu_seqlen_q, cu_seqlen_k)
            for lengths in {*zip(*(ends.diff().tolist() for ends in cu_seqlens), strict=True)}:
                self._refuse_lengths(*lengths)
            mask = self._mask(self._repeats(q.shape[1], k.shape[1]), None)
            return varlen(q, k, v, *cu_seqlens, mask, **options)
        inputs.refuse_given("not packed", cu_seqlen_q=cu_seqlen_q, cu_seqlen_k=cu_seqlen_k)
        if self.seq_dim == 1:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q_len, kv_len = q.shape[2], k.shape[2]
        self._refuse_lengths(q_len, kv_len)
        padding = inputs.padding(left_paddings, seqlens, len(k), kv_len)
        mask = self._mask(
            self._repeats(q.shape[1], k.shape[1]), None if padding else kv_len - q_len
        )
        attend = _plan(mask, self._identity, q.shape[1], q_len, kv_len, padding, q.device)
        result = attend(q, k, v, **options)
        out, lse = result if return_lse else (result, None)
        out = (out.transpose(1, 2) if self.seq_dim == 1 else out).contiguous()
        return out if lse is None else (out, lse)

    def _mask(self, repeats: int, q_offset: int | None) -> Mask | PerHead:
        """The pattern, each head's for `repeats` query heads in turn.

        q_offset is the position of query row 0; None if sequences have each their own.
        """
        raise NotImplementedError

    @property
    def _identity(self) -> tuple[int, int]:
        """Differs for patterns whose masks are slow to compare."""
        return 0, 0

    def _refuse_lengths(self, q_len: int, kv_len: int) -> None:
        if kv_len > self.max_seqlen:
            raise MaskError(
                f"A sequence has {kv_len} keys and this module is for {self.max_seqlen} at most; "
                "make it for longer ones."
            )
        if q_len > kv_len:
            raise MaskError(
                f"A sequence has {q_len} queries and {kv_len} keys. The last query stands at the "
                "last key, so there must be at least as many keys."
            )

    def _repeats(self, n_heads: int, n_kv_heads: int) -> int:
        if not n_kv_heads or n_heads % n_kv_heads:
            raise MaskError(f"q has {n_heads} heads, not a multiple of the {n_kv_heads} of k.")
        if self.n_patterns not in (1, n_heads, n_kv_heads):
            raise MaskError(
                f"q has {n_heads} heads, k has {n_kv_heads}, and the pattern {self.n_patterns}; it "
                "must have one for each head of q or of k, or one for all."
            )
        return n_heads // self.n_patterns


@functools.lru_cache(maxsize=PLANS_KEPT)
def _plan(
    mask: Mask | PerHead,
    identity: tuple[int, int],
    n_heads: int,
    q_len: int,
    kv_len: int,
    padding: inputs.Padding | None,
    device: torch.device,
) -> CompiledMask:
    """The mask compiled for lengths and padding; the latest ones are kept.

    Args:
        mask: of positions in a sequence.
        identity: differs for masks that are slow to compare.
        n_heads: query heads.
        q_len: rows of q.
        kv_len: rows of k.
        padding: (rows of padding in front, tokens behind them) of each batch row.
        device: where q is.
    """
    if padding is None:
        return compile_mask(mask, q_len, kv_len, n_heads=n_heads, device=device)
    starts, lengths = (torch.tensor(x, device=device) for x in zip(*padding, strict=True))
    # a whole prompt begins with its first token, a chunk or a step ends with its last
    first_position = -starts if q_len == kv_len else lengths - q_len
    q_position = q_idx + lookup(first_position, b)
    kv_position = kv_idx - lookup(starts, b)
    is_real = (
        (q_position >= 0)
        & (q_position < lookup(lengths, b))
        & (kv_position >= 0)
        & (kv_position < lookup(lengths, b))
    )

    def placed(mask: Mask) -> Mask:
        # tables have no entries for padding in front
        moved = mask.at(q_idx=maximum(q_position, 0), kv_idx=maximum(kv_position, 0))
        inside: Mask = is_real & moved
        return inside.named(f"{shown(mask)} of {len(padding)} padded sequences")

    if isinstance(mask, PerHead):
        mask = PerHead(tuple(placed(x) for x in mask.distinct), mask.which)
    else:
        mask = placed(mask)
    return compile_mask(
        mask, q_len, kv_len, batch=len(padding), n_heads=n_heads, q_offset=0, device=device
    )
