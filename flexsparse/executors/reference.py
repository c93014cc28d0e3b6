"""Dense float32 attention: the definition of a correct output and LSE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexsparse.dropout import Dropout
from flexsparse.executors.blockwise_scores import over_indices
from flexsparse.tensors import MaskMod, ScoreMod


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_mod: MaskMod,
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(score_mod(scale * q k^T) where mask_mod) v, computed densely in float32.

    A query row that sees no key has output 0 and LSE -inf.

    Args:
        q: [B, n_heads, q_len, D].
        k: [B, n_kv_heads, kv_len, D]; query head h reads kv head h // (n_heads / n_kv_heads).
        v: [B, n_kv_heads, kv_len, Dv].
        mask_mod: of (b, h, q_idx, kv_idx), where q_idx counts rows of q.
        scale: of the scores; 1 / sqrt(D) by default.
        score_mod: of (score, b, h, q_idx, kv_idx), on the scaled scores.
        dropout: of the weights, after the softmax.

    Returns:
        out [B, n_heads, q_len, Dv] in q's dtype; LSE [B, n_heads, q_len] in float32, natural log.
    """
    group_size = q.shape[1] // k.shape[1]
    # float64 inputs stay float64, so that gradients can be checked numerically
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(dtype).repeat_interleave(group_size, 1) for x in (k, v))
    scores = q.to(dtype) @ keys.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    b, h, q_idx, kv_idx = (
        torch.arange(n, device=q.device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, n in enumerate(scores.shape)
    )
    if score_mod is not None:
        of_rows = (x.flatten().expand(len(scores), -1) for x in (h, q_idx, kv_idx))
        scores = over_indices(score_mod, scores=1)(scores, b.flatten(), *of_rows).to(dtype)
    scores = scores.masked_fill(~mask_mod(b, h, q_idx, kv_idx), -math.inf)
    lse = scores.logsumexp(-1)
    # by the maximum: exp(scores - lse) does not add up to 1 where scores are large and lse rounded
    top = scores.detach().amax(-1, keepdim=True)
    # rows without a key: exp(-inf - 0) = 0, where -inf - -inf would be NaN, and 0 / 1 = 0
    weights = (scores - top.masked_fill(top == -math.inf, 0)).exp()
    weights = weights / weights.sum(-1, keepdim=True).masked_fill(top == -math.inf, 1)
    if dropout is not None:
        weights = weights * dropout.kept(b, h, q_idx, kv_idx) / (1 - dropout.p)
    return (weights @ values).to(q.dtype), lse.float()
