"""The blockwise executor and the dropout mask, against dense attention written out here."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.dropout import Dropout, is_kept
from flexsparse.errors import MaskError
from flexsparse.executors import blockwise, blockwise_schedule, blockwise_scores


@pytest.fixture(autouse=True)
def one_thread():
    """Inputs are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


CAUSAL = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx  # noqa: E731
PER_HEAD = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 40 * (h + 1) + 30 * b  # noqa: E731
ODD_KEYS = lambda b, h, q_idx, kv_idx: kv_idx % 2 == 1  # noqa: E731


def random_lists(batch, heads, q_len, kv_len, block, kept=0.5, seed=0):
    """A class for every block: 0 absent, 1 partial, 2 full; the second row of blocks is empty."""
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-q_len // block[0]), -(-kv_len // block[1]))
    classes = 1 + torch.randint(2, shape, generator=rng)
    classes[torch.rand(shape, generator=rng) > kept] = 0
    classes[:, :, 1:2] = 0
    return classes


def as_block_mask(classes, lengths, block, mask_mod):
    """A BlockMask whose lists are compact overlapping views, with garbage past every count."""

    def lists(present):
        rows, columns = present.shape[2:]
        counts = present.sum(-1)
        width = max(1, int(counts.max()))
        order = torch.argsort(present.byte(), dim=-1, descending=True, stable=True)[..., :width]
        order[torch.arange(width) >= counts[..., None]] = 1 << 20
        storage = torch.full((order.numel() + columns,), 1 << 20, dtype=torch.int32)
        storage[: order.numel()] = order.reshape(-1)
        strides = (present.shape[1] * rows * width, rows * width, width, 1)
        return counts.int(), storage.as_strided(present.shape, strides)

    partial, full = lists(classes == 1), lists(classes == 2)
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    none = dict.fromkeys(
        ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
    )
    values = dict(zip(names, (*partial, *full), strict=True))
    return BlockMask(seq_lengths=lengths, BLOCK_SIZE=block, mask_mod=mask_mod, **values, **none)


def kept_densely(classes, lengths, block, mask_mod, batch, n_heads):
    q_idx, kv_idx = torch.arange(lengths[0])[:, None], torch.arange(lengths[1])
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(n_heads)[:, None, None]
    spread = classes[:, :, q_idx // block[0], kv_idx // block[1]]
    return (spread == 2) | (spread == 1) & mask_mod(b, h, q_idx, kv_idx)


def attend_densely(q, k, v, kept, score_mod=None, scale=None, dropout=None):
    """(out, lse); dropout is (p, seed)."""
    group_size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    index = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *index)
    scores = scores.masked_fill(~kept, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    if dropout is not None:
        weights = weights * is_kept(dropout[1], dropout[0], *index) / (1 - dropout[0])
    return weights @ v, lse


def random_inputs(batch, n_heads, n_kv_heads, q_len, kv_len, d=16, dv=None, dtype=torch.float64):
    shapes = ((n_heads, q_len, d), (n_kv_heads, kv_len, d), (n_kv_heads, kv_len, dv or d))
    return [torch.randn(batch, *s, dtype=dtype, requires_grad=True) for s in shapes]


def gradients(out, lse, inputs):
    """Gradients of a loss that reads out and the lse of every row that has one."""
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    loss = (out * weights).sum() + lse.masked_fill(lse == -math.inf, 0).cos().sum()
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_agrees(inputs, block_mask, kept, dropout=None, score_mod=None, extra=(), scale=None):
    given = {"dropout": dropout and Dropout(*dropout), "score_mod": score_mod, "scale": scale}
    out, lse = blockwise.run(*inputs, block_mask, return_lse=True, **given)
    expected, expected_lse = attend_densely(*inputs, kept, score_mod, scale, dropout)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse.float())
    actual = gradients(out, lse, [*inputs, *extra])
    # the lse is float32 at the door, and so is the gradient that comes back through it
    wanted = gradients(expected, expected_lse.float(), [*inputs, *extra])
    torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-7)


