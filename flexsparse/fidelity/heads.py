"""What a mask costs each head: the attention mass it keeps, and the error of the head's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.errors import MaskError
from flexsparse.expr import Mask, everything
from flexsparse.fidelity.perplexity import applied
from flexsparse.heads import as_per_head
from flexsparse.plan import SparsePlan

ELEMENTS_AT_ONCE = 1 << 22


class LayerInputs(NamedTuple):
    """What the attention of a layer was given in a forward, after rotary embedding.

    q: [n_heads, length, D]
    k, v: [n_kv_heads, length, D]
    scale: of the scores
    softcap: scores become softcap * tanh(score / softcap); None if they stay as they are
    own: what the model itself lets the layer see
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    own: Mask


class HeadFidelity(NamedTuple):
    """Of each head under each of some masks, float32[n_heads, masks].

    mass: the part of the dense attention weights that falls on keys the mask keeps, a mean over
        all queries
    error: |sparse - dense| / |dense| of the head's output
    """

    mass: Tensor
    error: Tensor


def layer_inputs(
    model: Any, ids: Tensor, layers: Collection[int], plan: SparsePlan | None = None
) -> dict[int, LayerInputs]:
    """Run a model on a sequence and keep what the attention of some layers was given.

    Args:
        model: a causal language model of transformers.
        ids: int64[1, length].
        layers: by number.
        plan: the plan it runs under; dense by default.

    Raises:
        MaskError: a layer does not exist, or has no attention that a plan could change.
    """
    n = model.config.get_text_config().num_hidden_layers
    for layer in layers:
        if not 0 <= layer < n:
            raise MaskError(f"Layer {layer} does not exist; the model has layers 0 to {n - 1}.")
    found: dict[int, LayerInputs] = {}

    def keep(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: Any) -> None:
        if module.layer_idx in layers and mask is not None:
            scale = options.get("scaling") or q.shape[-1] ** -0.5
            own = mask.compiled(as_per_head(everything, q.shape[1])).masks[0]
            q, k, v = (x[0].detach().clone() for x in (q, k, v))
            found[module.layer_idx] = LayerInputs(q, k, v, scale, options.get("softcap"), own)

    plan = SparsePlan([None] * n) if plan is None else plan
    with applied(plan, model), _watched(keep), torch.no_grad():
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    missing = sorted(set(layers) - set(found))
    if missing:
        raise MaskError(f"Layer {missing[0]} of {type(model).__name__} has no masked attention.")
    return found


@contextlib.contextmanager
def _watched(watch: Callable[..., None]) -> Iterator[None]:
    """While it lasts, models with a plan show their attention's inputs to `watch`."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from flexsparse.integrations.transformers import NAME

    attention = ALL_ATTENTION_FUNCTIONS[NAME]

    def watched(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        watch(module, q, k, v, mask, options)
        return attention(module, q, k, v, mask, **options)

    AttentionInterface.register(NAME, watched)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention)


@torch.no_grad()
def head_fidelity(inputs: LayerInputs, masks: Sequence[Mask]) -> HeadFidelity:
    """Mass kept and output error of every head of a layer under every mask.

    Dense attention in chunks of queries: the weights of a layer are never there as a whole.
    """
    q = inputs.q.float()
    n_heads, length, _ = q.shape
    group_size = n_heads // inputs.k.shape[0]
    k, v = (x.float().repeat_interleave(group_size, 0) for x in (inputs.k, inputs.v))
    kv_idx = torch.arange(length, device=q.device)
    heads = torch.arange(n_heads, device=q.device)[:, None, None]
    batch = torch.zeros((), dtype=torch.int64, device=q.device)

    kept_mass, missed = torch.zeros(2, n_heads, len(masks), device=q.device)
    size = torch.zeros(n_heads, device=q.device)
    at_once = max(1, ELEMENTS_AT_ONCE // (n_heads * length))
    for rows in torch.split(kv_idx, at_once):
        q_idx = rows[:, None]
        scores = q[:, rows] @ k.mT * inputs.scale
        if inputs.softcap is not None:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        own = inputs.own(batch, heads, q_idx, kv_idx)
        weights = scores.masked_fill(~own, -torch.inf).softmax(-1).nan_to_num(0.0)
        dense = weights @ v
        size += dense.square().sum((1, 2))
        for place, mask in enumerate(masks):
            kept = weights * mask(batch, heads, q_idx, kv_idx)
            mass = kept.sum(-1, keepdim=True)
            kept_mass[:, place] += mass.sum((1, 2))
            sparse = kept @ v / mass.clamp(min=torch.finfo(mass.dtype).tiny)
            missed[:, place] += (sparse - dense).square().sum((1, 2))
    error = (missed / size[:, None]).sqrt()
    return HeadFidelity((kept_mass / length).cpu(), error.cpu())
