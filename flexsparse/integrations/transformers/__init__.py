"""Hugging Face transformers: `attn_implementation="flexsparse"`, and plans on loaded models.

>>> from flexsparse.integrations import transformers
>>> transformers.register()
>>> model.set_attn_implementation("flexsparse")     # exact, without a plan
>>> SparsePlan.load("plan.json").apply(model)       # registers and sets it by itself
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flexsparse.errors import MaskError
from flexsparse.integrations.transformers import rules
from flexsparse.integrations.transformers.attention import HEADS, attention_forward, model_mask
from flexsparse.plan import ANY_LENGTH, SparsePlan, masks_at, reads_length

NAME = "flexsparse"
BEFORE = "flexsparse_before"  # the attribute of a model that says what its attention was


def register() -> None:
    """Add "flexsparse" to the attention implementations of transformers, for every model.

    Raises:
        MaskError: transformers is missing, or older than 5.0.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        raise MaskError(
            "flexsparse in transformers needs transformers 5.0 or later: "
            "pip install 'flexsparse[hf]'"
        ) from None
    # both: with the first alone, models hand over no mask and lose causality and padding
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, model_mask)


def apply(plan: SparsePlan, model: Any) -> None:
    """Put a plan on a model, in place of any it has: what `plan.apply(model)` does."""
    register()
    model = _checked(model)
    reason = plan.problem(model.config)
    if reason is not None:
        raise MaskError(reason)
    layers = _attention_layers(model)
    for i, layer in enumerate(plan.layers):
        if layer is not None and layers and i not in layers:
            raise MaskError(f"Layer {i} of {type(model).__name__} has no attention: give it None.")
    _switch(model, layers)
    for i, module in layers.items():
        layer = plan.layers[i]
        fixed = layer is not None and not reads_length(layer)
        setattr(module, HEADS, masks_at(layer, ANY_LENGTH) if fixed else layer)


def remove(model: Any) -> None:
    """Take any plan off a model and give it the attention it had before it."""
    model = _checked(model)
    for module in model.modules():
        vars(module).pop(HEADS, None)
    before = vars(model).pop(BEFORE, None)
    if before is not None:
        model.set_attn_implementation(before)
    rules.forget()


def _checked(model: Any) -> Any:
    """The model itself, where torch.compile or PEFT has wrapped it, if it is of transformers."""
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise MaskError(
            f"A plan goes on a model of transformers, and this is {type(model).__name__}, whose "
            "attention cannot be swapped."
        )
    swap: Any = model.set_attn_implementation
    return swap.__self__  # a wrapper hands on the methods of what it wraps


def _attention_layers(model: Any) -> dict[int, nn.Module]:
    """The attention of each layer of the decoder that has one of the usual kind."""
    decoder = model.config.get_text_config()
    layers: dict[int, nn.Module] = {}
    for module in model.modules():
        if (
            getattr(module, "layer_idx", None) in range(decoder.num_hidden_layers)
            and hasattr(module, "is_causal")
            # a vision tower counts its layers too
            and getattr(module, "config", None) is decoder
        ):
            first = layers.setdefault(module.layer_idx, module)
            # a decoder's layer may have one to an encoder's keys too, which is not causal
            layers[module.layer_idx] = first if first.is_causal else module
    return layers


def _switch(model: Any, layers: dict[int, nn.Module]) -> None:
    """Set the implementation of the model's decoder, and remember what it was."""
    config, decoder = model.config, model.config.get_text_config()
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    before = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    before[""] = config._attn_implementation
    mine = [key for key, part in parts.items() if part is decoder]
    model.set_attn_implementation({**before, (mine or [""])[0]: NAME})
    reason = None
    if decoder._attn_implementation != NAME:
        reason = (
            f"The attention of {type(model).__name__} cannot be swapped: its code does not go "
            "through transformers' AttentionInterface."
        )
    elif not layers:
        reason = (
            f"No attention of {type(model).__name__} says which layer it is in (layer_idx), so a "
            f'plan cannot be put on it; set_attn_implementation("{NAME}") runs the model\'s own '
            "masks."
        )
    if reason is not None:
        model.set_attn_implementation(before)
        raise MaskError(reason)
    vars(model).setdefault(BEFORE, before)
