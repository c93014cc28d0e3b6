"""Plans: which mask each query head of each layer of a model has, as a value and as a file."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from flexsparse import masks, plan_json
from flexsparse.errors import MaskError
from flexsparse.expr import Mask, everything
from flexsparse.heads import PerHead, numbered, per_head
from flexsparse.parser import parse
from flexsparse.plan_json import grouped
from flexsparse.text import amount, formula, shown

Head = Mask | str | None  # a text only where it reads the number of keys
Layer = tuple[Head, ...] | None

READS_LENGTH = re.compile(r"\bspan\s*\(")
ANY_LENGTH = 4096  # to check texts at; span() is at least 1 at every length


@dataclass(frozen=True, init=False, repr=False)
class SparsePlan:
    """A mask for each query head of each layer of a model; what the model hides stays hidden.

    >>> streaming = "causal & (sink(4) | window(256))"
    >>> plan = SparsePlan([None, ["causal", "causal", streaming, streaming]])
    >>> plan.save("plan.json")
    >>> SparsePlan.load("plan.json").apply(model)

    A text may read the number of keys: `span(alpha, beta)` is alpha + beta * keys, rounded down, at
    least 1 and at most all; `span(alpha, beta, 64)` is the same in blocks of 64, rounded up.

    Args:
        layers: for each layer one entry for each *query* head, or None to leave it as it is. An
            entry is a Mask, the text of one in the names of flexsparse.masks, or None for what the
            model has. A `per_head` is a layer too.

    Raises:
        MaskError: an entry is no mask, or layers differ in their number of heads.
    """

    layers: tuple[Layer, ...]

    def __init__(self, layers: Sequence[Sequence[Head] | PerHead | None]) -> None:
        if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
            raise MaskError(
                f"SparsePlan got {layers!r}; give a list with one entry for each layer, each a "
                "list of masks or None."
            )
        read = tuple(_layer(layer, f"layer {i}") for i, layer in enumerate(layers))
        object.__setattr__(self, "layers", read)
        for i, layer in enumerate(read):
            if layer is not None and len(layer) != self.n_heads:
                raise MaskError(
                    f"SparsePlan got {len(layer)} heads for layer {i} and {self.n_heads} for one "
                    "before it; give every layer one mask for each query head."
                )

    @property
    def n_layers(self) -> int:
        """Layers of the model the plan is for."""
        return len(self.layers)

    @property
    def n_heads(self) -> int | None:
        """Query heads of a layer; None if the plan leaves every layer as it is."""
        return next((len(layer) for layer in self.layers if layer is not None), None)

    def at(self, kv_len: int) -> SparsePlan:
        """The plan at a number of keys, in tokens: every `span` is a number."""
        if not isinstance(kv_len, int) or isinstance(kv_len, bool) or kv_len < 1:
            raise MaskError(f"plan.at(kv_len={kv_len!r}): kv_len must be an int of 1 or more.")
        return SparsePlan(
            [
                None if layer is None else [_at_length(head, kv_len) for head in layer]
                for layer in self.layers
            ]
        )

    def problem(self, config: Any) -> str | None:
        """Why the plan does not fit a model with this config, as a sentence, or None if it does."""
        name = f"the model ({getattr(config, 'model_type', None) or type(config).__name__})"
        if getattr(config, "is_encoder_decoder", False):
            return f"A plan is for a decoder, and {name} has an encoder too; use another model."
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        for own, what, attribute in (
            (self.n_layers, "layers", "num_hidden_layers"),
            (self.n_heads, "query heads", "num_attention_heads"),
        ):
            n = getattr(config, attribute, None)
            if not isinstance(n, int):
                return f"The config of {name} has no {attribute}, which a plan is checked against."
            if own is not None and own != n:
                return (
                    f"The plan has {own} {what} and {name} has {n} ({attribute}). A plan is for "
                    "one model: make it again for this one."
                )
        return None

    def apply(self, model: Any) -> None:
        """Put the plan on a loaded Hugging Face model, in place of any it has.

        Raises:
            MaskError: the plan is for another model, or this model's attention cannot be swapped.
        """
        from flexsparse.integrations.transformers import apply

        apply(self, model)

    def remove(self, model: Any) -> None:
        """Take the plan off: the model has the attention it had before."""
        from flexsparse.integrations.transformers import remove

        remove(model)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON that people can read: the text of each mask, equal heads together.

        Raises:
            MaskError: a mask has no text, because it reads a tensor.
        """
        texts = [
            None
            if layer is None
            else tuple(_text(head, f"head {h} of layer {i}") for h, head in enumerate(layer))
            for i, layer in enumerate(self.layers)
        ]
        plan_json.write(path, texts)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SparsePlan:
        """Read a plan that `save` wrote. Its texts are parsed, and nothing in it is executed.

        Raises:
            MaskError: the file is no plan; the text says what was found, and where.
        """
        return cls(plan_json.read(path))

    def __str__(self) -> str:
        heads = "" if self.n_heads is None else f" x {amount(self.n_heads, 'query head')}"
        lines = [f"SparsePlan: {amount(self.n_layers, 'layer')}{heads}"]
        for layer, numbers in grouped(self.layers).items():
            title = "  " + numbered("layer", numbers)
            lines.append(title if layer else f"{title}   as the model has them")
            for mask, of_mask in grouped(layer or ()).items():
                lines.append(f"    {numbered('head', of_mask)}   {_shown(mask)}")
        return "\n".join(lines)

    __repr__ = __str__


