"""The numbers of a streaming launch: tile sizes, grids, constants. Needs torch alone."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from typing import NamedTuple

import torch
from torch import Tensor

SINK_TILE = 16  # the narrowest tile tensor cores take, for short sinks
SUM_TILE = 8  # keys whose partial sums a program adds
# partial sums of sink keys: about this many programs share them, whatever the device, so that the
# order of the sums (and with it every bit of the gradients) depends on shapes alone
SINK_PROGRAMS = 1024
MIN_CHUNK = 2048
MAX_SINK = 4096
CAPPED_STEP = 32  # rows or keys that a kernel walks at a time with a soft-cap, at most


class Tile(NamedTuple):
    """One kernel's tile; in fwd and dq a program takes `halves` of them, which share their keys.

    `rows` is of all packed heads in fwd and dq, of one head in dkdv.
    """

    rows: int
    kv: int
    warps: int
    stages: int
    halves: int = 1


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    fwd: Tile
    dq: Tile
    dkdv: Tile


def _tiles(*numbers: tuple[int, ...]) -> Tiles:
    return Tiles(*(Tile(*x) for x in numbers))


# (architecture, head_dim up to) -> tiles
TILES: dict[tuple[int, int], Tiles] = {
    # fwd, dq, each (rows, kv, warps, stages, halves), and dkdv, (rows, kv, warps, stages)
    (80, 64): _tiles((64, 64, 4, 3, 1), (32, 64, 4, 2, 2), (32, 32, 4, 2)),
    (80, 128): _tiles((64, 32, 8, 3, 2), (64, 32, 8, 2, 1), (32, 64, 8, 2)),
    (80, 256): _tiles((64, 32, 8, 2, 1), (32, 32, 8, 2, 1), (16, 32, 8, 2)),
    (90, 64): _tiles((64, 64, 4, 3, 2), (64, 64, 4, 2, 2), (64, 64, 4, 3)),
    (90, 128): _tiles((64, 64, 4, 2, 2), (64, 32, 4, 3, 2), (64, 64, 4, 2)),
    (90, 256): _tiles((64, 32, 4, 2, 1), (128, 32, 8, 2, 1), (32, 64, 8, 2)),
    (100, 64): _tiles((64, 64, 4, 3, 2), (64, 64, 8, 2, 1), (32, 64, 4, 3)),
    (100, 128): _tiles((64, 32, 4, 2, 2), (64, 32, 4, 3, 1), (32, 64, 4, 2)),
    (100, 256): _tiles((64, 32, 8, 2, 1), (64, 32, 8, 2, 1), (32, 32, 8, 2)),
}  # fmt: skip
# float32 is for tests: no tensor cores, twice the memory, and two halves take long to compile
FLOAT32_TILES = Tiles(*[Tile(32, 32, 4, 1)] * 3)


@functools.cache
def architecture(device: torch.device) -> int:
    """The row of TILES for a device: 80, 90 or 100.

    The rows of sm_80 fit the 99 KB of shared memory of sm_86, sm_89 and sm_120, which, like sm_80,
    have no tensor cores that read shared memory.
    """
    if device.type != "cuda":
        return 80
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def tiles_for(q: Tensor, v: Tensor, softcap: float, pack: int) -> Tiles:
    """The tile sizes for these dtypes, head dims, device and heads packed into a program."""
    if q.dtype == torch.float32:
        return FLOAT32_TILES
    widest = max(q.shape[-1], v.shape[-1])
    return _tiles_of(architecture(q.device), widest, softcap > 0, pack > 1)


@functools.cache
def _tiles_of(arch: int, widest: int, is_capped: bool, is_packed: bool) -> Tiles:
    fwd, dq, dkdv = TILES[arch, next(dim for dim in (64, 128, 256) if widest <= dim)]
    if is_capped:  # its tanh takes registers
        fwd = fwd._replace(kv=min(fwd.kv, CAPPED_STEP))
        dq = dq._replace(kv=min(dq.kv, CAPPED_STEP), halves=1)
        dkdv = dkdv._replace(rows=min(dkdv.rows, CAPPED_STEP // (2 if widest > 128 else 1)))
    # of packed heads a tile of both halves has few positions, so few keys to see in vain
    if is_packed or (arch == 90 and halves_wait()):
        fwd, dq = one_tile(fwd), one_tile(dq)
    return Tiles(fwd, dq, dkdv)


def one_tile(tile: Tile) -> Tile:
    """Both halves as one tile, if it has two."""
    if tile.halves == 1:
        return tile
    return tile._replace(rows=tile.rows * tile.halves, warps=8, halves=1)


@functools.cache
def halves_wait() -> bool:
    """Whether triton's ptxas for sm_90 lets each wgmma of two halves wait for the one before.

    That of triton 3.9 does, those of 3.6 and 3.7 do not.
    """
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) >= (3, 8)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def padded(dim: int) -> int:
    """The next power of two: what a tile is made of."""
    return 1 << (dim - 1).bit_length()


def dims(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head dims as every kernel takes them."""
    d, dv = q.shape[-1], v.shape[-1]
    return {"HEAD_DIM": d, "V_DIM": dv, "BLOCK_D": padded(d), "BLOCK_DV": padded(dv)}


@functools.cache
def pack_of(group_size: int) -> int:
    """How many heads of a group one program takes."""
    return next(n for n in (4, 2, 1) if group_size % n == 0)


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """(qk_scale, cap) as the kernels take them: base 2 scores, or the argument of tanh."""
    return (scale / softcap, softcap) if softcap > 0 else (scale * math.log2(math.e), 0.0)


def launch_options(warps: int, stages: int) -> dict[str, int]:
    """How triton compiles a kernel of scores."""
    # the scale of scores belongs into the subtraction before exp2; triton 3.10 keeps them apart
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and length."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def n_sequences(cu_seqlens: Tensor | None) -> int:
    """How many sequences a batch row holds."""
    return 1 if cu_seqlens is None else cu_seqlens.numel() - 1


def n_slots(tokens: int, size: int, cu_seqlens: Tensor | None) -> int:
    """How many programs take `size` tokens each, whatever the lengths of packed sequences."""
    return cdiv(tokens, size) if cu_seqlens is None else tokens // size + n_sequences(cu_seqlens)


def row_grid(q: Tensor, tile: Tile, pack: int, cu_seqlens_q: Tensor | None) -> tuple[int, int, int]:
    """The grid of the fwd and dq kernels."""
    rows = tile.rows // pack * tile.halves
    return n_slots(q.shape[2], rows, cu_seqlens_q), q.shape[1] // pack, q.shape[0]


def sink_chunk(q_len: int, n_sink_tiles: int) -> int:
    """How many query rows one program sums for a tile of sink keys, of n_sink_tiles in all."""
    programs = max(1, SINK_PROGRAMS // max(1, n_sink_tiles))
    return max(MIN_CHUNK, padded(cdiv(q_len, programs)))
