"""Block-Sparse-Attention's functions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from flexsparse import MaskError
from flexsparse.compat.block_sparse_attn.heads import (
    BLOCK_SPARSE,
    DENSE,
    STREAMING,
    Lengths,
    head_types,
    mask_of_heads,
    refuse_base_blockmask,
    refuse_lengths,
    streaming_numbers,
)
from flexsparse.dropout import fresh_seed
from flexsparse.packed.cu_seqlens import first_positions, lengths
from flexsparse.packed.varlen import PlanKey, VarlenMask, plan_of_lengths, refuse_unpacked


def block_sparse_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    base_blockmask: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    exact_streaming: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of packed sequences in which each head is dense, block-sparse or streaming.

    A query row that sees no key has output 0 and LSE +inf.

    Args:
        q: [total_q, n_heads, D].
        k: [total_k, n_kv_heads, D]; n_kv_heads divides n_heads (GQA).
        v: [total_k, n_kv_heads, Dv].
        cu_seqlens_q: int32 [batch + 1], where each sequence starts in q, and total_q.
        cu_seqlens_k: the same for k and v.
        head_mask_type: int32 [n_heads]: 0 dense, 1 block-sparse, -1 streaming.
        streaming_info: int32 [2 * n_heads], sink and local of each query head in turn: in tokens if
            exact_streaming, else in blocks of 128. local counts the query's own token or block; in
            blocks and not causal, it means the last blocks of the keys. None if no head streams.
        base_blockmask: bool [batch, heads of type 1, rows, columns], blocks of 128 counted from the
            first query and the first key of each sequence; [:, i] is of the i-th head of type 1.
        max_seqlen_q_: at least the longest sequence of q; it says how many rows there are.
        max_seqlen_k_: at least the longest sequence of k; it says how many columns there are.
        p_dropout: the chance to drop a weight, in [0, 1); torch.manual_seed decides which.
        deterministic: results are so in any case (see above).
        softmax_scale: 1 / sqrt(D) by default.
        is_causal: a query sees no later key; the last query stands at the last key (bottom-right).
        exact_streaming: stream by tokens; needs is_causal.
        return_attn_probs: also return the LSE and the dropout pattern.

    Returns:
        out [total_q, n_heads, Dv], or (out, softmax_lse, S_dmask):
        softmax_lse: float32 [batch, n_heads, max_seqlen_q_], +inf past the end of a sequence.
        S_dmask: int8 [batch, n_heads, max_seqlen_q_, max_seqlen_k_]: -1 where the weight of row and
            column was dropped, 1 where it was not, 0 past the ends; empty without dropout. It is as
            large as the attention matrix: for tests.

    Raises:
        MaskError: an argument does not fit the others; the text says which.
    """
    return _attend(
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q_, max_seqlen_k_),
        head_mask_type,
        streaming_info,
        base_blockmask,
        allowed_types=(DENSE, BLOCK_SPARSE, STREAMING),
        p_dropout=p_dropout,
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        exact_streaming=exact_streaming,
        return_attn_probs=return_attn_probs,
    )


def token_streaming_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    return_attn_probs: bool = False,
) -> Any:
    """Causal attention in which each head is dense or streams by tokens.

    A streaming head sees the first `sink` keys of the sequence and its latest `local`, the query's
    own included: block_sparse_attn_func with is_causal and exact_streaming, types 0 and -1 only,
    and no dropout. Arguments and result are those of block_sparse_attn_func.
    """
    return _attend(
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q_, max_seqlen_k_),
        head_mask_type,
        streaming_info,
        None,
        allowed_types=(DENSE, STREAMING),
        p_dropout=0.0,
        softmax_scale=softmax_scale,
        is_causal=True,
        exact_streaming=True,
        return_attn_probs=return_attn_probs,
    )


