"""Block-Sparse-Attention's own test grid, against its rules written out densely.

The rules, the attention and the criterion share no code with flexsparse. The whole grid is

    python tests/block_sparse_grid.py [--device cuda] [--heads 16] [--shard 1/4]

test_block_sparse_attn.py takes a sample of it in which every two values of two axes meet.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from typing import NamedTuple

import torch

from flexsparse.compat.block_sparse_attn import block_sparse_attn_func

BLOCK = 128


class Case(NamedTuple):
    lengths: tuple[int, int]  # the longest sequence of q, of k
    pattern: tuple[bool, bool, int, int]  # causal, exact_streaming, sink, local
    density: float
    dtype: torch.dtype
    kv_heads: str
    head_dim: int
    batch: int
    dropout: float

    def __str__(self) -> str:
        causal, exact, sink, local = self.pattern
        kind = ("exact" if exact else "causal" if causal else "full") + f"-{sink}-{local}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.lengths[0]}x{self.lengths[1]}-{kind}-density{self.density}-{dtype}-"
            f"{self.kv_heads}-D{self.head_dim}-B{self.batch}-drop{self.dropout}"
        )


LONG = (2048, 2048)
AXES = Case(
    lengths=[
        (113, 203),
        (128, 217),
        (113, 211),
        (108, 256),
        (256, 512),
        (512, 256),
        (1024, 1024),
        (1023, 1024),
        (1024, 1023),
    ],
    pattern=[(True, True, 1, 3), (True, True, 64, 256), (True, False, 1, 3), (False, False, 1, 3)],
    density=[0, 0.1, 0.3, 0.7, 1.0],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    kv_heads=["mha", "mqa", "gqa"],
    head_dim=[32, 64, 128],
    batch=[1, 2],
    dropout=[0.0, 0.17],
)


def whole_grid() -> list[Case]:
    with_long = AXES._replace(lengths=[*AXES.lengths, LONG])
    return [Case(*values) for values in itertools.product(*with_long)]


def all_pairs(axes: Case) -> list[Case]:
    """Few cases in which every two values of two axes occur together; always the same ones."""
    rng = random.Random(0)
    columns = range(len(axes))
    open_pairs = {
        (i, a, j, b)
        for i, j in itertools.combinations(columns, 2)
        for a in range(len(axes[i]))
        for b in range(len(axes[j]))
    }
    chosen = []
    while open_pairs:
        # the best of a few cases that each start from an open pair
        best, best_found = None, set()
        for i, a, j, b in rng.sample(sorted(open_pairs), min(10, len(open_pairs))):
            case = [rng.randrange(len(axis)) for axis in axes]
            case[i], case[j] = a, b
            pairs = itertools.combinations(enumerate(case), 2)
            found = {(*first, *second) for first, second in pairs} & open_pairs
            if len(found) > len(best_found):
                best, best_found = case, found
        open_pairs -= best_found
        chosen.append(Case(*(axis[place] for axis, place in zip(axes, best, strict=True))))
    return chosen


def kept_densely(kind, q_len, kv_len, *, causal, exact, sink, local, blocks=None):
    """Bool [q_len, kv_len]: which keys a query of a head of this kind sees, by the rules alone."""
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)
    ahead = kv_len - q_len
    before = k <= q + ahead if causal else torch.ones(q_len, kv_len, dtype=torch.bool)
    if kind == 0:
        return before
    if kind == 1:
        return before & blocks[q // BLOCK, k // BLOCK]
    if exact:
        return before & ((k < sink) | (k >= q + ahead - (local - 1)))
    if not causal:
        n_blocks = math.ceil(kv_len / BLOCK)
        return ((k // BLOCK < sink) | (k // BLOCK >= n_blocks - local)).expand(q_len, kv_len)
    skipped = max((q_len - kv_len) // BLOCK, 0)
    last = math.ceil(max(ahead, 0) / BLOCK) + 1 + q // BLOCK - skipped
    near = (last - local <= k // BLOCK) & (k // BLOCK < last)
    return before & ((k // BLOCK < sink) | near) & (q // BLOCK >= skipped)


def attend_densely(q, k, v, kept, dropped, p, dtype):
    """One sequence: q [q_len, heads, D], kept [heads, q_len, kv_len] -> (out, lse) in a dtype."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(1, 2)
    sees_any = kept.any(-1, keepdim=True)
    weights = scores.masked_fill(~kept & sees_any, -math.inf).softmax(-1) * kept
    if dropped is not None:
        weights = weights * ~dropped / (1 - p)
    lse = scores.masked_fill(~kept, -math.inf).logsumexp(-1)
    return (weights @ v).transpose(0, 1), lse.masked_fill(~sees_any[..., 0], math.inf)


def random_blocks(batch, heads, rows, columns, density, causal, generator):
    """Their masks: a share of the blocks a row may see, at least one, on the diagonal or not."""
    mask = torch.zeros(batch, heads, rows, columns, dtype=torch.bool)
    if density == 0:
        return mask
    for b, h, row in itertools.product(range(batch), range(heads), range(rows)):
        available = min(columns, max(0, row + 1 + columns - rows)) if causal else columns
        count = available if density == 1 else min(available, max(1, int(density * available)))
        mask[b, h, row, torch.randperm(available, generator=generator)[:count]] = True
    return mask