#         (q_len, kv_len) block       B  heads  mask_mod
CASES = [
    ((1, 1), (128, 128), 1, (1, 1), CAUSAL),
    ((127, 127), (128, 128), 2, (2, 2), CAUSAL),
    ((129, 129), (128, 128), 1, (4, 1), CAUSAL),
    ((1000, 1000), (128, 128), 1, (4, 1), CAUSAL),
    ((1000, 640), (128, 128), 2, (2, 2), PER_HEAD),
    ((300, 1000), (64, 64), 2, (4, 1), PER_HEAD),
    ((513, 385), (256, 128), 1, (4, 2), ODD_KEYS),
    ((200, 300), (16, 16), 2, (4, 1), ODD_KEYS),
    ((130, 258), (32, 128), 1, (8, 2), CAUSAL),
]


@pytest.mark.parametrize(("mask_batch", "mask_heads"), [(1, 1), (1, None), (None, 1), (None, None)])
@pytest.mark.parametrize(("lengths", "block", "batch", "heads", "mask_mod"), CASES)
def test_out_lse_and_gradients_agree(
    lengths, block, batch, heads, mask_mod, mask_batch, mask_heads
):
    classes = random_lists(mask_batch or batch, mask_heads or heads[0], *lengths, block)
    kept = kept_densely(classes, lengths, block, mask_mod, batch, heads[0])
    inputs = random_inputs(batch, *heads, *lengths)
    assert_agrees(inputs, as_block_mask(classes, lengths, block, mask_mod), kept)


def reference_case(q_len=200, kv_len=300, block=(32, 64), heads=(4, 2), mask_mod=CAUSAL, **options):
    lengths = (q_len, kv_len)
    classes = random_lists(1, 1, *lengths, block)
    kept = kept_densely(classes, lengths, block, mask_mod, 2, heads[0])
    inputs = random_inputs(2, *heads, *lengths, **options)
    return inputs, as_block_mask(classes, lengths, block, mask_mod), kept


def test_a_long_line_is_merged_piece_by_piece(monkeypatch):
    monkeypatch.setattr(blockwise_schedule, "LONGEST_PIECE", 64)
    monkeypatch.setitem(blockwise_scores.BUDGET, "cpu", 4096)
    assert_agrees(*reference_case(300, 700, (32, 32)))


def test_planes_are_taken_a_few_at_a_time(monkeypatch):
    monkeypatch.setitem(blockwise_scores.BUDGET, "cpu", 1)
    assert_agrees(*reference_case(90, 150, mask_mod=PER_HEAD))


@pytest.mark.parametrize(("d", "dv"), [(1, 3), (20, 7), (64, 128)])
def test_head_dims_are_free(d, dv):
    assert_agrees(*reference_case(d=d, dv=dv))


def test_scale_is_taken():
    assert_agrees(*reference_case(), scale=0.3)


