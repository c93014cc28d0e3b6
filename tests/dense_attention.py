"""Attention row by row in float64, from a table of what is kept."""

import math

import torch


def attend_densely(q, k, v, kept, *, scale=None, softcap=0.0, sink=None):
    """Output and LSE of q [heads, q_len, D] and k, v [kv heads, kv_len, ...], as float64.

    kept: bool [heads, q_len, kv_len]
    sink: logits besides the scores of each row, [heads, q_len, n]
    """
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group_size = len(q) // len(k)
    outs, lses = [], []
    for head in range(len(q)):
        its_k, its_v = k[head // group_size], v[head // group_size]
        for row in range(q.shape[1]):
            keys = kept[head, row].nonzero().flatten()
            scores = its_k[keys] @ q[head, row] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            n_keys = len(scores)
            if sink is not None:
                scores = torch.cat([scores, sink[head, row].double()])
            if len(scores):
                lses.append(scores.logsumexp(0))
                outs.append((scores - lses[-1]).exp()[:n_keys] @ its_v[keys])
            else:
                lses.append(q.new_tensor(-math.inf))
                outs.append(v.new_zeros(v.shape[-1]))
    shape = q.shape[:2]
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)


def assert_same(mine, true):
    """Results and gradients in float32 are those in float64, up to float32's rounding."""
    torch.testing.assert_close(mine, true.to(mine.dtype), rtol=1e-5, atol=1e-5)


def gradients(results, inputs, seed=0):
    """Of the sum of results weighted by chance; an infinite LSE weighs nothing."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(0 * x.sum() for x in inputs)  # what no row sees has a gradient of 0
    for x in results:
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        total = total + (x.masked_fill(x.isinf(), 0) * weights).sum()
    return torch.autograd.grad(total, inputs)
