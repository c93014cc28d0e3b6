"""What is measured: the workloads of the published figures, at lengths that suit the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.expr import Mask
from flexsparse.heads import PerHead, per_head
from flexsparse.masks import block_sparse, causal, neighborhood, same_document, sink, window

K = 1024
BLOCK = 128
FORWARD, BOTH = ("forward",), ("forward", "forward+backward")
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
    mask: makes the mask of a number of heads on a device
    q_len, kv_len: in tokens; the last query stands at the last key
    is_causal: whether dense attention beside it is causal
    x_axis, x: its place in a picture
    passes: of "forward" and "forward+backward"
    window: keys seen, if it is causal with a window and nothing else
    documents: tokens of each document, if it is causal in packed documents and nothing else
    gym: makes attention-gym's mask_mod for it on a device; it raises ImportError without the package
    """

    preset: str
    name: str
    mask: Callable[[int, torch.device], Mask | PerHead]
    q_len: int
    kv_len: int
    is_causal: bool
    x_axis: str
    x: float
    passes: tuple[str, ...] = BOTH
    window: int | None = None
    documents: tuple[int, ...] | None = None
    gym: Callable[[torch.device], Callable[..., Tensor]] | None = None


def duo(lengths: Sequence[int]) -> list[Workload]:
    """Half of the heads causal, half streaming (Block-Sparse-Attention's hybrid masks, Duo)."""

    def mask(n_heads: int, device: torch.device) -> PerHead:
        return per_head([causal] * (n_heads // 2) + [STREAMING] * (n_heads - n_heads // 2))

    name = "half of the heads causal, half causal & (sink(64) | window(256))"
    return [Workload("duo", name, mask, n, n, True, "tokens", n) for n in lengths]


def bsa(length: int, sparsities: Sequence[float]) -> list[Workload]:
    """Random causal blocks, the same for all heads (Block-Sparse-Attention's block-sparse masks)."""
    return [
        Workload(
            "bsa",
            f"random causal blocks, {length:,} tokens",
            lambda _, device, s=sparsity: causal & block_sparse(_blocks(length, s, True).to(device)),
            length,
            length,
            True,
            "sparsity",
            sparsity,
        )
        for sparsity in sparsities
    ]


def swa(lengths: Sequence[int], size: int = 1024) -> list[Workload]:
    """A sliding window."""

    def gym(_: torch.device) -> Callable[..., Tensor]:
        from attn_gym.masks import generate_sliding_window

        return generate_sliding_window(size - 1)  # type: ignore[no-any-return]

    return [
        Workload(
            "swa",
            f"causal & window({size})",
            lambda *_: causal & window(size),
            n,
            n,
            True,
            "tokens",
            n,
            window=size,
            gym=gym,
        )
        for n in lengths
    ]


def documents(lengths: Sequence[int]) -> list[Workload]:
    """Packed documents of 256 to 2,048 tokens, causal inside."""
    found = []
    for n in lengths:
        sizes = _document_lengths(n)
        ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))

        def gym(device: torch.device, ends: Any = (0, *sizes)) -> Callable[..., Tensor]:
            from attn_gym.masks import causal_mask
            from attn_gym.masks.document_mask import generate_doc_mask_mod

            offsets = torch.tensor(ends, device=device).cumsum(0).int()
            return generate_doc_mask_mod(causal_mask, offsets)  # type: ignore[no-any-return]

        found.append(
            Workload(
                "documents",
                "packed documents of 256 to 2,048 tokens, causal",
                lambda _, device, ids=ids: same_document(ids.to(device)) & causal,
                n,
                n,
                True,
                "tokens",
                n,
                documents=sizes,
                gym=gym,
            )
        )
    return found


def natten(sides: Sequence[int], kernel: int = 13) -> list[Workload]:
    """A 2-D neighbourhood: tokens row by row, and stored in tiles of 8 x 16."""
    found = []
    for side in sides:
        n, both = side * side, (side, side)

        def gym(_: torch.device, side: int = side) -> Callable[..., Tensor]:
            from attn_gym.masks import generate_natten

            return generate_natten(side, side, kernel, kernel)  # type: ignore[no-any-return]

        for name, tile in (("row by row", None), ("in tiles of 8 x 16", (8, 16))):
            found.append(
                Workload(
                    "natten",
                    f"neighbourhood of {kernel} x {kernel}, {name}",
                    lambda *_, both=both, tile=tile: neighborhood(both, kernel, tile=tile),
                    n,
                    n,
                    False,
                    "tokens",
                    n,
                    gym=gym if tile is None else None,
                )
            )
    return found


def decode(lengths: Sequence[int]) -> list[Workload]:
    """One query at the end of a cache, streaming and in a window of 4,096."""
    return [
        Workload(
            "decode", str(mask), lambda *_, mask=mask: mask, 1, n, False, "keys", n, passes=FORWARD
        )
        for mask in (STREAMING, causal & window(4096))
        for n in lengths
    ]


def prefill(lengths: Sequence[int], chunk: int = 1024) -> list[Workload]:
    """The last chunk of a prompt that is read in chunks."""
    return [
        Workload(
            "prefill",
            f"{STREAMING}, {chunk:,} queries",
            lambda *_: STREAMING,
            chunk,
            n,
            False,
            "keys",
            n,
            passes=FORWARD,
        )
        for n in lengths
    ]


def efficiency(length: int) -> list[Workload]:
    """Three masks beside dense attention without a mask: what part of the ideal is reached."""
    masks: dict[str, Callable[[torch.device], Mask]] = {
        str(STREAMING): lambda _: STREAMING,
        "causal & window(1024)": lambda _: causal & window(1024),
        "random blocks of 10 %": lambda device: block_sparse(_blocks(length, 0.9).to(device)),
    }
    return [
        Workload(
            "efficiency",
            name,
            lambda _, device, mask=mask: mask(device),
            length,
            length,
            False,
            "tokens",
            length,
            passes=FORWARD,
        )
        for name, mask in masks.items()
    ]


PRESETS = ("duo", "bsa", "swa", "documents", "natten", "decode", "prefill", "efficiency")


def workloads(
    preset: str, device: torch.device, *, quick: bool, lengths: Sequence[int] = ()
) -> list[Workload]:
    """The workloads of a preset; lengths are its usual ones unless they are given."""
    on_gpu = device.type == "cuda"
    longest = (16 if quick else 128) * K if on_gpu else (4 if quick else 16) * K
    usual = lengths or [n * K for n in (2, 4, 8, 16, 32, 64, 128) if n * K <= longest]
    if preset == "bsa":
        sparsities = (0.5, 0.9) if quick else SPARSITIES
        at = lengths or (([8 * K] if quick else [8 * K, 64 * K]) if on_gpu else [longest // 2])
        return [workload for n in at for workload in bsa(n, sparsities)]
    if preset == "natten":
        sides = [round(n**0.5) for n in lengths] or [n for n in (48, 64, 128, 256) if n * n <= longest]
        return natten(sides)
    if preset == "decode":
        return decode(lengths or [n * K for n in (4, 16, 64, 256) if n * K <= 16 * longest])
    if preset == "prefill":
        return prefill(usual)
    if preset == "efficiency":
        return [workload for n in lengths or [8 * K] for workload in efficiency(n)]
    return {"duo": duo, "swa": swa, "documents": documents}[preset](usual)


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
