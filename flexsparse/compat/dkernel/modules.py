"""S2-Attention's modules: attention by a table of blocks, or by strides."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from flexsparse import Mask, MaskError, PerHead, h, per_head
from flexsparse.compat.dkernel import inputs
from flexsparse.compat.dkernel.call import BlockAttention
from flexsparse.masks import block_sparse, s2_attention
from flexsparse.masks import causal as causal_mask
from flexsparse.masks.arguments import at_least
from flexsparse.tensors import counting_writes


class SparseAttention(BlockAttention):
    """Attention by a table of blocks: a query sees the keys of the blocks kept in its row.

    The table is the buffer `sparse_pattern`, which follows .to(device) and is no part of the
    state_dict. Tables are data: those of one shape share a compiled kernel.

    >>> attend = SparseAttention(64, torch.ones(16, 16).tril())  # up to 1,024 tokens
    >>> out = attend(q, k, v)  # [B, tokens, heads, D]

    Args:
        block_size: tokens of a block of the pattern.
        sparse_pattern: boolean, or of 0 and 1: [blocks, blocks], or [heads, blocks, blocks] for
            the query heads or the kv heads. Rows count from position 0; if the blocks are not
            square, from query row 0 (a chunk of a sequence that is split over devices).
        causal: keep only keys up to the query.
        seq_dim: 1 for [B, tokens, heads, D], which None means, or 2 for [B, heads, tokens, D].
        tiles: block_m, block_n, bwd_block_sizes, d_splits, inference: they choose dkernel's
            kernels, and are ignored.

    Raises:
        MaskError: an argument is not as above.

    Source: S2-Attention (arXiv 2407.17678), dkernel's SparseAttention.
    """

    sparse_pattern: Tensor

    def __init__(
        self,
        block_size: int,
        sparse_pattern: Tensor,
        *,
        causal: bool = True,
        seq_dim: int | None = None,
        **tiles: Any,
    ) -> None:
        at_least("SparseAttention", 1, block_size=block_size)
        inputs.refuse_unknown("SparseAttention", tiles)
        pattern = inputs.boolean(sparse_pattern)
        n_patterns = len(pattern) if pattern.dim() == 3 else 1
        super().__init__(n_patterns, block_size, pattern.shape[-1] * block_size, seq_dim)
        self.causal = causal
        self.register_buffer("sparse_pattern", counting_writes(pattern), persistent=False)

    def extra_repr(self) -> str:
        """What print shows."""
        shape = list(self.sparse_pattern.shape)
        return f"block_size={self.block_size}, sparse_pattern={shape}, causal={self.causal}"

    @property
    def _identity(self) -> tuple[int, int]:
        pattern = self.sparse_pattern
        if pattern.is_inference():  # the module was moved in inference_mode
            self.sparse_pattern = pattern = counting_writes(pattern)
        return id(pattern), pattern._version

    @property
    def _is_chunk(self) -> bool:
        """Whether rows count from query row 0: the sequence is split over devices."""
        rows, columns = self.sparse_pattern.shape[-2:]
        return rows != columns

    def _refuse_lengths(self, q_len: int, kv_len: int) -> None:
        if self.causal or not self._is_chunk:
            super()._refuse_lengths(q_len, kv_len)
        rows, columns = (n * self.block_size for n in self.sparse_pattern.shape[-2:])
        if q_len > rows or kv_len > columns:
            raise MaskError(
                f"q has {q_len} tokens and k has {kv_len}, and the pattern is one of {rows} x "
                f"{columns} tokens; it takes no more than that."
            )

    def _mask(self, repeats: int, q_offset: int | None) -> Mask:
        if self._is_chunk and q_offset is None:
            raise MaskError(
                f"The pattern {list(self.sparse_pattern.shape)} is not square, so its rows are "
                "those of one chunk; it takes no padded or packed sequences."
            )
        first_row = q_offset if self._is_chunk else 0
        kept = block_sparse(self.sparse_pattern, self.block_size, first_row or 0)
        if repeats > 1 and self.sparse_pattern.dim() == 3:
            kept = kept.at(h=h // repeats).named(kept.name)
        return causal_mask & kept if self.causal else kept


class LocalStrideSparseAttention(BlockAttention):
    """Recent blocks, and stripes of blocks that differ from head to head: S2-Attention's pattern.

    Query head h sees, of the keys up to its own, those of the latest `local_blocks` blocks, and of
    every `vert_stride`-th block: (kv_idx // block_size + g * step + offset) % vert_stride == 0 with
    g its kv head. `flexsparse.masks.s2_attention` draws it. No table is made: a longer max_seq_len
    costs nothing.

    >>> attend = LocalStrideSparseAttention(32, 8192, 64, 16, 8, num_kv_heads=8)
    >>> out = attend(q, k, v)  # q [B, tokens, 32, D]; k, v [B, tokens, 8, D]

    Args:
        num_heads: query heads.
        max_seq_len: the longest sequence, in tokens; it is rounded up to a multiple of block_size,
            block_m, block_n and 64, whichever is largest.
        block_size: tokens of a block.
        local_blocks: latest blocks, the query's own included; without causal to both sides, or
            (left, right).
        vert_stride: blocks from one stripe to the next; 1 is dense.
        homo_head: all heads see the same stripes.
        num_dense_heads: the last kv heads, which see all keys up to the query.
        num_kv_heads: the query heads of a kv head share a pattern; num_heads by default.
        active_head_range: (start, end): q has only these heads of the num_heads.
        head_sliding_step: blocks by which stripes move from a kv head to the next;
            max(1, vert_stride // num_heads) by default.
        head_sliding_offset: blocks by which the stripes of all heads are moved (to the left, so
            that head g sees block 0 if g * step + offset is a multiple of vert_stride).
        causal: without it stripes lie at fixed distances past the recent blocks, on both sides, the
            same for all heads (vert_position_type="relative").
        seq_dim: 1 for [B, tokens, heads, D], which None means, or 2 for [B, heads, tokens, D].
        tiles: block_m, block_n, bwd_block_sizes, d_splits, inference: they choose dkernel's
            kernels, and change no result.

    Raises:
        MaskError: an argument is not as above.

    Source: S2-Attention (arXiv 2407.17678), dkernel's LocalStrideSparseAttention.
    """

    def __init__(
        self,
        num_heads: int,
        max_seq_len: int,
        block_size: int,
        local_blocks: int | tuple[int, int],
        vert_stride: int,
        *,
        homo_head: bool = False,
        num_dense_heads: int = 0,
        num_kv_heads: int | None = None,
        active_head_range: tuple[int, int] | None = None,
        head_sliding_step: int | None = None,
        head_sliding_offset: int = 0,
        causal: bool = True,
        seq_dim: int | None = None,
        **tiles: Any,
    ) -> None:
        name = "LocalStrideSparseAttention"
        at_least(name, 1, num_heads=num_heads, max_seq_len=max_seq_len, block_size=block_size)
        inputs.refuse_unknown(name, tiles)
        if not causal and isinstance(local_blocks, int):
            local_blocks = (local_blocks, local_blocks)
        pattern = (
            num_heads,
            local_blocks,
            vert_stride,
            block_size,
            num_kv_heads,
            num_dense_heads,
            homo_head,
            head_sliding_step,
            head_sliding_offset,
            causal,
        )
        s2_attention(*pattern)  # refuses wrong arguments
        # equal heads are one pattern, which any number of heads may share
        first, end = (0, 1) if homo_head else inputs.head_range(active_head_range, num_heads)
        multiple = max(block_size, tiles.get("block_m") or 1, tiles.get("block_n") or 1, 64)
        max_seqlen = -(-max_seq_len // multiple) * multiple
        super().__init__(end - first, block_size, max_seqlen, seq_dim)
        self.max_seq_len = max_seqlen
        self._pattern = pattern
        self._heads = (first, end)

    def extra_repr(self) -> str:
        """What print shows."""
        num_heads, local_blocks, vert_stride, block_size = self._pattern[:4]
        return (
            f"num_heads={num_heads}, max_seq_len={self.max_seq_len}, block_size={block_size}, "
            f"local_blocks={local_blocks}, vert_stride={vert_stride}"
        )

    def _mask(self, repeats: int, q_offset: int | None) -> PerHead:
        heads = _s2_attention(*self._pattern)
        first, end = self._heads
        return per_head([heads[head] for head in range(first, end) for _ in range(repeats)])


_s2_attention = functools.lru_cache(s2_attention)
