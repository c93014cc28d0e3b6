"""dkernel's functions beside its modules: block patterns as tensors, and merging by LSE."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse import MaskError
from flexsparse.masks.arguments import at_least, one_of


def get_sparse_attn_mask(
    num_heads: int,
    seqlen: int,
    block_size: int = 64,
    local_blocks: int | tuple[int, int] = 4,
    vert_stride: int = 4,
    homo_head: bool = False,
    num_kv_heads: int | None = None,
    past_len: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    return_dense: bool = False,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
    num_dense_heads: int = 0,
    q_start_position: int | None = None,
    kv_start_position: int | None = None,
    vert_position_type: str | None = None,
    causal: bool = True,
    kv_seqlen: int | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor | None]:
    """The pattern of S2-Attention as tensors: every block, and if asked every token.

    With g a kv head, a block of keys kv is kept in row q of blocks if it is one of the latest
    local_blocks, or "absolute": (kv + g * step + offset) % vert_stride == 0; or "relative": it is
    a multiple of vert_stride past the latest. `LocalStrideSparseAttention` needs no such tensors.

    Args:
        num_heads: query heads.
        seqlen: tokens.
        block_size: tokens of a block.
        local_blocks: latest blocks, the query's own included; (left, right) without causal.
        vert_stride: blocks from one stripe to the next.
        homo_head: one pattern for all heads; then H below is 1.
        num_kv_heads: the query heads of a kv head share a pattern; num_heads by default.
        past_len: rows of blocks before this token are left out.
        dtype: of the result.
        device: of the result; torch's default device by default.
        return_dense: also return the mask of tokens, 1 where a query sees a key.
        head_sliding_step: blocks by which stripes move from a kv head to the next;
            max(1, vert_stride // num_heads) by default.
        head_sliding_offset: blocks by which the stripes of all heads are moved.
        num_dense_heads: the last kv heads, which keep everything.
        q_start_position: the token at which the rows start.
        kv_start_position: the token at which the columns start.
        vert_position_type: "absolute" (default if causal) or "relative" (default if not).
        causal: keep only blocks up to the query's own (and keys up to the query, in the mask of
            tokens).
        kv_seqlen: tokens of the columns; seqlen by default.

    Returns:
        ((row starts int32 [H, rows + 1], columns int32 [H, most], filled up with -1),
        blocks [H, rows, columns], tokens [H, rows, columns] or None)

    Source: S2-Attention (arXiv 2407.17678), dkernel.get_sparse_attn_mask.
    """
    name = "get_sparse_attn_mask"
    num_heads = 1 if homo_head else num_heads
    n_kv_heads = num_kv_heads if num_kv_heads and not homo_head else num_heads
    kv_seqlen = seqlen if kv_seqlen is None else kv_seqlen
    at_least(name, 1, num_heads=num_heads, num_kv_heads=n_kv_heads, seqlen=seqlen)
    at_least(name, 1, block_size=block_size, vert_stride=vert_stride, kv_seqlen=kv_seqlen)
    kind = vert_position_type or ("absolute" if causal else "relative")
    one_of(name, "vert_position_type", kind, ("absolute", "relative"))
    pair = local_blocks if isinstance(local_blocks, (tuple, list)) else (local_blocks,) * 2
    if len(pair) != 2:
        raise MaskError(
            f"{name}(local_blocks={local_blocks!r}): local_blocks must be an int of 1 or more, or "
            "(left, right)."
        )
    left, right = pair
    at_least(name, 1, local_blocks=left)
    at_least(name, 1, local_blocks=right)
    starts = {
        "past_len": past_len or 0,
        "q_start_position": q_start_position or 0,
        "kv_start_position": kv_start_position or 0,
    }
    at_least(name, 0, num_dense_heads=num_dense_heads, **starts)
    for argument in ("q_start_position", "kv_start_position"):
        if starts[argument] % block_size:
            raise MaskError(
                f"{name}({argument}={starts[argument]}): a sequence is split between blocks, at a "
                f"multiple of block_size={block_size}."
            )
    if num_heads % n_kv_heads or num_dense_heads > (0 if homo_head else n_kv_heads):
        raise MaskError(
            f"{name}(num_heads={num_heads}, num_kv_heads={n_kv_heads}, num_dense_heads="
            f"{num_dense_heads}, homo_head={homo_head}): num_kv_heads must divide num_heads, and "
            "at most all kv heads are dense, or none with homo_head."
        )
    step = max(1, vert_stride // num_heads) if head_sliding_step is None else head_sliding_step

    q_start, kv_start = starts["q_start_position"], starts["kv_start_position"]
    q = torch.arange(-(-seqlen // block_size), device=device)[:, None] + q_start // block_size
    kv = torch.arange(-(-kv_seqlen // block_size), device=device) + kv_start // block_size
    head = torch.arange(num_heads, device=device)[:, None, None] // (num_heads // n_kv_heads)
    if causal:
        right = 1
    past_band = (q - kv - left + 1).clamp(min=0) + (kv - q - right + 1).clamp(min=0)
    if kind == "absolute":
        on_stripe = (kv + head * step + head_sliding_offset) % vert_stride == 0
        blocks = (past_band == 0) | on_stripe
    else:
        blocks = (past_band % vert_stride == 0).expand(num_heads, -1, -1)
    blocks = blocks | (head >= n_kv_heads - num_dense_heads)
    if causal:
        blocks = blocks & (kv <= q)
    rows = blocks[:, -(-starts["past_len"] // block_size) :].to(dtype)
    if not return_dense:
        return _csr(rows), rows, None
    q_token = torch.arange(seqlen, device=device)[starts["past_len"] :, None]
    kv_token = torch.arange(kv_seqlen, device=device)
    tokens = blocks[:, q_token // block_size, kv_token // block_size]
    if causal:
        tokens = tokens & (kv_token + kv_start <= q_token + q_start)
    return _csr(rows), rows, tokens.to(dtype)


def _csr(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row starts in the list of columns, and the columns, for each head."""
    counts = (blocks != 0).sum(-1)
    starts = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    columns = torch.full((len(blocks), int(starts[:, -1].max())), -1, device=blocks.device)
    for head, kept in enumerate(blocks):
        columns[head, : int(starts[head, -1])] = kept.nonzero()[:, 1]
    return starts.int(), columns.int()