def reads_length(layer: tuple[Head, ...]) -> bool:
    """Whether the masks of a layer differ with the number of keys."""
    return any(isinstance(head, str) for head in layer)


@functools.lru_cache(maxsize=1024)
def masks_at(layer: tuple[Head, ...], kv_len: int) -> PerHead:
    """The masks of a layer's heads at a number of keys; what the model has is `everything`."""
    heads = [_at_length(head, kv_len) for head in layer]
    return per_head([everything if mask is None else mask for mask in heads])


def _at_length(head: Head, kv_len: int) -> Mask | None:
    return _parsed(head, kv_len) if isinstance(head, str) else head


def _parsed(text: str, kv_len: int) -> Mask:
    def span(alpha: float, beta: float, block_size: int = 1) -> int:
        if not isinstance(block_size, int) or block_size < 1:
            raise MaskError(
                f"span(block_size={block_size!r}): block_size must be an int of 1 or more"
            )
        keys = min(math.floor(alpha + beta * kv_len), kv_len)
        return max(-(-keys // block_size), 1)

    patterns = {name: getattr(masks, name) for name in masks.__all__}
    return parse(text, {**patterns, "span": span})


def _layer(layer: Sequence[Head] | PerHead | None, place: str) -> Layer:
    if layer is None:
        return None
    heads = [layer[h] for h in range(layer.n_heads)] if isinstance(layer, PerHead) else layer
    if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads:
        raise MaskError(
            f"SparsePlan got {layer!r} for {place}; give a list with a mask for each query head, "
            "or None to leave the layer as it is."
        )
    read = tuple(_head(head, f"head {h} of {place}") for h, head in enumerate(heads))
    return None if set(read) == {None} else read


def _head(head: Head, place: str) -> Head:
    mask = head
    if isinstance(head, str):
        try:
            mask = _parsed(head, ANY_LENGTH)
        except MaskError as error:
            raise MaskError(f"SparsePlan, {place}: {error}") from None
    if mask is not None and not isinstance(mask, Mask):
        raise MaskError(
            f"SparsePlan got {type(head).__name__} for {place}: {head!r}. Give a Mask, the text of "
            "one, or None for what the model has."
        )
    if mask is not None and "b" in mask.variables:
        raise MaskError(
            f"SparsePlan, {place}: {shown(mask)} reads the batch row b, which a plan does not "
            "know. Padding and packing are the model's own, and stay as they are."
        )
    return head if isinstance(head, str) and READS_LENGTH.search(head) else mask


def _text(head: Head, place: str) -> str | None:
    if not isinstance(head, Mask):
        return head
    for text in (head.name, formula(head)):
        try:
            if _parsed(text, ANY_LENGTH) == head:
                return text
        except MaskError:
            pass
    raise MaskError(
        f"The mask of {place} cannot be saved: {shown(head)} reads a tensor or was traced, and no "
        "text gives it back. Write it with the patterns of flexsparse.masks."
    )


def _shown(head: Head) -> str:
    """A head's mask in words."""
    if head is None:
        return "as the model has it"
    return shown(head) if isinstance(head, Mask) else head
