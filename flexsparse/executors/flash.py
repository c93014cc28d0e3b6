"""FlashAttention as torch ships it (torch.nn.attention.varlen): windows and packed documents.

For masks that are one band, `-right <= q_idx - kv_idx <= left`, in the whole or inside documents
that each are one run of tokens. CUDA, half precision, gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.normal_form import terms
from flexsparse.analysis.sequences import Sequences
from flexsparse.expr import Mask


class Band(NamedTuple):
    """A mask as FlashAttention knows it.

    left, right: how many keys before and after its own a query sees; -1 is all
    cu_seqlens: int32, where each document begins, and the end; None is one document
    longest: tokens of the longest document
    """

    left: int
    right: int
    cu_seqlens: Tensor | None
    longest: int


def band(mask: Mask, grid: Grid, sequences: Sequences | None) -> Band | None:
    """The mask as a band, or None if it is not one at these lengths.

    sequences: those that the mask keeps pairs of alone
    """
    # FlashAttention puts the last query at the last key
    if grid.q_offset != grid.kv_len - grid.q_len:
        return None
    union = terms(mask, sequences)
    if union is None or len(union) != 1:
        return None
    (term,) = union
    left = -1 if term.far_hi >= grid.q_offset + grid.q_len - 1 else term.far_hi
    right = -1 if -term.far_lo >= grid.kv_len - 1 - grid.q_offset else -term.far_lo
    sees_its_own = term.far_lo <= 0 <= term.far_hi
    sees_every_key = term.key_lo <= 0 and term.key_hi >= grid.kv_len - 1
    if not (sees_its_own and sees_every_key):
        return None
    if sequences is None:
        return Band(left, right, None, max(grid.q_len, grid.kv_len))
    return Band(left, right, sequences.cu_seqlens, int(sequences.cu_seqlens.diff().max()))


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: object | None = None,
    dropout: object | None = None,
    return_lse: bool = False,
) -> str | None:
    """Why varlen_attn cannot run these inputs under a band, as a sentence, or None if it can."""
    if q.device.type != "cuda":
        return f"varlen_attn runs on CUDA, and q is on {q.device}"
    reason = missing()
    if reason is not None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"varlen_attn takes float16 and bfloat16, and q is {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] > 256 or q.shape[-1] % 8:
        return (
            "varlen_attn takes one head_dim, a multiple of 8 up to 256; q has "
            f"{q.shape[-1]} and v has {v.shape[-1]}"
        )
    if q.shape[1] != k.shape[1] and not _takes("enable_gqa"):
        return "varlen_attn of this torch has no grouped-query attention"
    if score_mod is not None:
        return "varlen_attn takes no score_mod"
    if dropout is not None:
        return "varlen_attn has no dropout"
    if return_lse:
        return "the layout of the LSE that varlen_attn returns is not the same in every torch"
    return None


def missing() -> str | None:
    """Why this torch cannot run bands, or None."""
    if not _takes("window_size"):
        return "this torch has no torch.nn.attention.varlen.varlen_attn with a window_size"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, band: Band, *, scale: float | None = None
) -> tuple[Tensor, None]:
    """Attention under a band: out [B, n_heads, q_len, Dv], and no LSE."""
    batch, _, q_len, _ = q.shape
    cu_q, cu_k = (_starts(band, batch, x.shape[2], q.device) for x in (q, k))
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    longest = [min(band.longest, x.shape[2]) for x in (q, k)]
    varlen_attn = _varlen_attn()
    assert varlen_attn is not None
    out = varlen_attn(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),
        cu_q,
        cu_k,
        *longest,
        scale=scale,
        window_size=(band.left, band.right),
        **gqa,
    )
    return out.unflatten(0, (batch, q_len)).transpose(1, 2), None


def _starts(band: Band, batch: int, length: int, device: torch.device) -> Tensor:
    """Where each sequence of a packed batch begins, and the end: int32."""
    first = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * length
    within = first.new_zeros(1) if band.cu_seqlens is None else band.cu_seqlens[:-1]
    return torch.cat([(first + within).flatten(), first.new_tensor([batch * length])])


def _varlen_attn() -> Callable[..., Any] | None:
    # seconds to import, and wanted on CUDA alone; a plan does it before torch.compile could see it
    if "varlen_attn" not in _imported:
        _imported.update(varlen_attn=None, parameters=set())  # in a torch without it
        with contextlib.suppress(ImportError):
            from torch.nn.attention.varlen import varlen_attn

            _imported["varlen_attn"] = varlen_attn
            _imported["parameters"] = set(signature(varlen_attn).parameters)
    return _imported["varlen_attn"]  # type: ignore[no-any-return]


def _takes(parameter: str) -> bool:
    _varlen_attn()
    return parameter in _imported["parameters"]


_imported: dict[str, Any] = {}