def combine_attn_partitions(*x: tuple[Tensor, Tensor], hdim: int = 1) -> Tensor:
    """Attention over all keys from attention over each of several parts of them.

    Args:
        x: (out, lse) of each part, two or more, as the modules return them with return_lse=True.
        hdim: the heads dimension of out: 1 for [B, heads, q_len, D], 2 for [B, q_len, heads, D].

    Returns:
        out over all parts, of the same shape and dtype; 0 in rows that see no key at all.
    """
    if len(x) < 2 or hdim not in (1, 2):
        raise MaskError(
            f"combine_attn_partitions got {len(x)} parts and hdim={hdim}; give two or more pairs "
            "(out, lse), and hdim 1 or 2."
        )
    shapes = [tuple(tuple(tensor.shape) for tensor in part) for part in x]
    for place, found in enumerate(shapes):
        out = found[0]
        if (
            found != shapes[0]
            or len(out) != 4
            or found[1:] != ((out[0], out[hdim], out[3 - hdim]),)
        ):
            raise MaskError(
                f"combine_attn_partitions: part {place} has the shapes {found}; each part must be "
                "(out, lse) of the same shapes, lse [B, heads, q_len] and out of four dimensions, "
                f"dimension {hdim} of which is the heads (hdim)."
            )
    outs = torch.stack([out for out, _ in x])
    lse = torch.stack([part for _, part in x])
    lse = lse.transpose(2, 3) if hdim == 2 else lse
    total = lse.logsumexp(0)
    weights = (lse - total.masked_fill(total == -torch.inf, 0)).exp()
    return (outs * weights.unsqueeze(-1)).sum(0).to(outs.dtype)
