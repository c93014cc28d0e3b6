"""MagiAttention's flex_flash_attn_func: change the import and keep the script.

    from magi_attention.api import flex_flash_attn_func                     # before
    from flexsparse.compat.magi_attention import flex_flash_attn_func       # after

Names, order and defaults of the arguments are those of its newest release. Added are any device,
head_dim and float dtype, gradients of the LSE, and sentences for what were asserts or illegal
memory accesses. How MagiAttention spreads a sequence over GPUs is no part of this.

The plan of a call is kept: calls with the same ranges, types and lengths analyse nothing. Ranges
are read by value, which waits for the device.

Source: github.com/SandAI-org/MagiAttention, magi_attention/functional/flex_flash_attn.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from flexsparse import MaskError
from flexsparse.compat.by_value import ByValue
from flexsparse.compat.sink_logits import refuse_sink, with_sink
from flexsparse.masks import attention_slices
from flexsparse.masks.arguments import one_of, tensor_of
from flexsparse.masks.ranges import are_many_whole, counts_of_segments, keys_of_rows
from flexsparse.packed.varlen import PlanKey, VarlenMask, refuse_unpacked
from flexsparse.tensors import ScoreMod
from flexsparse.uncompiled import uncompiled

__all__ = ["AttnForwardMeta", "flex_flash_attn_func"]

PLANS_KEPT = 64


@dataclass
class AttnForwardMeta:
    """What a forward pass gives besides its output.

    lse: float32 [total_q, n_heads], the log of the sum of exponentials of each row's scores
    max_logits: None
    """

    lse: Tensor | None
    max_logits: Tensor | None


@uncompiled
def flex_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor | None = None,
    k_ranges: Tensor | None = None,
    attn_type_map: Tensor | None = None,
    *,
    index_sparse_indices: Tensor | None = None,
    q_block_size: int = 1,
    sparse_k_block_size: int = 1,
    sink: Tensor | None = None,
    sink_layout: str = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    disable_fwd_atomic_reduction: bool = False,
    disable_bwd_dkv_atomic_reduction: bool = False,
    disable_bwd_dq_atomic_reduction: bool = False,
    ref_block_size: tuple[int, int] | None = None,
    max_seqlen_q: int | None = None,
    range_merge: bool = False,
    swap_ab: bool = False,
    pack_gqa: bool = False,
    cat_gqa: bool = False,
    block_sparse: bool = False,
    index_sparse: bool = False,
    swap_bwd_qk_loop: bool | None = None,
    return_max_logits: bool = False,
) -> tuple[Tensor, AttnForwardMeta]:
    """Attention in which slices, the queries of a range to a range of keys, are kept.

    The mask is `flexsparse.masks.attention_slices`, which draws it. A row of no slice has output 0
    and LSE -inf, or the LSE of the sink.

    Args:
        q: [total_q, n_heads, D].
        k: [total_k, n_kv_heads, D]; n_kv_heads divides n_heads (GQA).
        v: [total_k, n_kv_heads, Dv].
        q_ranges: integer [slices, 2], the first row of each slice and the one after its last.
        k_ranges: the same for keys.
        attn_type_map: integer [slices]: 0 the whole slice, the default; 1 causal, its last key seen
            by its last row alone; 2 inverse causal, its first key seen by its first row alone; 3
            both.
        index_sparse_indices: refused: lists of keys are no slices.
        q_block_size: ignored, as all that choose between MagiAttention's kernels.
        sparse_k_block_size: ignored.
        sink: float [n, n_heads], logits that each row of a head has besides its scores, and that
            weigh no value; or [total_q, n, n_heads].
        sink_layout: "sh" for the first of the two shapes, "ssh" for the second.
        softmax_scale: 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(score / softcap), the scale in them; 0 is none.
        deterministic: results are so in any case, but for head_dims below 16 on CUDA (see
            flexsparse.compat.block_sparse_attn).
        sm_margin: ignored.
        disable_fwd_atomic_reduction: ignored.
        disable_bwd_dkv_atomic_reduction: ignored.
        disable_bwd_dq_atomic_reduction: ignored.
        ref_block_size: ignored.
        max_seqlen_q: ignored.
        range_merge: ignored.
        swap_ab: ignored.
        pack_gqa: ignored.
        cat_gqa: ignored.
        block_sparse: ignored.
        index_sparse: refused, as index_sparse_indices.
        swap_bwd_qk_loop: ignored.
        return_max_logits: refused: no kernel here keeps the largest score.

    Returns:
        out [total_q, n_heads, Dv], and an AttnForwardMeta.

    Raises:
        MaskError: an argument does not fit the others, or slices share a key of a row, which
            MagiAttention counts twice; the text says which.
    """
    refuse_unpacked(q, k, v)
    _refuse_unknown(index_sparse_indices is not None or index_sparse, return_max_logits)
    if len(v) != len(k):
        raise MaskError(f"v has {len(v)} tokens and k has {len(k)}; give them the same.")
    if not isinstance(softcap, Real) or isinstance(softcap, bool) or not 0 <= softcap < torch.inf:
        raise MaskError(f"softcap={softcap!r}; it must be a positive number, or 0 for none.")
    ranges = _slices(q_ranges, k_ranges, attn_type_map)
    plan = _plan(*ranges, len(q), len(k), q.shape[1], q.device)
    sinks = None if sink is None else _sink_of_rows(sink, sink_layout, len(q), q.shape[1])
    score_mod = _soft_cap(float(softcap)) if softcap else None
    out, lse = plan(q, k, v, scale=softmax_scale, score_mod=score_mod, return_lse=True)
    lse = lse.T
    if sinks is not None:
        out, lse = with_sink(out, lse, sinks)
    return out, AttnForwardMeta(lse.contiguous(), None)


def _refuse_unknown(is_index_sparse: bool, return_max_logits: bool) -> None:
    if is_index_sparse:
        raise MaskError(
            "index_sparse_indices names keys one by one, which are no slices. Make a boolean table "
            "of queries and keys and compile flexsparse.masks.block_sparse(table, 1)."
        )
    if return_max_logits:
        raise MaskError("return_max_logits=True: no kernel here keeps the largest score.")


def _slices(
    q_ranges: Any, k_ranges: Any, attn_type_map: Any
) -> tuple[ByValue, ByValue, ByValue | None]:
    """The slices as keys of a plan, on the CPU, where they are taken apart."""
    name, cpu, found = "flex_flash_attn_func", torch.device("cpu"), []
    for argument, given in (("q_ranges", q_ranges), ("k_ranges", k_ranges)):
        tensor_of(name, argument, given, "integer", {2: "[slices, 2]"})
        found.append(ByValue(argument, given, cpu))
    types = None
    if attn_type_map is not None:
        tensor_of(name, "attn_type_map", attn_type_map, "integer", {1: "[slices]"})
        types = ByValue("attn_type_map", attn_type_map, cpu)
    return found[0], found[1], types


@functools.lru_cache(maxsize=PLANS_KEPT)
def _plan(
    q_ranges: ByValue,
    k_ranges: ByValue,
    attn_type_map: ByValue | None,
    total_q: int,
    total_k: int,
    n_heads: int,
    device: torch.device,
) -> VarlenMask:
    """The slices compiled for lengths; the latest ones are kept."""
    types = None if attn_type_map is None else attn_type_map.tensor
    slices = (q_ranges.tensor, k_ranges.tensor, types)
    ahead = total_k - total_q
    mask = attention_slices(*slices, q_offset=ahead)
    for name, ranges, total in (("q", q_ranges.tensor, total_q), ("k", k_ranges.tensor, total_k)):
        if ranges.numel() and int(ranges.max()) > total:
            raise MaskError(
                f"{name}_ranges end at {int(ranges.max())} and {name} has {total} tokens; they "
                "must end at the last of them."
            )
    _refuse_shared_keys(*slices)
    key = PlanKey(
        mask.to(device), (total_q,), (total_k,), (ahead,), n_heads, device, (128, 128), False
    )
    return VarlenMask(key)


def _refuse_shared_keys(q_ranges: Tensor, k_ranges: Tensor, attn_type_map: Tensor | None) -> None:
    """Raise MaskError where two slices keep the same pair of a row and a key."""
    firsts, order = q_ranges[:, 0].sort()
    if bool((q_ranges[order, 1][:-1] <= firsts[1:]).all()):
        return  # no row is in two of them
    if are_many_whole(q_ranges, q_ranges[:0] if attn_type_map is None else attn_type_map):
        counts, q_segment, _ = counts_of_segments(q_ranges, k_ranges)
        shared = (counts > 1).any(1)[q_segment.long()].nonzero()
    else:
        shared = _rows_with_shared_keys(*keys_of_rows(q_ranges, k_ranges, attn_type_map))
    if len(shared):
        raise MaskError(
            f"Two slices keep the same key for row {int(shared[0])}, which MagiAttention counts "
            "twice. Cut one of them, or compile flexsparse.masks.attention_slices, which keeps "
            "their union."
        )


def _rows_with_shared_keys(starts: Tensor, ends: Tensor) -> Tensor:
    # a range without keys shares none, wherever it is
    is_empty = ends <= starts
    starts, ends = starts.masked_fill(is_empty, -1), ends.masked_fill(is_empty, -1)
    starts, order = starts.sort(0)
    ends = ends.gather(0, order)
    return (ends[:-1] > starts[1:]).any(0).nonzero()


@functools.lru_cache(maxsize=PLANS_KEPT)
def _soft_cap(softcap: float) -> ScoreMod:
    def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _sink_of_rows(sink: Tensor, layout: str, total_q: int, n_heads: int) -> Tensor:
    """The sinks of each row as one: [n_heads] or [total_q, n_heads]."""
    one_of("flex_flash_attn_func", "sink_layout", layout, ("sh", "ssh"))
    rows = () if layout == "sh" else (total_q,)
    of_rows = "total_q, " * len(rows)
    refuse_sink("sink", sink, (*rows, None, n_heads), f"[{of_rows}n, n_heads={n_heads}]")
    return sink.logsumexp(-2)
