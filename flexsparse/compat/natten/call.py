"""What NATTEN's functions and modules share: arguments checked, plans kept, and the call."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexsparse import MaskError
from flexsparse.compat.natten.plan import Plan, plan
from flexsparse.masks.arguments import booleans, sizes

PLANS_KEPT = 64

# what attention_kwargs may hold: it chooses kernels and tiles of NATTEN's, and changes no result
KERNELS = (
    "backend",
    "q_tile_size",
    "kv_tile_size",
    "backward_q_tile_size",
    "backward_kv_tile_size",
    "backward_kv_splits",
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
)
LAYOUTS = {
    1: "[batch, tokens, heads, head_dim]",
    2: "[batch, height, width, heads, head_dim]",
    3: "[batch, time, height, width, heads, head_dim]",
}


def numbers_of_axes(
    name: str, rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The four arguments of a neighborhood, a value for each axis; None is the default."""
    kernel_sizes = sizes(name, "kernel_size", kernel_size, rank)
    strides = sizes(name, "stride", 1 if stride is None else stride, rank)
    dilations = sizes(name, "dilation", 1 if dilation is None else dilation, rank)
    is_causal = False if is_causal is None else is_causal
    causal_axes = tuple(is_causal) if isinstance(is_causal, (tuple, list)) else (is_causal,) * rank
    if len(causal_axes) != rank:
        raise MaskError(
            f"{name}(is_causal={is_causal!r}): is_causal must be True or False, or one for each of "
            f"{rank} axes."
        )
    for of_axis in causal_axes:
        booleans(name, is_causal=of_axis)
    return kernel_sizes, strides, dilations, causal_axes


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    numbers: tuple[Any, Any, Any, Any],
    *,
    rank: int | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    return_lse: bool = False,
) -> Any:
    """Neighborhood attention on a grid of `rank` axes, or of as many as query has.

    numbers are kernel_size, stride, dilation and is_causal; the rest is that of
    `neighborhood_attention_generic`.
    """
    rank = _rank(name, query, key, value, rank)
    _refuse_additional(name, key, value, additional_keys, additional_values)
    _refuse_unknown(name, attention_kwargs)
    shape = query.shape[1 : 1 + rank]
    n_more = 0 if additional_keys is None else additional_keys.shape[1]
    compiled, tiles = kept_plan(shape, numbers_of_axes(name, rank, *numbers), n_more, query.device)
    q, k, v = (
        x.flatten(1, rank).transpose(1, 2) if tiles is None else tiles.store(x)
        for x in (query, key, value)
    )
    if additional_keys is not None and additional_values is not None:
        k = torch.cat([k, additional_keys.transpose(1, 2)], 2)
        v = torch.cat([v, additional_values.transpose(1, 2)], 2)
    result = compiled(q, k, v, scale=scale or None, return_lse=return_lse)

    def restored(x: Tensor) -> Tensor:
        if tiles is None:
            return x.transpose(1, 2).reshape(len(x), *shape, x.shape[1], x.shape[3]).contiguous()
        return tiles.restore(x).contiguous()

    if not return_lse:
        return restored(result)
    out, lse = result
    return restored(out), restored(lse.unsqueeze(-1)).squeeze(-1)


def _rank(name: str, query: Tensor, key: Tensor, value: Tensor, rank: int | None) -> int:
    """The axes of the grid, where query, key and value have the same grid."""
    ranks = LAYOUTS if rank is None else (rank,)
    for argument, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() - 3 not in ranks:
            allowed = " or ".join(LAYOUTS[r] for r in ranks)
            raise MaskError(f"{name}: {argument} is {_found(x)}; it must be a tensor {allowed}.")
        if x.is_nested or x.layout != torch.strided:
            raise MaskError(f"{name}: {argument} is nested or sparse; it must be a dense tensor.")
        if x.shape[:-2] != query.shape[:-2]:
            raise MaskError(
                f"{name}: {argument} is {_found(x)} and query {_found(query)}; they must have the "
                "same batch and the same tokens along each axis. Give keys of something else as "
                "additional_keys."
            )
    return query.dim() - 3


