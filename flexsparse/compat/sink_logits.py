"""Learned sinks: logits that stand next to the scores of a row, and weigh no value."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse import MaskError


def refuse_sink(name: str, sink: object, shape: tuple[int | None, ...], words: str) -> None:
    """Raise MaskError unless it is a float tensor of a shape, of which None is any number."""
    is_tensor = isinstance(sink, Tensor)
    if (
        not isinstance(sink, Tensor)
        or not sink.is_floating_point()
        or sink.dim() != len(shape)
        or any(n not in (None, m) for n, m in zip(shape, sink.shape, strict=True))
    ):
        found = f"{sink.dtype} {tuple(sink.shape)}" if is_tensor else type(sink).__name__  # type: ignore[attr-defined]
        raise MaskError(f"{name} is {found}; it must be a float tensor {words}.")


def with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Attention whose rows have one score more, of a value of 0: its output and LSE.

    Args:
        out: [..., Dv], the output without it.
        lse: [...], the LSE without it; -inf of a row without keys, whose output stays 0.
        sink: the score of each row, broadcast to the shape of lse.
    """
    sink = sink.to(lse.dtype)
    # infinities have no difference, and their LSE no gradient
    is_empty = lse == -torch.inf
    finite = lse.masked_fill(is_empty, torch.finfo(lse.dtype).min)
    weight = (finite - sink).sigmoid()  # exp(lse) / (exp(lse) + exp(sink))
    total = torch.logaddexp(finite, sink).masked_fill(is_empty & (sink == -torch.inf), -torch.inf)
    return (out * weight.unsqueeze(-1)).to(out.dtype), total
