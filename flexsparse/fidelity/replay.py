"""A model's loss on a text, and running the model again from one of its layers on."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flexsparse.errors import MaskError

LOGITS_AT_ONCE = 1 << 26  # 256 MB in float32


class Replay:
    """One run of a causal language model on a sequence, kept to run again from a layer on.

    The layers before it are not computed again: they hand on what they gave in the recorded run.
    All else (embedding, masks, norms, head) is the model's own code.

    >>> replay = Replay(model, ids, starts=[11])
    >>> plan.apply(model)                   # differs from layer 11 on
    >>> replay.losses(start=11).mean()      # the loss under the plan

    Args:
        model: of transformers, a decoder with a list of layers.
        ids: int64[1, length].
        starts: the layers that it can start from again.
        every: predictions are looked at for every `every`-th token.

    Raises:
        MaskError: the model has no list of layers.
    """

    def __init__(
        self, model: Any, ids: Tensor, starts: Collection[int] = (), every: int = 1
    ) -> None:
        self.model, self.ids = model, ids
        self.layers = decoder_layers(model)
        length = ids.shape[1]
        self.positions = torch.arange((length - 2) % every, length - 1, every, device=ids.device)
        self._kept = {start - 1 for start in starts if start} | {len(self.layers) - 1}
        self._outputs: dict[int, Any] = {}  # of the layers in _kept
        self.record()

    def record(self, start: int = 0) -> None:
        """Run the layers from `start` on and keep this run instead of the one before."""
        self._outputs.update(self._run(start, self._kept))

    def losses(self, start: int | None = None) -> Tensor:
        """float32[predictions]: -log of the probability of each token, given those before it.

        Args:
            start: run the layers from this one on again; by default nothing is run again.
        """
        targets = self.ids[0, 1:]
        return torch.cat(
            [
                cross_entropy(logits, targets[at], reduction="none")
                for at, logits in self.logits(start)
            ]
        )

    def logits(self, start: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(Positions, their logits float32[positions, vocabulary]), in parts that fit in memory."""
        end = len(self.layers) - 1
        last = (self._outputs if start is None else self._run(start, {end}))[end]
        at_once = max(1, LOGITS_AT_ONCE // self.model.get_output_embeddings().weight.shape[0])
        with _handing_on(self.layers, last):
            for at in torch.split(self.positions, at_once):
                yield at, self._forward(at)[0].float()

    def _run(self, start: int, kept: Collection[int]) -> dict[int, Any]:
        """Run the layers from `start` on; what those of them in `kept` give."""
        outputs: dict[int, Any] = {}

        def keep(place: int) -> Any:
            return lambda module, args, output: outputs.update({place: output})

        hooks = [
            self.layers[place].register_forward_hook(keep(place))
            for place in kept
            if place >= start
        ]
        try:
            with _handing_on(self.layers[:start], self._outputs[start - 1] if start else None):
                self._forward(self.positions[-1:])
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @torch.no_grad()
    def _forward(self, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=self.ids, use_cache=False, logits_to_keep=positions
        ).logits
        return logits


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a causal language model of transformers.

    Raises:
        MaskError: it has no list of layers.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise MaskError(
            f"{type(model).__name__} has no list of decoder layers; give a causal language model "
            "of transformers, such as Llama, Qwen, Mistral, Gemma or Phi-3."
        )
    return layers


@contextlib.contextmanager
def _handing_on(layers: nn.ModuleList, output: Any) -> Iterator[None]:
    """While it lasts, these layers compute nothing and give this output."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
