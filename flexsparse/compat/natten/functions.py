"""NATTEN's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flexsparse.compat.natten.call import attend


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Each token of a grid of one, two or three axes sees its neighbors, and additional keys.

    `flexsparse.masks.neighborhood` draws which these are, and is the same as a mask.

    >>> out = na2d(q, k, v, kernel_size=7, dilation=(1, 2))  # q, k, v [batch, height, width, ...]

    Args:
        query: [batch, tokens, heads, D], or [batch, height, width, heads, D], or [batch, time,
            height, width, heads, D].
        key: likewise, with the same tokens; its heads divide those of query (GQA).
        value: as key, with a head_dim of its own, Dv.
        kernel_size: tokens seen along each axis; kernel_size * dilation <= tokens.
        stride: neighbors that share one window, 1 to kernel_size.
        dilation: tokens from one key to the next.
        is_causal: whether an axis looks back only. These four take one value or one for each axis.
        scale: of the scores; 1 / sqrt(D) by default, and for 0.
        additional_keys: [batch, more tokens, kv heads, D], which every query sees in the same
            softmax.
        additional_values: theirs, [batch, more tokens, kv heads, Dv].
        attention_kwargs: ignored, as are all of the next that choose kernels.
        backend: ignored.
        q_tile_shape: ignored.
        kv_tile_shape: ignored.
        backward_q_tile_shape: ignored.
        backward_kv_tile_shape: ignored.
        backward_kv_splits: ignored.
        backward_use_pt_reduction: ignored.
        run_persistent_kernel: ignored.
        kernel_schedule: ignored.
        torch_compile: ignored.
        return_lse: also return the log of the sum of exponentials of each row's scores.

    Returns:
        out, of query's shape with Dv for D and contiguous, or (out, lse) with lse float32, of
        query's shape without D.

    Raises:
        MaskError: an argument does not fit the others; the text says which.
    """
    return attend(
        "neighborhood_attention_generic",
        query,
        key,
        value,
        (kernel_size, stride, dilation, is_causal),
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        attention_kwargs=attention_kwargs,
        return_lse=return_lse,
    )


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Each token of a sequence sees its neighbors: query is [batch, tokens, heads, D].

    The arguments and the result are those of neighborhood_attention_generic.
    """
    return attend(
        "na1d",
        query,
        key,
        value,
        (kernel_size, stride, dilation, is_causal),
        rank=1,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        attention_kwargs=attention_kwargs,
        return_lse=return_lse,
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Each token of an image sees its neighbors: query is [batch, height, width, heads, D].

    The arguments and the result are those of neighborhood_attention_generic.
    """
    return attend(
        "na2d",
        query,
        key,
        value,
        (kernel_size, stride, dilation, is_causal),
        rank=2,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        attention_kwargs=attention_kwargs,
        return_lse=return_lse,
    )


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: Mapping[str, Any] | None = None,
    backend: str | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    backward_q_tile_shape: Sequence[int] | None = None,
    backward_kv_tile_shape: Sequence[int] | None = None,
    backward_kv_splits: Sequence[int] | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Any:
    """Each token of a video sees its neighbors: query is [batch, time, height, width, heads, D].

    The arguments and the result are those of neighborhood_attention_generic.
    """
    return attend(
        "na3d",
        query,
        key,
        value,
        (kernel_size, stride, dilation, is_causal),
        rank=3,
        scale=scale,
        additional_keys=additional_keys,
        additional_values=additional_values,
        attention_kwargs=attention_kwargs,
        return_lse=return_lse,
    )
