"""Token-granular streaming attention on a GPU: `causal & (sink(s) | window(w))` in Triton.

The fast path for heads whose sink and window are well under a block of 128 tokens. This file is the
host side: what the kernels take, their tile sizes, and the operators torch sees (opaque to
torch.compile, with fake tensors and gradients). It needs triton: import it only where it is used.
"""

# mypy: disable-error-code="import-untyped,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flexsparse.errors import ExecutorError
from flexsparse.executors import streaming_kernels as kernels
from flexsparse.executors.streaming_decode import DECODE_ROWS, streaming_decode

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SINK_TILE = 16  # the narrowest tile tensor cores take, for short sinks
DELTA_TILE = 64
# partial sums of sink keys: about this many programs share them, whatever the device, so that the
# order of the sums (and with it every bit of the gradients) depends on shapes alone
SINK_PROGRAMS = 1024
MIN_CHUNK = 2048
ASSUMED_SINK = 128  # a longer sink is still right without `max_sink`, its gradient is slower
MAX_SINK = 4096
PADDING_ROW = 1 << 30  # the row of an unused entry of a tile table: past every sequence


class Tile(NamedTuple):
    """One kernel's tile: `rows` is over all packed heads in fwd and dq, per head in dkdv."""

    rows: int
    kv: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tiles of the three kernels, for heads alone and for heads packed by kv head."""

    fwd: Tile
    fwd_packed: Tile
    dq: Tile
    dq_packed: Tile
    dkdv: Tile


def _tiles(*numbers: tuple[int, int, int, int]) -> Tiles:
    return Tiles(*(Tile(*x) for x in numbers))


# (architecture, head_dim up to) -> tiles. Rows per head stay at 64 or less: with a window of 64 or
# 256 a taller tile visits too many keys that its rows do not need (benchmarks/model_streaming.py).
TILES: dict[tuple[int, int], Tiles] = {
    # fwd, fwd_packed, dq, dq_packed, dkdv, each (rows, kv, warps, stages)
    (80, 64): _tiles(
        (64, 64, 4, 3), (128, 64, 8, 3), (64, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2)
    ),
    (80, 128): _tiles(
        (64, 32, 4, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 3)
    ),
    (80, 256): _tiles(
        (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)
    ),
    (90, 64): _tiles(
        (64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 3)
    ),
    (90, 128): _tiles(
        (64, 64, 4, 3), (128, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (32, 64, 8, 3)
    ),
    (90, 256): _tiles(
        (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)
    ),
    (100, 64): _tiles(
        (64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 2), (32, 64, 4, 3)
    ),
    (100, 128): _tiles(
        (64, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 3)
    ),
    (100, 256): _tiles(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)
    ),
}  # fmt: skip
# float32 is for tests: no tensor cores, twice the memory
FLOAT32_TILES = Tiles(*[Tile(32, 32, 4, 1)] * 5)


def architecture(device: torch.device) -> int:
    """The row of TILES for a device: 80, 90 or 100."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return min(max(major, 8), 10) * 10


