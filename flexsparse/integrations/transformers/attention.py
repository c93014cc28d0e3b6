"""The two functions that make an attention implementation of transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexsparse.errors import ExecutorError
from flexsparse.expr import everything
from flexsparse.heads import PerHead, as_per_head
from flexsparse.integrations.transformers.masks import BlocksMask, ModelMask, RowMask
from flexsparse.integrations.transformers.rows import EVERYTHING, attend_row
from flexsparse.plan import Head, masks_at
from flexsparse.tensors import ScoreMod
from flexsparse.tracing import from_mask_mod

HEADS = "flexsparse_heads"  # the attribute of an attention layer that holds its part of a plan
# what some models pass to their attention that no mask can say
REFUSED = {
    "s_aux": "a learned term in the softmax",
    "position_bias": "a bias on its scores",
    "indices": "keys that the model picks itself",
    "block_indices": "blocks that the model picks itself",
    "cache": "a paged cache",
}


def model_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> ModelMask:
    """The mask function of the implementation: what the model hides, for its attention to use."""
    shape = batch_size, q_length, kv_length
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ExecutorError(
                f"attention_mask is {tuple(attention_mask.shape)}; give a padding mask "
                "[batch, tokens], or none, and put patterns in a SparsePlan."
            )
        missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
        attention_mask = functional.pad(attention_mask, (0, missing))
        attention_mask = attention_mask[:, : kv_offset + kv_length]
    if use_vmap:  # a function of single indices; traced, it takes any
        mask_function = from_mask_mod(mask_function, device=device)
    made = RowMask if q_length == 1 else _blocks_mask
    return made(mask_function, attention_mask, shape, q_offset, kv_offset, torch.device(device))


# no compiler above us has a part in the analysis, nor in kernels that are compiled already
_blocks_mask = torch.compiler.disable(BlocksMask)  # type: ignore[no-untyped-call]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of the implementation, of one layer.

    Args:
        module: the layer; a plan has left the masks of its heads on it.
        query: [B, n_heads, q_len, D].
        key: [B, n_kv_heads, kv_len, D].
        value: [B, n_kv_heads, kv_len, Dv].
        attention_mask: from `model_mask`; None sees everything, where nothing is causal.
        scaling: of the scores.
        dropout: the chance to drop a weight.
        softcap: scores become softcap * tanh(score / softcap).
        is_causal: what the layer says it is; by default its attribute.
        others: what else the model passes on.

    Returns:
        out [B, q_len, n_heads, Dv], and no weights.
    """
    layer = getattr(module, HEADS, None)
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    reason = _unsupported(key, attention_mask, is_causal or layer is not None, others)
    if reason is not None:
        raise ExecutorError(f"{type(module).__name__} cannot run as flexsparse: {reason}.")
    masks = _masks(layer, query, attention_mask)
    if isinstance(attention_mask, BlocksMask):
        out = _attend_blocks(query, key, value, attention_mask, masks, scaling, softcap, dropout)
    else:
        picks = EVERYTHING
        if isinstance(attention_mask, RowMask):
            picks = attention_mask.picks(masks, key.shape[1])
        out = attend_row(query, key, value, picks, scaling, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


def _masks(layer: Any, query: Tensor, mask: ModelMask | None) -> PerHead:
    """What a plan gives the heads of a layer; without one, everything the model lets them see."""
    n_heads = query.shape[1]
    if layer is None or mask is None:
        return as_per_head(everything, n_heads)
    masks = layer if isinstance(layer, PerHead) else _masks_at(layer, mask.n_keys)
    if masks.n_heads != n_heads:
        raise ExecutorError(
            f"The plan has {masks.n_heads} query heads and this layer computes {n_heads}; a plan "
            "cannot be used where heads are split over devices."
        )
    return masks


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _masks_at(layer: tuple[Head, ...], n_keys: int | Tensor) -> PerHead:
    return masks_at(layer, int(n_keys))


def _unsupported(key: Tensor, mask: object, needs_mask: bool, others: dict[str, Any]) -> str | None:
    """Why a layer's attention cannot be computed, as a sentence, or None if it can."""
    for name, what in REFUSED.items():
        if others.get(name) is not None:
            return f"the model's attention has {what} ({name})"
    if others.get("output_attentions"):
        return (
            "it never has the weights that output_attentions=True asks for; use "
            'set_attn_implementation("eager") for those'
        )
    if mask is None and needs_mask:
        return (
            "the model hands over no mask, and its causality would be lost; call "
            "flexsparse.integrations.transformers.register()"
        )
    if mask is None:
        return None
    if not isinstance(mask, ModelMask):
        return (
            f"its mask is a {type(mask).__name__}; give the model a padding mask [batch, tokens], "
            "or none, and put patterns in a SparsePlan"
        )
    packed = others.get("cu_seq_lens_q")
    if packed is not None and len(packed) > 2 and not mask.is_packed:
        return (
            "its sequences are packed (cu_seq_lens_q) and its mask does not know of it; call the "
            "model with position_ids that start again, use_cache=False and no attention_mask"
        )
    if key.shape[2] != mask.kv_len:
        return (
            f"its cache gives {key.shape[2]} keys and told the model's mask of {mask.kv_len}; use "
            "a DynamicCache or a StaticCache"
        )
    return None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlocksMask,
    masks: PerHead,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention over the blocks that the layer's masks and the model's own keep."""
    score_mod = None if softcap is None else _soft_cap(softcap)
    attend = mask.compiled(masks, q.device)
    out: Tensor = attend(q, k, v, scale=scale, score_mod=score_mod, dropout_p=dropout)
    return out


@functools.cache
def _soft_cap(cap: float) -> ScoreMod:
    def soft_cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return soft_cap
