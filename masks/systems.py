"""Systems that give each head a mask of its own: they return per_head masks (LongGen: layers).

The names and defaults of the arguments are those of the systems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flexsparse import Mask, MaskError, PerHead, per_head
from flexsparse.masks.arguments import (
    at_least,
    booleans,
    counts,
    entries,
    is_int,
    one_of,
    tensor_of,
)
from flexsparse.masks.positions import causal, full
from flexsparse.masks.streaming import block_streaming, duo_streaming, token_streaming
from flexsparse.masks.tables import block_sparse


def block_sparse_attention(
    head_mask_type: Sequence[int] | Tensor,
    streaming_info: Sequence[int] | Tensor | None = None,
    base_blockmask: Tensor | None = None,
    is_causal: bool = False,
    exact_streaming: bool = False,
    q_offset: int = 0,
    kv_len: int | None = None,
) -> PerHead:
    """Block-Sparse-Attention's call: each head dense, streaming, or block-sparse.

    block_sparse_attention([0, 1], None, [[[[1, 0], [0, 1]]]], True), 2 x 2 blocks of 128:    #. #.
                                                                                              ## .#
    Args:
        head_mask_type: for each query head 0 dense, 1 block-sparse, or negative streaming.
        streaming_info: [sink, local] of each query head in turn, 2 * heads ints: in tokens if
            exact_streaming (local counts the query's own), else in blocks of 128.
        base_blockmask: boolean [B, block-sparse heads, rows, columns], blocks of 128; the j-th head
            of type 1 has base_blockmask[:, j]. Rows count from query row 0, not from position 0.
        is_causal: keep only keys up to the query; without it, local blocks are the last keys.
        exact_streaming: token by token; needs is_causal.
        q_offset: position of query row 0, from which rows of blocks count: kv_len - q_len.
        kv_len: keys, in tokens; read only by streaming heads that are not causal.

    Source: Block-Sparse-Attention's block_sparse_attn_func.
    """
    booleans("block_sparse_attention", is_causal=is_causal, exact_streaming=exact_streaming)
    types = _ints("block_sparse_attention", "head_mask_type", head_mask_type)
    sparse_heads = [head for head, kind in enumerate(types) if kind == 1]
    if max(types) > 1:
        raise MaskError(
            f"block_sparse_attention(head_mask_type={types}): {max(types)} is not a type; use 0 "
            "(dense), 1 (block-sparse, numbered in head order) or -1 (streaming)."
        )
    if exact_streaming and not is_causal:
        raise MaskError(
            "block_sparse_attention(exact_streaming=True, is_causal=False): exact streaming is "
            "causal."
        )
    info = (
        []
        if streaming_info is None
        else _ints("block_sparse_attention", "streaming_info", streaming_info)
    )
    if min(types) < 0 and len(info) != 2 * len(types):
        raise MaskError(
            f"block_sparse_attention got {len(info)} numbers in streaming_info; streaming heads "
            f"need (sink, local) for every query head: {2 * len(types)} numbers."
        )
    if sparse_heads:
        _check_base_blockmask(base_blockmask, len(sparse_heads))

    def mask_of(head: int) -> Mask:
        if types[head] == 0:
            return causal if is_causal else full
        if types[head] < 0:
            sink, local = info[2 * head : 2 * head + 2]
            if exact_streaming:
                return token_streaming(sink, local)
            return block_streaming(
                sink, local, is_causal=is_causal, q_offset=q_offset, kv_len=kv_len
            )
        assert base_blockmask is not None
        place = sparse_heads.index(head)
        kept = block_sparse(base_blockmask[:, place : place + 1], 128, q_offset)
        kept = kept.named(f"block_sparse({tuple(base_blockmask.shape[-2:])} blocks of 128)")
        return causal & kept if is_causal else kept

    return per_head([mask_of(head) for head in range(len(types))])


def _check_base_blockmask(base_blockmask: Tensor | None, n_sparse: int) -> None:
    if base_blockmask is None:
        raise MaskError(
            f"block_sparse_attention got {n_sparse} heads of type 1 and no base_blockmask; give "
            "boolean [B, block-sparse heads, rows, columns]."
        )
    tensor_of(
        "block_sparse_attention",
        "base_blockmask",
        base_blockmask,
        "boolean",
        {4: "[B, block-sparse heads, rows, columns]"},
    )
    if base_blockmask.shape[1] != n_sparse:
        raise MaskError(
            f"block_sparse_attention got a base_blockmask of {base_blockmask.shape[1]} heads and "
            f"{n_sparse} heads of type 1; it must have one for each of them, in head order."
        )


def duo_attention(
    full_attention_heads: Sequence[float] | Tensor,
    sink_size: int = 64,
    recent_size: int = 256,
    group_size: int = 1,
    threshold: float | Tensor = 0.5,
    phase: str = "decoding",
    chunk_size: int | None = None,
) -> PerHead:
    """DuoAttention's heads: retrieval heads are causal, the others stream (`duo_streaming`).

    duo_attention([1, 0], 128, 256, phase="training_blocks"), 5 x 5 blocks of 128:
        #.... #....
        ##... ##...
        ###.. ###..
        ####. #.##.
        ##### #..##

    Args:
        full_attention_heads: the value in [0, 1] of each kv head, a row of the .tsv file.
        sink_size: first keys, in tokens.
        recent_size: latest keys, in tokens; `duo_streaming` says what each phase makes of it.
        group_size: query heads of a kv head (GQA).
        threshold: heads of at least this value are full; a quantile of the values gives a sparsity.
        phase: "training", "training_blocks", "prefill" or "decoding".
        chunk_size: tokens of a chunk, in phase "prefill".

    Source: DuoAttention (arXiv 2410.10819).
    """
    streaming = duo_streaming(sink_size, recent_size, phase, chunk_size)
    return _split("duo_attention", full_attention_heads, threshold, group_size, streaming)


def lserve(
    full_attention_heads: Sequence[float] | Tensor,
    ctx_sink_token: int = 128,
    ctx_local_token: int = 8192,
    group_size: int = 1,
    threshold: float | Tensor = 0.5,
) -> PerHead:
    """LServe's prefill: retrieval heads are causal, the others see a sink and a window of tokens.

    lserve([1, 0], 64, 64), 5 x 5 blocks of 64:
        #.... #....
        ##... ##...
        ###.. ###..
        ####. #.##.
        ##### #..##

    Args:
        full_attention_heads: for each kv head its value in [0, 1], as DuoAttention's.
        ctx_sink_token: first keys, in tokens.
        ctx_local_token: latest keys, in tokens, the query's own included.
        group_size: query heads of a kv head (GQA).
        threshold: heads of at least this value are full.

    Source: LServe (arXiv 2502.14866). The pages it picks when decoding: `kept_keys(pages, 64)`.
    """
    streaming = token_streaming(ctx_sink_token, ctx_local_token)
    return _split("lserve", full_attention_heads, threshold, group_size, streaming)


def _split(
    name: str,
    values: Sequence[float] | Tensor,
    threshold: float | Tensor,
    group_size: int,
    streaming: Mask,
) -> PerHead:
    """Causal for the kv heads whose value reaches the threshold, streaming for the others."""
    heads = entries(values)
    if not heads or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in heads):
        raise MaskError(
            f"{name}(full_attention_heads={heads or values!r}): give one number of 0 to 1 for each "
            "kv head of a layer."
        )
    is_one = isinstance(threshold, Tensor) and threshold.numel() == 1
    if not is_one and not isinstance(threshold, (int, float)):
        raise MaskError(f"{name}(threshold={threshold!r}): threshold must be a number.")
    counts(name, group_size=group_size)
    return per_head(
        [causal if v >= threshold else streaming for v in heads for _ in range(group_size)]
    )


def moa(
    alphas: Sequence[float],
    betas: Sequence[float],
    seq_len: int,
    max_new_token: int = 1024,
    block_size: int = 64,
    sink_size: int = 64,
    phase: str = "prefill",
) -> PerHead:
    """MoA's heads: each has a span of its own, alpha + beta * length, for a sink and recent keys.

    The span is at most the length, at least 128, and a whole number of blocks; the sink is taken
    out of it. Prefill counts in blocks, the query's own included (`block_streaming`); decoding in
    tokens (`token_streaming`).

    moa([0, 192], [0.0, 0.0], 384, 0), 6 x 6 blocks of 64:                           #..... #.....
                                                                                     ##.... ##....
    Args:                                                                            #.#... ###...
        alphas: of each head of a layer, in tokens; moa_alpha_beta.json has them.    #..#.. #.##..
        betas: of each head, keys for each token of the length.                      #...#. #..##.
        seq_len: of the prompt, in tokens.                                           #....# #...##
        max_new_token: tokens to be generated; the length is seq_len + max_new_token.
        block_size: tokens of a block.
        sink_size: first keys, in tokens, a multiple of block_size.
        phase: "prefill" or "decoding".

    Source: MoA, Mixture of Sparse Attention (arXiv 2406.14909), moa_config_to_cache_config.
    """
    at_least("moa", 1, seq_len=seq_len, block_size=block_size)
    at_least("moa", 0, max_new_token=max_new_token, sink_size=sink_size)
    one_of("moa", "phase", phase, ("prefill", "decoding"))
    alphas, betas = _numbers("moa", "alphas", alphas), _numbers("moa", "betas", betas)
    if len(alphas) != len(betas) or not alphas:
        raise MaskError(
            f"moa got {len(alphas)} alphas and {len(betas)} betas; give one of each for every head."
        )
    if sink_size % block_size:
        raise MaskError(
            f"moa(sink_size={sink_size}, block_size={block_size}): the sink must be whole blocks."
        )
    length = seq_len + max_new_token

    def mask_of(alpha: float, beta: float) -> Mask:
        span = int(max(min(alpha + beta * length, length), 128))
        span = -(-span // block_size) * block_size
        sink = min(span, sink_size)
        if span == sink:
            raise MaskError(
                f"moa(sink_size={sink_size}): a span of {span} tokens leaves no recent keys; use a "
                "smaller sink."
            )
        if phase == "decoding":
            return token_streaming(sink, span - sink)
        return block_streaming(sink // block_size, (span - sink) // block_size, block_size)

    return per_head([mask_of(alpha, beta) for alpha, beta in zip(alphas, betas, strict=True)])


def longgen(n_layers: int, sparse: Mask) -> list[Mask]:
    """LongGen's layers: the middle third causal, the others sparse; one mask for each layer.

    longgen(3, block_streaming(1, 1, 2)), 6 x 6:
        #..... #..... #.....
        ##.... ##.... ##....
        ###... ###... ###...
        ####.. ####.. ####..
        ##..#. #####. ##..#.
        ##..## ###### ##..##

    Args:
        n_layers: layers of the model; n_layers // 3 of them, in the middle, are causal.
        sparse: the mask of the others: block_streaming(sink_blocks, local_blocks), or
            local_stride(local_blocks, vert_stride), its two variants.

    Source: LongGen (arXiv 2410.01485). Its block sizes are not published with it.
    """
    counts("longgen", n_layers=n_layers)
    if not isinstance(sparse, Mask):
        raise MaskError(f"longgen(sparse={sparse!r}): give a Mask, such as block_streaming(1, 3).")
    n_full = n_layers // 3
    first = (n_layers - n_full) // 2
    return [causal if first <= layer < first + n_full else sparse for layer in range(n_layers)]


def _ints(name: str, argument: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        tensor_of(name, argument, values, "integer", {1: "[n]"})
    numbers = entries(values)
    if not numbers or not all(map(is_int, numbers)):
        raise MaskError(f"{name}({argument}={values!r}): {argument} must be a list of ints.")
    return numbers


def _numbers(name: str, argument: str, values: Any) -> list[float]:
    numbers = entries(values)
    is_list = bool(numbers) or isinstance(values, (Sequence, Tensor))
    if not is_list or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers):
        raise MaskError(
            f"{name}({argument}={values!r}): {argument} must be a list of numbers, one for each "
            "head."
        )
    return numbers