def test_a_row_that_keeps_nothing_gives_zero_and_minus_infinity():
    nothing = lambda b, h, q_idx, kv_idx: q_idx < 0  # noqa: E731
    classes = torch.tensor([[[[1, 1], [0, 0]]]])
    q, k, v = random_inputs(1, 1, 1, 32, 32)
    out, lse = blockwise.run(
        q, k, v, as_block_mask(classes, (32, 32), (16, 16), nothing), return_lse=True
    )
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()
    assert all(grad.eq(0).all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_indices_are_raw_and_inside_the_lengths():
    table = torch.arange(200)[:, None] * 7 % 11 > torch.arange(300) % 10
    looked_up = lambda b, h, q_idx, kv_idx: table[q_idx, kv_idx]  # noqa: E731
    assert_agrees(*reference_case(mask_mod=looked_up))


def test_a_mask_mod_needs_not_broadcast():
    near = lambda b, h, q_idx, kv_idx: torch.stack([q_idx, kv_idx + 9]).amin() == q_idx  # noqa: E731
    plain = lambda b, h, q_idx, kv_idx: q_idx <= kv_idx + 9  # noqa: E731
    inputs, block_mask, kept = reference_case(mask_mod=plain)
    block_mask.mask_mod = near
    assert_agrees(inputs, block_mask, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_as_exact_as_dense_attention_in_it(dtype):
    inputs, block_mask, kept = reference_case(dtype=dtype, d=32)
    out, lse = blockwise.run(*inputs, block_mask, return_lse=True)
    exact = attend_densely(*(x.double() for x in inputs), kept)
    dense = attend_densely(*inputs, kept)
    grads, exact_grads, dense_grads = (gradients(*x, inputs) for x in ((out, lse), exact, dense))
    for x, y, z in zip(
        (out, *grads), (exact[0], *exact_grads), (dense[0], *dense_grads), strict=True
    ):
        assert x.dtype == dtype
        assert (x - y).norm() <= 2 * (z - y).norm() + 1e-6 * y.norm()
    torch.testing.assert_close(lse, exact[1].float(), rtol=1e-5, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    classes = random_lists(1, 2, 7, 9, (4, 2))
    block_mask = as_block_mask(classes, (7, 9), (4, 2), CAUSAL)
    run = lambda q, k, v: blockwise.run(q, k, v, block_mask, dropout=Dropout(0.2, 1))[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, random_inputs(1, 2, 1, 7, 9, d=3, dv=2))


def test_torch_func_gives_the_same_gradients():
    inputs, block_mask, _ = reference_case()

    def loss(q, k, v):
        out, lse = blockwise.run(q, k, v, block_mask, return_lse=True)
        return out.sin().sum() + lse.masked_fill(lse == -math.inf, 0).sum()

    mine = torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in inputs))
    torch.testing.assert_close(mine, torch.autograd.grad(loss(*inputs), inputs))


def test_score_mod_gives_gradients_to_what_it_captures():
    bias = torch.randn(4, 500, dtype=torch.float64, requires_grad=True)
    doubled, slope = bias * 2, torch.rand(4, dtype=torch.float64, requires_grad=True)

    def score_mod(score, b, h, q_idx, kv_idx):
        return 5 * torch.tanh(score / 5) * slope[h] + doubled[h, q_idx - kv_idx + 299]

    assert_agrees(*reference_case(), score_mod=score_mod, extra=(bias, slope))


def test_score_mod_may_be_nan_where_nothing_is_kept():
    log_distance = lambda s, b, h, q_idx, kv_idx: s - (q_idx - kv_idx + 1).log()  # noqa: E731
    classes = torch.tensor([[[[1, 0], [2, 1]]]])
    block_mask = as_block_mask(classes, (64, 64), (32, 32), CAUSAL)
    out, _ = blockwise.run(*random_inputs(1, 2, 1, 64, 64), block_mask, score_mod=log_distance)
    assert out.isfinite().all()


SOFTCAP = lambda s, b, h, q_idx, kv_idx: 5 * torch.tanh(s / 5)  # noqa: E731


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score_mod", [None, SOFTCAP])
def test_a_hidden_key_may_hold_anything(poison, score_mod):
    in_cache = lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (kv_idx < 200)  # noqa: E731
    inputs, block_mask, kept = reference_case(300, 300, (64, 64), mask_mod=in_cache)
    block_mask.full_kv_num_blocks.zero_()
    kept &= torch.arange(300) < 200

    def results(q, k, v):
        out, lse = blockwise.run(q, k, v, block_mask, score_mod=score_mod, return_lse=True)
        return out, lse, *gradients(out, lse, (q, k, v))

    q, k, v = inputs
    poisoned = k.detach().clone()
    poisoned[:, :, 200:] = poison
    torch.testing.assert_close(results(q, poisoned.requires_grad_(), v), results(q, k, v))


def padded(value):
    """A score_mod that pads as models do: these rows have one score everywhere."""
    return lambda s, b, h, q_idx, kv_idx: torch.where(q_idx < 100, value, s)


def test_the_lowest_float_is_a_score_like_others():
    (q, k, v), block_mask, all_kept = reference_case(dtype=torch.float32)
    low = padded(torch.finfo(torch.float32).min)
    out, lse = blockwise.run(q, k, v, block_mask, score_mod=low, return_lse=True)
    kept = all_kept[:, :, :100].float()
    even = kept / kept.sum(-1, keepdim=True).clamp(min=1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out[:, :, :100], even)
    torch.testing.assert_close(lse, attend_densely(q, k, v, all_kept, low)[1])


def test_a_row_of_scores_of_minus_infinity_keeps_nothing():
    inputs, block_mask, _ = reference_case(dtype=torch.float32)
    nothing = padded(-math.inf)
    out, lse = blockwise.run(*inputs, block_mask, score_mod=nothing, return_lse=True)
    assert out[:, :, :100].eq(0).all()
    assert lse[:, :, :100].eq(-math.inf).all()


def test_a_hidden_score_of_any_size_stays_hidden():
    q = torch.full((1, 1, 4, 1), 1e16)
    k = torch.tensor([1.0, 1, 1, 1e16]).view(1, 1, 4, 1)
    v = torch.tensor([1.0, 1, 1, 99]).view(1, 1, 4, 1)
    block_mask = as_block_mask(torch.ones(1, 1, 1, 1).int(), (4, 4), (128, 128), CAUSAL)
    out, _ = blockwise.run(q, k, v, block_mask)
    assert out.flatten().tolist() == [1, 1, 1, 99]


def test_gradients_of_large_scores_are_as_exact_as_those_of_dense_attention():
    inputs, block_mask, kept = reference_case(dtype=torch.float32)
    large = lambda s, b, h, q_idx, kv_idx: s + 1e5  # noqa: E731
    exact = softmax_densely(*(x.double() for x in inputs), kept, 1e5)
    dense = softmax_densely(*inputs, kept, 1e5)
    out, _ = blockwise.run(*inputs, block_mask, score_mod=large)
    exact, dense, mine = (
        torch.autograd.grad(x.square().sum(), inputs[2])[0] for x in (exact, dense, out)
    )
    assert (mine - exact).norm() <= 2 * (dense - exact).norm()


def softmax_densely(q, k, v, kept, shift):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5 + shift).masked_fill(~kept, -1e30)
    return scores.softmax(-1) * kept @ v