def _refuse_additional(
    name: str, key: Tensor, value: Tensor, more_keys: Tensor | None, more_values: Tensor | None
) -> None:
    """Refuse additional keys and values that do not fit key and value."""
    if more_keys is None and more_values is None:
        return
    tokens = None
    for argument, x, like, its_name in (
        ("additional_keys", more_keys, key, "key"),
        ("additional_values", more_values, value, "value"),
    ):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise MaskError(
                f"{name}: {argument} is {_found(x)}; additional_keys and additional_values must "
                "both be None, or tensors [batch, tokens, kv heads, head_dim]."
            )
        is_like = (x.dtype, x.device) == (like.dtype, like.device)
        if not is_like or len(x) != len(like) or x.shape[2:] != like.shape[-2:]:
            raise MaskError(
                f"{name}: {argument} is {_found(x)} and {its_name} {_found(like)}; they must have "
                "the same batch, heads, head_dim, dtype and device."
            )
        tokens = x.shape[1] if tokens is None else tokens
        if x.shape[1] != tokens:
            raise MaskError(
                f"{name}: additional_keys has {tokens} tokens and additional_values {x.shape[1]}; "
                "they must have the same."
            )


def _refuse_unknown(name: str, attention_kwargs: Mapping[str, Any] | None) -> None:
    """Refuse arguments of NATTEN's dense attention that would change the result."""
    if not attention_kwargs:
        return
    is_dict = isinstance(attention_kwargs, Mapping)
    unknown = [x for x in attention_kwargs if x not in KERNELS] if is_dict else [attention_kwargs]
    if unknown:
        raise MaskError(
            f"{name}: attention_kwargs has {', '.join(map(repr, unknown))}; it chooses kernels, "
            f"and is None or a dict that may hold {', '.join(KERNELS)}."
        )


def _found(x: object) -> str:
    if not isinstance(x, Tensor) or x.is_nested:
        return type(x).__name__
    return f"{x.dtype} {tuple(x.shape)}" + f" on {x.device}" * (x.device.type != "cpu")


class _Kept:
    """The latest plans, each an attribute too: what torch.compile made of one reads no other."""

    def __init__(self) -> None:
        self.plans: OrderedDict[tuple[Any, ...], tuple[str, Plan]] = OrderedDict()
        self.made = 0

    def find(self, *key: Any) -> tuple[str, Plan]:
        """The attribute of a plan, and the plan, which is made if it is not there."""
        found = self.plans.get(key)
        if found is None:
            # named anew each time: a graph of a plan that is gone must not find another
            found = f"plan_{self.made}", plan(*key)
            setattr(self, *found)
            self.made += 1
        self.plans[key] = found
        self.plans.move_to_end(key)
        if len(self.plans) > PLANS_KEPT:
            _, (oldest, _) = self.plans.popitem(last=False)
            delattr(self, oldest)
        return found


_kept = _Kept()


# called while torch.compile traces, with constants: its result is one, and no part of the graph
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _attribute_of_plan(*key: Any) -> str:
    return _kept.find(*key)[0]


def kept_plan(
    shape: tuple[int, ...],
    numbers: tuple[tuple[Any, ...], ...],
    n_additional: int,
    device: torch.device,
) -> Plan:
    """The plan of a shape and numbers, from those that are kept or made now."""
    if not torch.compiler.is_compiling():
        return _kept.find(tuple(shape), *numbers, n_additional, device)[1]
    *integers, is_causal = (shape, *numbers)
    # what torch.compile holds for variable becomes a constant, on which the graph then depends
    constants = [tuple(map(operator.index, x)) for x in integers]
    name = _attribute_of_plan(*constants, is_causal, operator.index(n_additional), device)
    found: Plan = getattr(_kept, name)
    return found