def tiles_for(q: Tensor, v: Tensor) -> Tiles:
    """The tile sizes for these dtypes, head dims and device."""
    if q.dtype == torch.float32:
        return FLOAT32_TILES
    widest = max(q.shape[-1], v.shape[-1])
    return TILES[architecture(q.device), next(dim for dim in (64, 128, 256) if widest <= dim)]


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> str | None:
    """Why these kernels cannot run these inputs, as a sentence, or None if they can."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions; it must be [batch, heads, length, head_dim]"
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}; the kernel takes float16, bfloat16 or float32"
        if x.dtype != q.dtype:
            return f"{name} is {x.dtype} but q is {q.dtype}; convert one of them"
        if x.shape[-1] not in HEAD_DIMS:
            return f"{name} has head_dim {x.shape[-1]}; the kernel takes one of {HEAD_DIMS}"
        if x.stride(-1) != 1:
            return (
                f"{name}'s last dimension has stride {x.stride(-1)}; the kernel takes 1: "
                f"pass {name}.contiguous()"
            )
    if q.shape[-1] != k.shape[-1]:
        return f"q has head_dim {q.shape[-1]} but k has {k.shape[-1]}; they must be equal"
    if k.shape[:3] != v.shape[:3]:
        return f"k is {list(k.shape[:3])} but v is {list(v.shape[:3])} in [batch, heads, length]"
    if page_table is None and q.shape[0] != k.shape[0]:
        return f"q has batch {q.shape[0]} but k has {k.shape[0]}; they must be equal"
    n_heads, n_kv_heads = q.shape[1], k.shape[1]
    if n_heads == 0 or n_kv_heads == 0 or n_heads % n_kv_heads:
        return f"q has {n_heads} heads and k {n_kv_heads}; q's must be a multiple of k's"
    for name, x in {"sink": sink, "window": window}.items():
        if x.shape != (n_heads,) or x.dtype != torch.int32 or not x.is_contiguous():
            return (
                f"{name} is {x.dtype} {list(x.shape)}; the kernel takes a contiguous int32 tensor "
                f"[{n_heads}], one number per query head"
            )
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        return "only one of cu_seqlens_q and cu_seqlens_k was given; give both or neither"
    if (page_table is None) != (kv_lens is None):
        return "page_table and kv_lens (keys in use, per row) go together; give both or neither"
    if packed and (page_table is not None or q.shape[0] != 1):
        return (
            f"cu_seqlens_q came with {'pages' if page_table is not None else 'batch'} "
            f"(q has batch {q.shape[0]}); packed sequences are one batch row and have no pages"
        )
    n_seqs = q.shape[0]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        n_seqs = cu_seqlens_q.numel() - 1
        if cu_seqlens_k.shape != cu_seqlens_q.shape or n_seqs < 1:
            return "cu_seqlens_q and cu_seqlens_k need the same length, the number of sequences + 1"
    if page_table is not None and (page_table.dim() != 2 or page_table.shape[0] != n_seqs):
        return f"page_table is {list(page_table.shape)}; the kernel takes [{n_seqs}, pages per row]"
    numbers = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "page_table": page_table,
        "kv_lens": kv_lens,
        "q_offset": q_offset,
    }
    for name, x in numbers.items():  # type: ignore[assignment]
        if isinstance(x, Tensor) and (x.dtype != torch.int32 or not x.is_contiguous()):
            return f"{name} is {x.dtype}, strides {x.stride()}; the kernel takes contiguous int32"
        if isinstance(x, Tensor) and name in ("kv_lens", "q_offset") and x.shape != (n_seqs,):
            return f"{name} is {list(x.shape)}; it must be one number per sequence, [{n_seqs}]"
    others = {"k": k, "v": v, "sink": sink, "window": window} | numbers
    for name, x in others.items():  # type: ignore[assignment]
        if isinstance(x, Tensor) and x.device != q.device:
            return f"{name} is on {x.device} but q is on {q.device}; move one of them"
    if not q.is_cuda and isinstance(kernels.streaming_fwd_kernel, triton.JITFunction):
        return (
            f"q is on {q.device}; the kernel runs on CUDA (or interpreted, for tests: set "
            "TRITON_INTERPRET=1 before triton is imported)"
        )
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "q is torch.bfloat16, which Triton's interpreter cannot multiply; use float16 there"
    return None


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    page_table: Tensor | None = None,
    kv_lens: Tensor | None = None,
    max_sink: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where head h keeps `causal & (sink(sink[h]) | window(window[h]))`.

    Args:
        q: [batch, n_heads, q_len, head_dim]; packed sequences: batch 1, lengths in total tokens.
        k: [batch, n_kv_heads, kv_len, head_dim].
        v: like k; its head_dim may differ.
        sink: int32 [n_heads], in tokens. It is data: a new number compiles nothing.
        window: likewise; the query's own position counts.
        scale: of the scores; 1 / sqrt(head_dim) if None.
        softcap: scores become softcap * tanh(scores / softcap).
        cu_seqlens_q: int32 [sequences + 1], where each packed sequence starts, and the end.
        cu_seqlens_k: likewise for the keys.
        q_offset: position of query row 0, also one per sequence; kv_len - q_len if None.
        page_table: int32 [batch, pages per row]; k and v are then [n_pages, n_kv_heads,
            page_size, head_dim]. No gradients.
        kv_lens: int32 [batch], the keys in use of each row; goes with page_table.
        max_sink: the largest sink if the host knows it; only the speed of the gradient uses it.
        return_lse: also return lse.

    Returns:
        out [batch, n_heads, q_len, head_dim of v], and with return_lse the float32 natural-log
        lse [batch, n_heads, q_len]. A row that keeps no key has out 0 and lse -inf.
    """
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "q_offset": q_offset}
    pages = {"page_table": page_table, "kv_lens": kv_lens}
    reason = unsupported(q, k, v, sink, window, **lengths, **pages)  # type: ignore[arg-type]
    if reason is None and softcap is not None and softcap <= 0:
        reason = f"softcap is {softcap}; it must be positive, or None for no cap"
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if reason is None and grad and page_table is not None:
        reason = "paged keys have no gradient; call it under torch.no_grad()"
    if reason is not None:
        raise ExecutorError(f"streaming attention cannot run this call: {reason}.")
    if isinstance(q_offset, int):
        n_seqs = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        q_offset = torch.full((n_seqs,), q_offset, dtype=torch.int32, device=q.device)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    cap = 0.0 if softcap is None else softcap
    few_rows = q.shape[2] * (q.shape[1] // k.shape[1]) <= DECODE_ROWS
    if page_table is not None or (few_rows and not grad and cu_seqlens_q is None):
        out, lse = streaming_decode(
            q, k, v, sink, window, q_offset, page_table, kv_lens, scale, cap
        )
    else:
        out, lse = streaming_forward(
            q, k, v, sink, window, q_offset, cu_seqlens_q, cu_seqlens_k, scale, cap,
            ASSUMED_SINK if max_sink is None else max_sink,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def tile_table(cu_seqlens: Tensor, total: int, block: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Tiles of packed sequences as (sequence, first row) pairs, and each sequence's first tile.

    Made on the device without a wait for it: as long as any lengths could need, the rest unused.
    With skip=1 each sequence's first tile is left out.
    """
    lengths = cu_seqlens.diff()
    n_tiles = ((lengths + block - 1) // block - skip).clamp(min=0)
    ends = n_tiles.cumsum(0, dtype=torch.int32)
    firsts = ends - n_tiles
    bound = total // block + (0 if skip else lengths.numel())
    i = torch.arange(bound, device=cu_seqlens.device, dtype=torch.int32)
    seq = torch.searchsorted(ends, i, right=True, out_int32=True)
    used = seq < lengths.numel()
    seq = seq.clamp(max=lengths.numel() - 1)
    row = torch.where(used, (i - firsts[seq] + skip) * block, PADDING_ROW)
    return torch.stack((seq, row), 1).to(torch.int32).contiguous(), firsts


def padded(dim: int) -> int:
    """The head dim as tiles have it, a power of two."""
    return int(triton.next_power_of_2(dim))


def dims(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head dims as every kernel takes them."""
    d, dv = q.shape[-1], v.shape[-1]
    return {"HEAD_DIM": d, "V_DIM": dv, "BLOCK_D": padded(d), "BLOCK_DV": padded(dv)}


def pack_of(group_size: int) -> int:
    """How many heads of a group one program takes."""
    return next(n for n in (4, 2, 1) if group_size % n == 0)


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """(qk_scale, cap) as the kernels take them: base 2 scores, or the argument of tanh."""
    return (scale / softcap, softcap) if softcap > 0 else (scale * math.log2(math.e), 0.0)


def row_grid(
    q: Tensor, block: int, pack: int, cu_seqlens_q: Tensor | None
) -> tuple[tuple[int, int, int], Tensor | None]:
    """The grid of the fwd and dq kernels, and its tile table where sequences are packed."""
    tiles, n_tiles = None, triton.cdiv(q.shape[2], block)
    if cu_seqlens_q is not None:
        tiles, _ = tile_table(cu_seqlens_q, q.shape[2], block)
        n_tiles = tiles.shape[0]
    return (n_tiles, q.shape[1] // pack, q.shape[0]), tiles


def strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and length."""
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op("flexsparse::streaming_forward", mutates_args=())
def streaming_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor,
    window: Tensor,
    q_offset: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float,
    max_sink: int,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: out, lse."""
    # rows outside every packed sequence are nobody's to write
    new = torch.empty if cu_seqlens_q is None else torch.zeros
    out = new((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:
        lse.fill_(-math.inf)
    if out.numel() == 0:
        return out, lse
    group_size = q.shape[1] // k.shape[1]
    pack = pack_of(group_size)
    tile = tiles_for(q, v).fwd if pack == 1 else tiles_for(q, v).fwd_packed
    grid, tiles = row_grid(q, tile.rows // pack, pack, cu_seqlens_q)
    with torch.cuda.device_of(q):
        kernels.streaming_fwd_kernel[grid](
            q, k, v, out, lse, sink, window, q_offset, cu_seqlens_q, cu_seqlens_k, tiles,
            *strides(q, k, v), q.shape[1], group_size, q.shape[2], k.shape[2],
            *score_factors(scale, softcap), **dims(q, v), BLOCK_Q=tile.rows // pack,
            BLOCK_KV=tile.kv, BLOCK_SINK=SINK_TILE, PACK=pack, SOFTCAP=softcap > 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


@streaming_forward.register_fake
def _(q, k, v, sink, window, q_offset, cu_seqlens_q, cu_seqlens_k, scale, softcap, max_sink):  # type: ignore[no-untyped-def]
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return q.new_empty((*q.shape[:3], v.shape[-1])), lse


@torch.library.custom_op("flexsparse::streaming_backward", mutates_args=())
def streaming_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor,
    window: Tensor,
    q_offset: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    softcap: float,
    max_sink: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernels: dq, dk, dv. No atomics: the same bits on every run."""
    new = torch.empty if cu_seqlens_q is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    n_heads, n_kv_heads, q_len, kv_len = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    group_size = n_heads // n_kv_heads
    pack = pack_of(group_size)
    tiles = tiles_for(q, v)
    shape = dims(q, v)
    factors = (*score_factors(scale, softcap), scale)
    dout, dlse = dout.contiguous(), dlse.contiguous()
    delta = torch.empty_like(lse)
    lengths = (q_offset, cu_seqlens_q, cu_seqlens_k)
    with torch.cuda.device_of(q):
        kernels.streaming_delta_kernel[(triton.cdiv(lse.numel(), DELTA_TILE),)](
            out, dout, dlse, delta, lse.numel(), V_DIM=shape["V_DIM"], BLOCK_DV=shape["BLOCK_DV"],
            BLOCK=DELTA_TILE,
        )  # fmt: skip

        tile = tiles.dq if pack == 1 else tiles.dq_packed
        grid, table = row_grid(q, tile.rows // pack, pack, cu_seqlens_q)
        kernels.streaming_dq_kernel[grid](
            q, k, v, dout, lse, delta, dq, sink, window, *lengths, table, *strides(q, k, v),
            n_heads, group_size, q_len, kv_len, *factors, **shape, BLOCK_Q=tile.rows // pack,
            BLOCK_KV=tile.kv, BLOCK_SINK=SINK_TILE, PACK=pack, SOFTCAP=softcap > 0,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

        tile = tiles.dkdv
        n_sink = triton.cdiv(min(max_sink, MAX_SINK, kv_len), tile.kv)
        programs = max(1, SINK_PROGRAMS // max(1, n_sink * n_kv_heads * q.shape[0]))
        chunk = max(MIN_CHUNK, triton.next_power_of_2(triton.cdiv(q_len, programs)))
        table = parts = firsts = None
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            parts, firsts = tile_table(cu_seqlens_q, q_len, chunk, skip=1)
            table, _ = tile_table(cu_seqlens_k, kv_len, tile.kv)
            n_chunks, n_tiles = parts.shape[0], table.shape[0]
        else:
            n_chunks, n_tiles = triton.cdiv(q_len, chunk) - 1, triton.cdiv(kv_len, tile.kv)
        part_shape = (q.shape[0] * n_chunks, n_kv_heads, n_sink * tile.kv)
        dk_part, dv_part = (
            torch.empty((*part_shape, x.shape[-1]), dtype=torch.float32, device=q.device)
            for x in (k, v)
        )

        def launch(grid: tuple[int, int, int], table: Tensor | None, partial: bool) -> None:
            kernels.streaming_dkdv_kernel[grid](
                q, k, v, dout, lse, delta, dk, dv, dk_part, dv_part, sink, window, *lengths, table,
                firsts, *strides(q, k, v), n_heads, n_kv_heads, group_size, q_len, kv_len,
                n_chunks, n_sink, chunk, *factors, **shape, BLOCK_Q=tile.rows, BLOCK_KV=tile.kv,
                PARTIAL=partial, SOFTCAP=softcap > 0, num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip

        if n_chunks > 0 and n_sink > 0:
            launch((n_chunks, n_kv_heads * n_sink, q.shape[0]), parts, True)
        launch((n_tiles, n_kv_heads, q.shape[0]), table, False)
    return dq, dk, dv


@streaming_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, sink, window, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:8])
    ctx.numbers = inputs[8:]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *data = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    grads = streaming_backward(dout, dlse, q, k, v, out, lse, *data, *ctx.numbers)
    return (*grads, *[None] * 8)


streaming_forward.register_autograd(_differentiate, setup_context=_save)