def block_streaming_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    head_mask_type: Tensor,
    streaming_info: Tensor | None,
    max_seqlen_q_: int,
    max_seqlen_k_: int,
    p_dropout: float,
    deterministic: bool = False,
    softmax_scale: float | None = None,
    is_causal: bool = True,
    return_attn_probs: bool = False,
) -> Any:
    """Attention in which each head is dense or streams by blocks of 128.

    Causal, a streaming head sees the first `sink` blocks of keys and the `local` latest, counted
    back from the block where the diagonal of its row of 128 queries ends. Where kv_len - q_len is
    no multiple of 128 that diagonal crosses two blocks, and both count: with local=1 the first of
    them is lost, and with it nearly every key. Their kernel does the same. Not causal, it sees the
    first `sink` and the last `local` blocks of the keys.

    block_sparse_attn_func with types 0 and -1 only. Arguments and result are those of
    block_sparse_attn_func.
    """
    return _attend(
        (q, k, v),
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q_, max_seqlen_k_),
        head_mask_type,
        streaming_info,
        None,
        allowed_types=(DENSE, STREAMING),
        p_dropout=p_dropout,
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        exact_streaming=False,
        return_attn_probs=return_attn_probs,
    )


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    head_mask_type: Any,
    streaming_info: Any,
    base_blockmask: Tensor | None,
    *,
    allowed_types: tuple[int, ...],
    p_dropout: float,
    softmax_scale: float | None,
    is_causal: bool,
    exact_streaming: bool,
    return_attn_probs: bool,
) -> Any:
    refuse_unpacked(*qkv)
    if not 0 <= p_dropout < 1:
        raise MaskError(f"p_dropout={p_dropout}; it must be in [0, 1), and 0 is no dropout.")
    if exact_streaming and not is_causal:
        raise MaskError(
            "exact_streaming=True and is_causal=False: token streaming is causal. Pass "
            "is_causal=True, or stream by blocks."
        )
    n_heads, device = qkv[0].shape[1], qkv[0].device
    for name, most in zip(("max_seqlen_q_", "max_seqlen_k_"), max_seqlens, strict=True):
        if not hasattr(most, "__index__"):
            raise MaskError(f"{name}={most!r}; it must be an int, the tokens of the longest.")
    longest = (operator.index(most) for most in max_seqlens)
    sizes = Lengths(*lengths(*cu_seqlens), *longest)
    refuse_lengths(sizes)
    types = head_types(head_mask_type, n_heads, allowed_types)
    numbers = streaming_numbers(streaming_info, types)
    refuse_base_blockmask(base_blockmask, types, sizes)
    mask = mask_of_heads(
        types,
        numbers,
        base_blockmask,
        sizes,
        is_causal=is_causal,
        exact_streaming=exact_streaming,
        device=device,
    )
    in_blocks = BLOCK_SPARSE in types or (STREAMING in types and not exact_streaming)
    positions = first_positions(None, sizes.q, sizes.kv)
    plan = plan_of_lengths(
        PlanKey(mask, sizes.q, sizes.kv, positions, n_heads, device, (128, 128), in_blocks)
    )
    seed = fresh_seed() if p_dropout else None
    result = plan(
        *qkv,
        scale=softmax_scale,
        dropout_p=p_dropout,
        dropout_seed=seed,
        return_lse=return_attn_probs,
    )
    if not return_attn_probs:
        return result
    out, lse = result
    pattern = out.new_empty(0, dtype=torch.int8)
    if seed is not None:
        pattern = _dropout_pattern(plan, sizes, n_heads, p_dropout, seed, device)
    return out, _padded_lse(lse, sizes), pattern


def _padded_lse(lse: Tensor, sizes: Lengths) -> Tensor:
    """[n_heads, total_q] -> [batch, n_heads, max_seqlen_q_], +inf where there is no key."""
    padded = lse.new_full((len(sizes.q), len(lse), sizes.max_q), torch.inf)
    for i, part in enumerate(torch.split(lse, list(sizes.q), 1)):
        padded[i, :, : part.shape[1]] = part.masked_fill(part == -torch.inf, torch.inf)
    return padded


def _dropout_pattern(
    plan: VarlenMask, sizes: Lengths, n_heads: int, p: float, seed: int, device: torch.device
) -> Tensor:
    shape = (len(sizes.q), n_heads, sizes.max_q, sizes.max_kv)
    pattern = torch.zeros(shape, dtype=torch.int8, device=device)
    for i, (q_len, kv_len) in enumerate(zip(sizes.q, sizes.kv, strict=True)):
        kept = plan.dropout_pattern(i, n_heads, p, seed)
        pattern[i, :, :q_len, :kv_len] = torch.where(kept, 1, -1)
    return pattern