def check(case: Case, n_heads: int = 6, device: str = "cpu") -> None:
    """Raise AssertionError unless out, lse and gradients of a case are right."""
    generator = torch.Generator().manual_seed(42)
    torch.manual_seed(42)
    causal, exact, sink, local = case.pattern
    n_kv_heads = {"mha": n_heads, "mqa": 1, "gqa": 8 if n_heads % 8 == 0 else n_heads // 3}
    lens = [
        [n - int(torch.randint(20, (), generator=generator)) for _ in range(case.batch)]
        for n in case.lengths
    ]
    q, k, v = (
        torch.randn(sum(n), heads, case.head_dim, generator=generator)
        .to(device, case.dtype)
        .requires_grad_()
        for n, heads in (
            (lens[0], n_heads),
            (lens[1], n_kv_heads[case.kv_heads]),
            (lens[1], n_kv_heads[case.kv_heads]),
        )
    )
    third = n_heads // 3
    types = [0] * (n_heads - 2 * third) + [1] * third + [-1] * third
    max_q, max_k = (max(n) for n in lens)
    rows, columns = math.ceil(max_q / BLOCK), math.ceil(max_k / BLOCK)
    blocks = random_blocks(case.batch, third, rows, columns, case.density, causal, generator)
    cu_seqlens = (torch.tensor([0, *n]).cumsum(0).int().to(device) for n in lens)
    out, lse, pattern = block_sparse_attn_func(
        q,
        k,
        v,
        *cu_seqlens,
        torch.tensor(types, dtype=torch.int32, device=device),
        torch.tensor([sink, local] * n_heads, dtype=torch.int32, device=device),
        blocks.to(device),
        max_q,
        max_k,
        case.dropout,
        deterministic=True,
        is_causal=causal,
        exact_streaming=exact,
        return_attn_probs=True,
    )
    if case.dropout:
        share = (pattern == -1).sum() / (pattern != 0).sum()
        assert abs(float(share) - case.dropout) < 0.01, f"dropped {share}"

    exact_dtype = torch.float64 if case.dtype == torch.float32 else torch.float32
    results = {exact_dtype: [], case.dtype: []}
    parts = zip(
        *(x.split(n) for x, n in zip((q, k, v), (*lens, lens[1]), strict=True)), strict=True
    )
    for i, part in enumerate(parts):
        q_len, kv_len = lens[0][i], lens[1][i]
        rule = {"causal": causal, "exact": exact, "sink": sink, "local": local}
        kept = [
            kept_densely(kind, q_len, kv_len, blocks=blocks[i, types[:h].count(1) % third], **rule)
            for h, kind in enumerate(types)
        ]
        kept = torch.stack(kept).to(device)
        dropped = pattern[i, :, :q_len, :kv_len] < 0 if case.dropout else None
        for dtype, found in results.items():
            found.append(attend_densely(*part, kept, dropped, case.dropout, dtype))
        expected_lse = results[exact_dtype][-1][1]
        assert_close(lse[i, :, :q_len], expected_lse, "lse")
        assert (lse[i, :, q_len:] == math.inf).all()
        empty = ~kept.any(-1).T
        assert not out[sum(lens[0][:i]) :][:q_len][empty].any(), "a row without keys is not 0"

    right, low = (torch.cat([out for out, _ in found]) for found in results.values())
    assert_no_worse(out, right, low, 2, "out")
    weights = torch.randn(out.shape, generator=generator).to(device)
    gradients = [
        torch.autograd.grad(x, (q, k, v), weights.to(x.dtype), retain_graph=True)
        for x in (out, right, low)
    ]
    for name, found, expected, in_low in zip("qkv", *gradients, strict=True):
        assert_no_worse(found, expected, in_low, 3, f"the gradient of {name}")


def assert_close(found, expected, what):
    assert torch.equal(found.isinf(), expected.isinf()), f"{what}: rows without keys differ"
    torch.testing.assert_close(found, expected.float())


def assert_no_worse(found, expected, in_low, times, what):
    """Their criterion: the largest error is at most a few times that of low precision."""
    error, bound = ((x.double() - expected.double()).abs().max() for x in (found, in_low))
    assert error <= times * bound, f"{what}: error {error:.2e}, in low precision {bound:.2e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--heads", type=int, default=6, help="theirs are 16 and 32")
    parser.add_argument("--shard", default="1/1", help="the part of the grid, such as 1/4")
    options = parser.parse_args()
    part, parts = map(int, options.shard.split("/"))
    cases = whole_grid()[part - 1 :: parts]
    failed = []
    for i, case in enumerate(cases):
        try:
            check(case, options.heads, options.device)
        except AssertionError as error:
            failed.append(case)
            print(f"{case}: {error}", flush=True)
        if i % 100 == 99:
            print(f"{i + 1} of {len(cases)} cases, {len(failed)} failed", flush=True)
    print(f"{len(cases)} cases, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