@pytest.mark.parametrize("p", [0.0, 0.17, 0.9])
def test_dropout_agrees_with_dropping_dense_weights(p):
    assert_agrees(*reference_case(), dropout=(p, 12345))
    assert_agrees(*reference_case(heads=(4, 4), mask_mod=PER_HEAD), dropout=(p, 2**61 + 7))


def test_dropout_without_a_seed_follows_manual_seed():
    inputs, block_mask, _ = reference_case()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(blockwise.run(*inputs, block_mask, dropout=Dropout.of(0.5, None))[0])
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(outs[2])


def kept_grid(seed=0, p=0.25, heads=8, length=512, **options):
    h, q_idx = torch.arange(heads)[:, None, None], torch.arange(length)[:, None]
    return is_kept(seed, p, 0, h, q_idx, torch.arange(length), **options)


@pytest.mark.parametrize("p", [0.01, 0.17, 0.5, 0.9])
def test_dropout_keeps_the_rate(p):
    kept = kept_grid(p=p, length=1024).double()
    deviation = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / math.sqrt(kept.numel())
    # rows and columns too: their counts have the variance of independent draws
    for counts in (kept.sum(-1), kept.sum(-2)):
        chi_square = ((counts - 1024 * (1 - p)) ** 2).sum() / (1024 * deviation**2)
        assert abs(chi_square - counts.numel()) < 5 * math.sqrt(2 * counts.numel())


SHIFTS = [
    ("next key", lambda x: (x[..., 1:], x[..., :-1])),
    ("two keys on", lambda x: (x[..., 2:], x[..., :-2])),
    ("64 keys on", lambda x: (x[..., 64:], x[..., :-64])),
    ("next query", lambda x: (x[:, 1:], x[:, :-1])),
    ("diagonal", lambda x: (x[:, 1:, 1:], x[:, :-1, :-1])),
    ("next head", lambda x: (x[1:], x[:-1])),
    ("transposed", lambda x: (x, x.mT)),
]


@pytest.mark.parametrize("shift", [x[1] for x in SHIFTS], ids=[x[0] for x in SHIFTS])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_neighbours_is_independent(shift, p):
    a, b = shift(kept_grid(seed=3, p=p).double() - (1 - p))
    correlation = (a * b).mean() / (p * (1 - p))
    assert abs(correlation) < 5 / math.sqrt(a.numel() / 2)


