"""torch's scaled_dot_product_attention, for heads that see everything or everything before them.

Its dense kernels (cuDNN, FlashAttention, CPU flash) are the fastest there are for these two masks.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexsparse.analysis.cells import Grid
from flexsparse.expr import Mask, everything, kv_idx, q_idx

CAUSAL = kv_idx <= q_idx


def unsupported(mask: Mask, grid: Grid) -> str | None:
    """Why scaled_dot_product_attention cannot run this mask, as a sentence, or None if it can."""
    # torch's is_causal counts both positions from 0; to one query, causal is the first keys
    from_the_first = grid.q_offset == 0 or (grid.q_len == 1 and grid.q_offset > 0)
    if mask != everything and not (mask == CAUSAL and from_the_first):
        return (
            "scaled_dot_product_attention takes full masks, and causal ones of a single query or "
            "of queries from position 0 on"
        )
    return None


def unsupported_extras(
    *, score_mod: object | None, dropout: object | None, return_lse: bool
) -> str | None:
    """Why scaled_dot_product_attention cannot do what is asked besides a mask, or None."""
    if score_mod is not None:
        return "scaled_dot_product_attention takes no score_mod"
    if dropout is not None:
        return "the dropout of scaled_dot_product_attention follows another generator"
    if return_lse:
        return "scaled_dot_product_attention returns no LSE"
    return None


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, grid: Grid, *, scale: float | None = None
) -> tuple[Tensor, None]:
    """Attention under a full or causal mask: out [B, n_heads, q_len, Dv], and no LSE."""
    gqa = q.shape[1] != k.shape[1]
    causal = mask != everything
    if causal and grid.q_len == 1:
        seen = min(grid.q_offset + 1, grid.kv_len)
        k, v, causal = k[:, :, :seen], v[:, :, :seen], False
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
    return out, None
