"""What dkernel's modules are given, checked and brought into one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flexsparse import MaskError
from flexsparse.masks.arguments import at_least, is_int

# of each batch row: rows of padding in front, and real tokens behind them
Padding: TypeAlias = tuple[tuple[int, int], ...]

# they choose tiles of dkernel's kernels, and change no result
TILES = ("block_m", "block_n", "bwd_block_sizes", "d_splits", "inference")


def refuse_unknown(name: str, given: Mapping[str, object]) -> None:
    """Refuse keyword arguments that are not about kernels, and tiles that are no sizes."""
    unknown = sorted(set(given) - set(TILES))
    if "out" in unknown:
        raise MaskError(f"{name}(out=...): there is no output to write to; take what it returns.")
    if unknown:
        raise MaskError(
            f"{name} got {', '.join(unknown)}; besides its arguments it takes {', '.join(TILES)}."
        )
    # of the tiles, these count when a length is rounded up
    sizes = {tile: given[tile] for tile in ("block_m", "block_n") if given.get(tile) is not None}
    at_least(name, 1, **sizes)


def boolean(pattern: Tensor) -> Tensor:
    """A pattern as a boolean tensor, [blocks, blocks] or [heads, blocks, blocks]."""
    if not isinstance(pattern, Tensor) or pattern.dim() not in (2, 3) or not pattern.numel():
        is_tensor = isinstance(pattern, Tensor)
        found = tuple(pattern.shape) if is_tensor else type(pattern).__name__
        raise MaskError(
            f"sparse_pattern is {found}; it must be a tensor [blocks, blocks] or [heads, blocks, "
            "blocks]. (From CSR indices, make it with torch.sparse_csr_tensor(...).to_dense().)"
        )
    pattern = pattern.detach()
    if pattern.layout != torch.strided:
        pattern = pattern.to_dense()
    kept = pattern.bool()
    if not torch.equal(kept.to(pattern.dtype), pattern):
        wrong = pattern[kept.to(pattern.dtype) != pattern][0].item()
        raise MaskError(f"sparse_pattern holds {wrong}; it must hold 0 and 1, or be boolean.")
    # a copy: writing to the tensor that was given must not change the module
    return kept.clone() if kept is pattern else kept


def head_range(active: tuple[int, int] | None, num_heads: int) -> tuple[int, int]:
    """The first of the heads that q has, and the one after the last."""
    if active is None:
        return 0, num_heads
    is_pair = isinstance(active, tuple) and len(active) == 2 and all(is_int(x) for x in active)
    if not is_pair or not 0 <= active[0] < active[1] <= num_heads:
        raise MaskError(
            f"active_head_range={active!r}; it must be (start, end) with 0 <= start < end <= "
            f"num_heads={num_heads}."
        )
    return active


def split(
    q: Tensor, k: Tensor | None, v: Tensor | None, split_qkv: Callable[[Tensor], Any] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, taken apart if they were given as one tensor, or k and v as one."""
    if v is None:
        if split_qkv is None:
            raise MaskError("v is None; give split_qkv, which takes the packed tensor apart.")
        parts = tuple(split_qkv(q if k is None else k))
        wanted = ("q", "k", "v") if k is None else ("k", "v")
        if len(parts) != len(wanted):
            raise MaskError(
                f"split_qkv returned {len(parts)} tensors; it must return {', '.join(wanted)}."
            )
        q, k, v = parts if k is None else (q, *parts)
    if k is None:
        raise MaskError("k is None and v is not; give both, or neither and split_qkv.")
    return q, k, v


def refuse_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what has no shape that the modules take."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() not in (3, 4) or x.dim() != q.dim():
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise MaskError(
                f"{name} is {found}; q, k and v must all be tensors of 4 dimensions (batch, "
                "tokens, heads, head_dim, in the order of seq_dim), or packed [tokens, heads, "
                "head_dim]."
            )


def refuse_given(layout: str, **arguments: Tensor | None) -> None:
    """Refuse arguments of another layout: they would be ignored."""
    for name, value in arguments.items():
        if value is not None:
            raise MaskError(f"{name} was given, and q is {layout}; leave one of the two out.")


def cu_seqlens(
    total_q: int, total_k: int, ends_q: Tensor | None, ends_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where packed sequences start in q and in k."""
    if ends_k is None:
        raise MaskError("q is packed [tokens, heads, head_dim]; give cu_seqlen_k.")
    if ends_q is None and isinstance(ends_k, Tensor):
        if total_q == len(ends_k) - 1:
            ends_q = torch.arange(total_q + 1, device=ends_k.device, dtype=torch.int32)
        elif total_q == total_k:
            ends_q = ends_k
        else:
            raise MaskError(
                f"q has {total_q} tokens, neither one for each of {len(ends_k) - 1} sequences nor "
                f"the {total_k} of k; give cu_seqlen_q."
            )
    for name, ends in (("cu_seqlen_k", ends_k), ("cu_seqlen_q", ends_q)):
        if not _is_integers(ends) or len(ends) != len(ends_k):
            raise MaskError(
                f"{name} is {_found(ends)}; both must be integer tensors [sequences + 1]."
            )
    assert ends_q is not None
    return ends_q, ends_k


def padding(
    left_paddings: Tensor | None, seqlens: Tensor | None, batch: int, kv_len: int
) -> Padding | None:
    """Where the real tokens of each batch row are; None if all are."""
    for name, given in (("left_paddings", left_paddings), ("seqlens", seqlens)):
        if given is not None and (not _is_integers(given) or len(given) != batch):
            raise MaskError(f"{name} is {_found(given)}; it must be an integer tensor [{batch}].")
    if left_paddings is None and seqlens is None:
        return None
    starts = [0] * batch if left_paddings is None else left_paddings.tolist()
    lengths = [kv_len - x for x in starts] if seqlens is None else seqlens.tolist()
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if start < 0 or length < 0 or start + length > kv_len:
            raise MaskError(
                f"Batch row {row} has {start} tokens of padding in front and {length} real ones; "
                f"both must be 0 or more, and together at most the {kv_len} of k."
            )
    return tuple(zip(starts, lengths, strict=True))


def _is_integers(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 1 and x.dtype in (torch.int32, torch.int64)


def _found(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