@pytest.mark.parametrize("other", [1, 2, 1 << 31, 1 << 32, 1 << 61, -1])
def test_dropout_of_seeds_is_independent(other):
    a, b = (kept_grid(seed=seed, p=0.5).double() - 0.5 for seed in (0, other))
    assert abs((a * b).mean() * 4) < 5 / math.sqrt(a.numel())


def test_words_of_eight_neighbouring_keys_are_equally_likely():
    bits = kept_grid(p=0.5).unflatten(-1, (-1, 8)).long()
    words = (bits * 2 ** torch.arange(8)).sum(-1)
    counts = torch.bincount(words.reshape(-1), minlength=256).double()
    expected = words.numel() / 256
    assert abs(((counts - expected) ** 2).sum() / expected - 255) < 5 * math.sqrt(2 * 255)


def test_one_row_drops_unlike_every_other():
    kept = kept_grid(seed=9, p=0.5, heads=4, length=1024).flatten(0, 1).float() - 0.5
    correlation = (kept @ kept.mT / kept.shape[1] * 4).fill_diagonal_(0)
    # 8 million pairs: a normal tail of 6.5 deviations is never met
    assert correlation.abs().max() < 6.5 / math.sqrt(1024)


@pytest.mark.parametrize("seed", [0, 5, 2**62 + 3, -7])
def test_dropout_has_the_same_bits_in_every_width(seed):
    wide = kept_grid(seed=seed)
    assert wide.equal(kept_grid(seed=seed, width=torch.int32))
    assert wide.equal(kept_grid(seed=torch.tensor(seed)))
    far = torch.tensor([2**31 - 1, 2**32 - 1])
    assert is_kept(seed, 0.5, 0, 0, far, far).equal(
        is_kept(seed, 0.5, 0, 0, far, far, width=torch.int32)
    )


@pytest.mark.slow
def test_compiled_dropout_has_the_same_bits():
    index = torch.meshgrid(*map(torch.arange, (1, 2, 64, 64)), indexing="ij")
    compiled = torch.compile(lambda seed, *index: is_kept(seed, 0.3, *index))
    assert compiled(torch.tensor(2**61 + 5), *index).equal(is_kept(2**61 + 5, 0.3, *index))


def test_dropout_bits_never_change():
    # a change of these is a change of every run with a seed
    kept = is_kept(42, 0.5, 1, 2, torch.tensor(3), torch.arange(16))
    assert "".join(str(int(x)) for x in kept) == "1110101100110001"


def test_dropout_drops_scores_as_a_score_mod():
    doubled = lambda score, b, h, q_idx, kv_idx: score * 2  # noqa: E731
    dropout = Dropout(0.3, 7).of_heads([5, 2], torch.device("cpu"))
    b, h, q_idx, kv_idx = torch.meshgrid(*map(torch.arange, (2, 2, 40, 50)), indexing="ij")
    score = dropout.dropping(doubled, q_idx.device)(torch.ones(()), b, h, q_idx, kv_idx)
    kept = is_kept(7, 0.3, b, torch.tensor([5, 2])[h], q_idx, kv_idx)
    assert score.equal(torch.where(kept, 2.0, -math.inf))


def test_a_whole_graph_is_refused_in_a_sentence():
    inputs, block_mask, _ = reference_case()
    run = torch.compile(blockwise.run, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="runs between graphs: drop fullgraph=True"):
        run(*inputs, block_mask)


@pytest.mark.parametrize("p", [1.0, -0.1, math.nan])
def test_dropout_outside_its_range_is_refused(p):
    with pytest.raises(MaskError, match=rf"dropout_p={p} .* 0 <= dropout_p < 1"):
        Dropout.of(p, None)


def test_what_cannot_run_says_why():
    (q, k, v), block_mask, _ = reference_case()
    assert blockwise.unsupported(q, k, v, block_mask.BLOCK_SIZE) is None
    q = q.long()
    assert "q is torch.int64; it takes" in blockwise.unsupported(q, k, v, (128, 128))
    big = torch.empty(1, 1, 1 << 13, 8, device="cpu")
    reason = blockwise.unsupported(big, big, big, (1 << 30, 1 << 30))
    assert "compile the mask with block_size=128" in reason
