"""How many blocks of attention a plan computes, the model's own masks included."""

from __future__ import annotations

import functools
from typing import Any

from flexsparse.compiler import compile_mask
from flexsparse.expr import Mask, everything
from flexsparse.masks import causal, chunked, window
from flexsparse.plan import SparsePlan, masks_at

BLOCK = 128


def own_mask(config: Any, layer: int) -> Mask:
    """What a layer of a decoder lets its heads see, by the config of the model."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else "full_attention"
    if kind == "full_attention" and not kinds and getattr(config, "sliding_window", None):
        kind = "sliding_attention"  # Mistral and Phi-3 have one window for all layers
    if kind == "sliding_attention":
        return causal & window(config.sliding_window)
    if kind == "chunked_attention":
        return causal & chunked(config.attention_chunk_size)
    return causal


def full_layers(config: Any) -> list[int]:
    """The layers in which every query sees all keys before it: those that a plan is for."""
    return [i for i in range(config.num_hidden_layers) if own_mask(config, i) == causal]


def blocks(mask: Mask, length: int, head: int) -> int:
    """Blocks of 128 x 128 tokens that a head computes under its mask at a length, in tokens."""
    return _blocks(mask.at(h=head) if "h" in mask.variables else mask, length)


@functools.lru_cache(maxsize=4096)
def _blocks(mask: Mask, length: int) -> int:
    return compile_mask(mask, length, length, device="cpu").launches[0].classes.blocks


def plan_blocks(plan: SparsePlan, config: Any, length: int) -> tuple[int, int]:
    """(Blocks that a plan computes, blocks there are) in the layers that it changes.

    Args:
        plan: for this model.
        config: the model's text config.
        length: in tokens.
    """
    computed = every = 0
    for i, layer in enumerate(plan.layers):
        if layer is None:
            continue
        masks = masks_at(layer, length)
        own = own_mask(config, i)
        for head in range(masks.n_heads):
            seen = own if masks[head] == everything else own & masks[head]
            computed += blocks(seen, length, head)
        every += masks.n_heads * (-(-length // BLOCK)) ** 2
    return computed, every


def plan_density(plan: SparsePlan, config: Any, length: int) -> float:
    """Blocks that a plan computes as a part of all, in the layers that it changes."""
    computed, every = plan_blocks(plan, config, length)
    return computed / every if every else 0.0
