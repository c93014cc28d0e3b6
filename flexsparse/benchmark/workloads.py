"""What is measured: the workloads of the published figures, at lengths that suit the device."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.expr import Mask
from flexsparse.heads import PerHead, per_head
from flexsparse.masks import block_sparse, causal, neighborhood, same_document, sink, window
from flexsparse.tensors import MaskMod

K = 1024
BLOCK = 128
STREAMING = causal & (sink(64) | window(256))
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Shape(NamedTuple):
    """The sizes of q, k and v apart from their lengths."""

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def usual(cls, device: torch.device) -> Shape:
        """That of the published figures on a GPU, and a smaller one on CPU."""
        if device.type == "cuda":
            return cls(1, 32, 32, 128, torch.bfloat16)
        return cls(1, 8, 8, 64, torch.float32)


@dataclass(frozen=True, eq=False)
class Workload:
    """A mask at its lengths, and how others say it.

    preset: the preset it belongs to
    name: in words
    mask: of all heads, or one for each
    q_len, kv_len: in tokens; the last query stands at the last key
    x_axis, x: its place in a picture
    is_causal: whether dense attention beside it is causal
    passes: of "forward" and "forward+backward"
    window: keys seen, if it is causal with a window and nothing else
    documents: tokens of each document, if it is causal in packed documents and nothing else
    gym: attention-gym's mask_mod, if it has the mask and is installed
    """

    preset: str
    name: str
    mask: Mask | PerHead
    q_len: int
    kv_len: int
    x_axis: str
    x: float
    is_causal: bool = False
    passes: tuple[str, ...] = ("forward", "forward+backward")
    window: int | None = None
    documents: tuple[int, ...] | None = None
    gym: MaskMod | None = None


def duo(lengths: Sequence[int], n_heads: int) -> list[Workload]:
    """Half of the heads causal, half streaming (Block-Sparse-Attention's hybrid masks, Duo)."""
    mask = per_head([causal] * (n_heads // 2) + [STREAMING] * (n_heads - n_heads // 2))
    name = f"half of the heads causal, half {STREAMING.name}"
    return [Workload("duo", name, mask, n, n, "tokens", n, is_causal=True) for n in lengths]


def bsa(length: int, sparsities: Sequence[float], device: torch.device) -> list[Workload]:
    """Random causal blocks, the same for all heads (Block-Sparse-Attention's blocksparse)."""
    name = f"random causal blocks, {length:,} tokens"
    found = []
    for sparsity in sparsities:
        mask = causal & block_sparse(_blocks(length, sparsity, is_causal=True).to(device))
        found.append(
            Workload("bsa", name, mask, length, length, "sparsity", sparsity, is_causal=True)
        )
    return found


def swa(lengths: Sequence[int], size: int = 1024) -> list[Workload]:
    """A sliding window."""
    mask = causal & window(size)
    options: dict[str, Any] = {
        "is_causal": True,
        "window": size,
        "gym": _gym("generate_sliding_window", size - 1),  # they do not count the query's own
    }
    return [Workload("swa", mask.name, mask, n, n, "tokens", n, **options) for n in lengths]


def documents(lengths: Sequence[int], device: torch.device) -> list[Workload]:
    """Packed documents of 256 to 2,048 tokens, causal inside."""
    found = []
    for n in lengths:
        sizes = _document_lengths(n)
        ends = torch.tensor([0, *sizes]).cumsum(0).int()
        ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        found.append(
            Workload(
                "documents",
                "packed documents of 256 to 2,048 tokens, causal",
                same_document(ids.to(device)) & causal,
                n,
                n,
                "tokens",
                n,
                is_causal=True,
                documents=sizes,
                gym=_gym("generate_packed_causal_doc_mask_mod", ends.to(device)),
            )
        )
    return found


def natten(sides: Sequence[int], kernel: int = 13) -> list[Workload]:
    """A 2-D neighbourhood: tokens row by row, and stored in tiles of 8 x 16."""
    found = []
    for name, tile in (("row by row", None), ("in tiles of 8 x 16", (8, 16))):
        for side in sides:
            n, shape = side * side, (side, side)
            mask = neighborhood(shape, kernel, tile=tile)
            gym = _gym("generate_natten", *shape, kernel, kernel) if tile is None else None
            name_of = f"neighbourhood of {kernel} x {kernel}, {name}"
            found.append(Workload("natten", name_of, mask, n, n, "tokens", n, gym=gym))
    return found


def decode(lengths: Sequence[int]) -> list[Workload]:
    """One query at the end of a cache, streaming and in a window of 4,096."""
    return [
        Workload("decode", mask.name, mask, 1, n, "keys", n, passes=("forward",))
        for mask in (STREAMING, causal & window(4096))
        for n in lengths
    ]


def prefill(lengths: Sequence[int], chunk: int = 1024) -> list[Workload]:
    """The last chunk of a prompt that is read in chunks."""
    name = f"{STREAMING.name}, {chunk:,} queries"
    return [
        Workload("prefill", name, STREAMING, chunk, n, "keys", n, passes=("forward",))
        for n in lengths
    ]


def efficiency(length: int, device: torch.device) -> list[Workload]:
    """Three masks beside dense attention without a mask: what part of the ideal is reached."""
    windowed = causal & window(1024)
    masks = {
        STREAMING.name: STREAMING,
        windowed.name: windowed,
        "random blocks, a tenth of all": block_sparse(_blocks(length, 0.9).to(device)),
    }
    return [
        Workload("efficiency", name, mask, length, length, "tokens", length, passes=("forward",))
        for name, mask in masks.items()
    ]


PRESETS = ("duo", "bsa", "swa", "documents", "natten", "decode", "prefill", "efficiency")


def workloads(
    preset: str,
    device: torch.device,
    n_heads: int,
    *,
    quick: bool = False,
    lengths: Sequence[int] = (),
) -> list[Workload]:
    """The workloads of a preset; lengths are its usual ones unless they are given."""
    on_gpu = device.type == "cuda"
    longest = (16 if quick else 128) * K if on_gpu else (4 if quick else 16) * K
    usual = lengths or [n * K for n in (2, 4, 8, 16, 32, 64, 128) if n * K <= longest]
    if preset == "duo":
        return duo(usual, n_heads)
    if preset == "bsa":
        at = lengths or ([8 * K, 64 * K] if on_gpu and not quick else [longest // 2])
        sparsities = (0.5, 0.9) if quick else SPARSITIES
        return [workload for n in at for workload in bsa(n, sparsities, device)]
    if preset == "swa":
        return swa(usual)
    if preset == "documents":
        return documents(usual, device)
    if preset == "natten":
        # a grid has whole tiles
        sides = [16 * max(1, round(n**0.5 / 16)) for n in lengths] or [48, 64, 128, 256]
        return natten([side for side in sides if lengths or side * side <= longest])
    if preset == "decode":
        usual = [n * K for n in (4, 16, 64, 256, 1024) if n <= 16 * longest // K]
        return decode(lengths or usual)
    if preset == "prefill":
        return prefill(usual)
    return [workload for n in lengths or [8 * K] for workload in efficiency(n, device)]


def _blocks(length: int, sparsity: float, is_causal: bool = False) -> Tensor:
    """bool[n, n]: of each row of blocks (of the triangle) as many as its share, at least one."""
    generator = torch.Generator().manual_seed(0)
    n = -(-length // BLOCK)
    table = torch.zeros(n, n, dtype=torch.bool)
    for row in range(n):
        visible = row + 1 if is_causal else n
        count = max(1, round((1 - sparsity) * visible))
        table[row, torch.randperm(visible, generator=generator)[:count]] = True
    return table


def _document_lengths(length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(256, 2048, (length // 256 + 1,), generator=generator).cumsum(0)
    ends = torch.cat([ends[ends < length], torch.tensor([length])])
    return tuple(torch.diff(ends, prepend=torch.tensor([0])).tolist())


def _gym(name: str, *arguments: Any) -> MaskMod | None:
    """A mask_mod of attention-gym, or None if it is not installed or has no such mask."""
    try:
        mod: MaskMod = getattr(importlib.import_module("attn_gym.masks"), name)(*arguments)
    except (ImportError, AttributeError):
        return None
    return mod
