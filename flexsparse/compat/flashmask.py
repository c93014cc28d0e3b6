"""FlashMask's flashmask_attention for torch tensors: change the import and keep the script.

    from flash_mask.interface import flashmask_attention          # before; or Paddle's function
    from flexsparse.compat.flashmask import flashmask_attention   # after

Names, order and defaults of the arguments are theirs: Paddle's, and what its kernels for torch and
for newer GPUs take besides. Added are what some of these lack (dropout, block masks, sinks, four
numbers for each key), any device, head_dim and float dtype, gradients of the LSE, and sentences for
what were asserts.

The plan of a call is kept: calls with the same indices and lengths analyse nothing. Indices are
read by value, which waits for the device.

Source: github.com/PaddlePaddle/Paddle, python/paddle/nn/functional/flash_attention.py;
github.com/PaddlePaddle/flash-attention, flashmask/flash_mask/cute/interface.py and
flashmask/flash_mask/flashmask_attention_v3/flashmask_interface.py, which is for torch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse import CompiledMask, MaskError, compile_mask, everything, h, kv_idx, q_idx
from flexsparse.compat.by_value import ByValue
from flexsparse.compat.sink_logits import refuse_sink, with_sink
from flexsparse.dropout import fresh_seed
from flexsparse.masks import block_sparse, flashmask
from flexsparse.masks import causal as causal_mask
from flexsparse.masks.arguments import booleans, is_int, tensor_of
from flexsparse.uncompiled import uncompiled

__all__ = ["flashmask_attention"]

PLANS_KEPT = 16  # each holds its indices
BLOCK = 128
NAME = "flashmask_attention"
SHAPE = "[B, heads, kv_len, numbers]"


@uncompiled
def flashmask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    startend_row_indices: Tensor | None = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    window_size: int | tuple[int, int] | None = None,
    return_softmax_lse: bool = False,
    return_seed_offset: bool = False,
    fixed_seed_offset: Tensor | None = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    softmax_scale: float | None = None,
    block_mask: Tensor | None = None,
    use_varlen: bool = False,
    learnable_sink: Tensor | None = None,
    group: object = None,
) -> Any:
    """Attention in which each key is hidden from intervals of rows, or all of it without indices.

    The mask is `flexsparse.masks.flashmask`, which draws it. Causal, the last query stands at the
    last key (bottom-right); the rows of indices count from the first query. A row that sees no key
    has output 0 and LSE -inf, or the sink.

    Args:
        query: [B, q_len, n_heads, D].
        key: [B, kv_len, n_kv_heads, D]; n_kv_heads divides n_heads (GQA).
        value: [B, kv_len, n_kv_heads, Dv].
        startend_row_indices: integer [B, heads, kv_len, numbers], heads those of key or of query,
            or one for all. The numbers of a key are, where causal, the row from which on it is
            hidden, or the first such row and the one after the last; else the row from which on it
            is hidden and the one up to which it is, or the first row and the one after the last of
            both intervals.
        dropout: the chance to drop a weight, in [0, 1); which it drops is not what Paddle drops.
        causal: keep only keys up to the query.
        window_size: keep only keys from the query's position - left to it + right: (left, right),
            or one number for both. Causal, right is ignored. Takes no startend_row_indices.
        return_softmax_lse: also return the LSE.
        return_seed_offset: also return the seed and offset of the dropout.
        fixed_seed_offset: integer [2], such a seed and offset, for the same dropout.
        rng_name: must be empty: torch's generators have no names.
        training: without it, nothing is dropped.
        name: ignored.
        softmax_scale: 1 / sqrt(D) by default.
        block_mask: [B, heads, ceil(q_len / 128), ceil(kv_len / 128)] of 0 and 1: blocks to keep of
            what the rest keeps, heads as in startend_row_indices.
        use_varlen: ignored; packed documents are recognised.
        learnable_sink: float [n_heads], a logit that each row of a head has besides its scores,
            and that weighs no value.
        group: must be None: no keys of other processes are gathered.

    Returns:
        out [B, q_len, n_heads, Dv], or a list of it, of the LSE, float32 [B, n_heads, q_len], and
        of the seed and offset, int64 [2], as asked for.

    Raises:
        MaskError: an argument does not fit the others; the text says which.
    """
    booleans(NAME, causal=causal, training=training)
    _refuse_unknown(rng_name, group)
    _refuse_shapes(query, key, value)
    (batch, q_len, n_heads), (kv_len, n_kv_heads) = query.shape[:3], key.shape[1:3]
    indices = blocks = None
    if startend_row_indices is not None:
        tensor_of(NAME, "startend_row_indices", startend_row_indices, "integer", {4: SHAPE})
        _refuse_planes("startend_row_indices", startend_row_indices, query, key, (kv_len,))
        indices = ByValue("startend_row_indices", startend_row_indices, query.device)
    if block_mask is not None:
        shape = {4: "[B, heads, rows, columns]"}
        tensor_of(NAME, "block_mask", block_mask, "boolean or integer", shape)
        size = (-(-q_len // BLOCK), -(-kv_len // BLOCK))
        _refuse_planes("block_mask", block_mask, query, key, size)
        blocks = ByValue("block_mask", block_mask, query.device)
    window = _window(window_size, indices is not None, q_len, kv_len)
    if learnable_sink is not None:
        refuse_sink("learnable_sink", learnable_sink, (n_heads,), f"[n_heads={n_heads}]")
    sizes = Sizes(batch, q_len, kv_len, n_heads, n_kv_heads)
    attend = _plan(indices, blocks, causal, window, sizes, query.device)
    drops = training and dropout != 0
    seed, offset = _seed_and_offset(fixed_seed_offset, drops)
    has_lse = return_softmax_lse or learnable_sink is not None
    result = attend(
        *(x.transpose(1, 2) for x in (query, key, value)),
        scale=softmax_scale,
        dropout_p=dropout if drops else 0.0,
        dropout_seed=seed ^ offset << 32,
        return_lse=has_lse,
    )
    out, lse = result if has_lse else (result, None)
    if lse is not None and learnable_sink is not None:
        out, lse = with_sink(out, lse, learnable_sink[:, None])
    out = out.transpose(1, 2).contiguous()
    if not (return_softmax_lse or return_seed_offset):
        return out
    drawn = torch.tensor([seed, offset], device=query.device)
    return [out, *[lse] * return_softmax_lse, *[drawn] * return_seed_offset]


class Sizes(NamedTuple):
    """What query and key are like."""

    batch: int
    q_len: int
    kv_len: int
    n_heads: int
    n_kv_heads: int


@functools.lru_cache(maxsize=PLANS_KEPT)
def _plan(
    indices: ByValue | None,
    blocks: ByValue | None,
    causal: bool,
    window: tuple[int, int] | None,
    sizes: Sizes,
    device: torch.device,
) -> CompiledMask:
    """The mask compiled; the latest ones are kept."""
    batch, q_len, kv_len, n_heads, n_kv_heads = sizes
    ahead, group_size = kv_len - q_len, n_heads // n_kv_heads
    mask = causal_mask if causal else everything
    if indices is not None:
        table = _distinct(indices.tensor)
        per_group = 1 if table.shape[1] == n_heads else group_size
        mask = flashmask(table, causal, ahead, per_group)
    elif window is not None:
        left, right = window
        near = q_idx - kv_idx <= left
        mask = mask & near if causal else near & (kv_idx - q_idx <= right)
    if blocks is not None:
        table = _distinct(blocks.tensor)
        unknown = table[(table != 0) & (table != 1)]
        if len(unknown):
            raise MaskError(f"block_mask holds {int(unknown[0])}; it must hold 0 and 1.")
        kept = block_sparse(table.bool(), BLOCK, ahead)
        if table.shape[1] not in (1, n_heads):
            kept = kept.at(h=h // group_size).named(kept.name)
        mask = mask & kept
    return compile_mask(mask, q_len, kv_len, batch=batch, n_heads=n_heads, device=device)


def _distinct(table: Tensor) -> Tensor:
    """The table with one batch row, or one head, where all are alike: they share their blocks."""
    for axis in (0, 1):
        first = table.narrow(axis, 0, min(table.shape[axis], 1))
        table = first if bool((table == first).all()) else table
    return table


def _refuse_unknown(rng_name: str, group: object) -> None:
    if rng_name:
        raise MaskError(
            f"rng_name={rng_name!r}: torch's generators have no names. Leave it out; "
            "torch.manual_seed decides what is dropped, or fixed_seed_offset."
        )
    if group is not None:
        raise MaskError("group: keys of other processes are not gathered here; gather them first.")


def _refuse_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise MaskError(f"{name} is {found}; it must be a tensor [B, tokens, heads, head_dim].")
    n_heads, n_kv_heads = query.shape[2], key.shape[2]
    if not n_kv_heads or n_heads % n_kv_heads:
        raise MaskError(f"query has {n_heads} heads, not a multiple of the {n_kv_heads} of key.")


def _refuse_planes(
    name: str, given: Tensor, query: Tensor, key: Tensor, size: tuple[int, ...]
) -> None:
    """Raise MaskError unless a tensor is for these batch rows, heads and lengths."""
    batch, n_heads, n_kv_heads = len(query), query.shape[2], key.shape[2]
    fits = given.shape[0] in (1, batch) and given.shape[1] in (1, n_kv_heads, n_heads)
    if not fits or tuple(given.shape[2 : 2 + len(size)]) != size:
        raise MaskError(
            f"{name} has shape {tuple(given.shape)}; it must be [{batch}, heads, "
            f"{', '.join(map(str, size))}{', numbers' * (len(size) == 1)}], heads 1, {n_kv_heads} "
            f"(those of key) or {n_heads} (those of query)."
        )


def _window(size: object, has_indices: bool, q_len: int, kv_len: int) -> tuple[int, int] | None:
    """window_size as (left, right)."""
    if size is None:
        return None
    pair = (size, size) if is_int(size) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(is_int, pair)):
        raise MaskError(f"window_size={size!r}; it must be an int, or (left, right).")
    left, right = pair
    if left < 0 or right < 0:
        raise MaskError(
            f"window_size={size!r}; both sides must be 0 or more. For no bound on a side give the "
            "number of tokens, for no window None."
        )
    if has_indices:
        raise MaskError(
            "window_size and startend_row_indices were given, and the function takes one of them. "
            "Write the window into the indices, or compile flexsparse.masks.flashmask(...) & "
            "flexsparse.masks.window(size)."
        )
    if q_len != kv_len:
        raise MaskError(
            f"window_size with {q_len} queries and {kv_len} keys; there must be as many of both. "
            "Compile flexsparse.masks.window(size), which puts the last query at the last key."
        )
    return left, right


def _seed_and_offset(given: Tensor | None, drops: bool) -> tuple[int, int]:
    if given is None:
        return fresh_seed() if drops else 0, 0
    tensor_of(NAME, "fixed_seed_offset", given, "integer", {1: "[2]"})
    if given.numel() != 2 or given.is_meta:
        raise MaskError(
            f"fixed_seed_offset is of shape {tuple(given.shape)} on {given.device}; it must be the "
            "two numbers [seed, offset]."
        )
    seed, offset = given.tolist()
    return seed, offset
