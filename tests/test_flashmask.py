"""FlashMask's flashmask_attention on flexsparse."""

import inspect
import itertools

import pytest
import torch
from dense_attention import assert_same, attend_densely, gradients

from flexsparse import MaskError
from flexsparse.compat import flashmask as theirs
from flexsparse.compat.flashmask import flashmask_attention

SIGNATURE = (
    "query, key, value, startend_row_indices=None, *, dropout=0.0, causal=False, "
    "window_size=None, return_softmax_lse=False, return_seed_offset=False, "
    "fixed_seed_offset=None, rng_name='', training=True, name=None, softmax_scale=None, "
    "block_mask=None, use_varlen=False, learnable_sink=None, group=None"
)


def test_names_order_and_defaults_are_theirs():
    parameters = inspect.signature(flashmask_attention).parameters.values()
    plain = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]
    assert str(inspect.Signature(plain)) == f"({SIGNATURE})"


def kept_of(indices, causal, batch, n_heads, q_len, kv_len):
    """flashmask_to_densemask of their tests: [B, n_heads, q_len, kv_len]."""
    kept = torch.ones(batch, n_heads, q_len, kv_len, dtype=torch.bool)
    for b, head, key in itertools.product(range(batch), range(n_heads), range(kv_len)):
        column = kept[b, head, :, key]
        if indices is not None:
            heads = indices.shape[1]
            numbers = indices[b % len(indices), head * heads // n_heads, key].tolist()
            has_end = len(numbers) == (2 if causal else 4)
            column[numbers[0] : numbers[1] if has_end else None] = False
            if not causal:
                column[slice(*numbers[2:]) if has_end else slice(numbers[1])] = False
        if causal:
            column[: max(0, key - (kv_len - q_len))] = False
    return kept


def random_indices(batch, heads, q_len, kv_len, n_numbers, causal):
    """Rows from which on, or up to which, keys are hidden; some keys from all rows."""
    rows = torch.randint(0, q_len + 1, (batch, heads, kv_len, n_numbers), dtype=torch.int32)
    if n_numbers == 2 and not causal:  # hidden from the later one on, and up to the earlier
        return rows.sort(-1, descending=True)[0].contiguous()
    return rows.sort(-1)[0].contiguous()


def inputs(batch, q_len, kv_len, n_heads=2, n_kv_heads=1, dim=16, dim_v=8):
    shapes = ((q_len, n_heads, dim), (kv_len, n_kv_heads, dim), (kv_len, n_kv_heads, dim_v))
    return [torch.randn(batch, *shape, requires_grad=True) for shape in shapes]


def expected(query, key, value, kept, sink=None, **options):
    rows = []
    for row, its_kept in zip(zip(query, key, value, strict=True), kept, strict=True):
        q, k, v = (x.transpose(0, 1) for x in row)
        its_sink = None if sink is None else sink[:, None, None].expand(-1, q.shape[1], 1)
        rows.append(attend_densely(q, k, v, its_kept, sink=its_sink, **options))
    outs, lses = zip(*rows, strict=True)
    return torch.stack(outs).transpose(1, 2), torch.stack(lses)


def check(given, kept, *indices, wanted_options=None, more=(), **options):
    """Output, LSE and gradients are those of dense attention."""
    out, lse = flashmask_attention(*given, *indices, return_softmax_lse=True, **options)
    wanted = expected(*given, kept, **(wanted_options or {}))
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert_same(out, wanted[0])
    assert_same(lse, wanted[1])
    mine = gradients((out, lse), [*given, *more])
    for x, true in zip(mine, gradients(wanted, [*given, *more]), strict=True):
        assert_same(x, true)


@pytest.mark.parametrize(("causal", "n_numbers"), [(True, 1), (True, 2), (False, 2), (False, 4)])
@pytest.mark.parametrize(
    ("batch", "heads", "q_len", "kv_len"),
    [(1, 1, 140, 140), (2, 1, 60, 133), (2, 2, 133, 60), (1, 4, 50, 50)],
)
def test_indices_hide_rows(causal, n_numbers, batch, heads, q_len, kv_len):
    """One head of indices for all, those of key, and those of query."""
    given = inputs(batch, q_len, kv_len, n_heads=4, n_kv_heads=2)
    indices = random_indices(batch, heads, q_len, kv_len, n_numbers, causal)
    kept = kept_of(indices, causal, batch, 4, q_len, kv_len)
    check(given, kept, indices, causal=causal)


def test_rows_without_keys_are_zero():
    given = inputs(1, 20, 20)
    indices = torch.full((1, 1, 20, 1), 12, dtype=torch.int32)
    out, lse = flashmask_attention(*given, indices, causal=True, return_softmax_lse=True)
    assert not out[:, 12:].any()
    assert (lse[..., 12:] == -torch.inf).all()
    assert out[:, :12].any(-1).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [0, 7, (3, 0), (0, 11), (500, 2)], ids=str)
def test_a_window_reaches_to_both_sides(causal, size):
    left, right = (size, size) if isinstance(size, int) else size
    given = inputs(2, 60, 60)
    kept = torch.zeros(60, 60, dtype=torch.bool)
    for row in range(60):
        last = row if causal else row + right
        kept[row, max(row - left, 0) : last + 1] = True
    check(given, kept.expand(2, 2, -1, -1), causal=causal, window_size=size)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "kv_len"), [(30, 30), (20, 41), (41, 20)])
def test_without_indices_it_is_dense(causal, q_len, kv_len):
    given = inputs(2, q_len, kv_len)
    check(given, kept_of(None, causal, 2, 2, q_len, kv_len), causal=causal, softmax_scale=None)


def test_the_scale_is_theirs():
    given = inputs(1, 30, 30)
    indices = random_indices(1, 1, 30, 30, 1, True)
    kept = kept_of(indices, True, 1, 2, 30, 30)
    options = {"wanted_options": {"scale": 0.7}, "softmax_scale": 0.7}
    check(given, kept, indices, causal=True, **options)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_block_masks_keep_blocks_of_128(heads):
    given = inputs(2, 150, 260, n_heads=4, n_kv_heads=2)
    indices = random_indices(2, 2, 150, 260, 1, True)
    blocks = torch.randint(0, 2, (2, heads, 2, 3), dtype=torch.int32)
    blocks[1, :, 0] = 0  # rows without keys
    kept = kept_of(indices, True, 2, 4, 150, 260)
    for b, head, row, column in itertools.product(range(2), range(4), range(2), range(3)):
        if not blocks[b, head * heads // 4, row, column]:
            rows, columns = (slice(128 * i, 128 * i + 128) for i in (row, column))
            kept[b, head, rows, columns] = False
    check(given, kept, indices, causal=True, block_mask=blocks)


def test_sinks_are_scores_without_a_value():
    given = inputs(2, 60, 50, n_heads=4, n_kv_heads=2)
    indices = random_indices(2, 2, 60, 50, 4, False)
    indices[0, :, :, 1] = 60
    indices[0, :, :, 0] = 40  # rows 40 to 59 see nothing
    sink = torch.randn(4, requires_grad=True)
    kept = kept_of(indices, False, 2, 4, 60, 50)
    assert not kept[0, :, 40:].any()
    options = {"wanted_options": {"sink": sink}, "more": [sink], "learnable_sink": sink}
    check(given, kept, indices, **options)


def test_dropout_is_that_of_its_seed_and_only_while_training():
    given = inputs(1, 200, 200)
    plain = flashmask_attention(*given, causal=True)
    options = {"causal": True, "dropout": 0.5, "return_seed_offset": True}
    out, drawn = flashmask_attention(*given, **options)
    other, others = flashmask_attention(*given, **options)
    again, same = flashmask_attention(*given, fixed_seed_offset=drawn, **options)
    moved, _ = flashmask_attention(
        *given, fixed_seed_offset=drawn + torch.tensor([0, 1]), **options
    )
    assert (drawn.shape, drawn.dtype) == ((2,), torch.int64)
    assert torch.equal(out, again)
    assert torch.equal(drawn, same)
    assert not torch.equal(drawn, others)
    assert not torch.equal(out, other)
    assert not torch.equal(out, moved)
    # row 0 sees one key: it is kept and doubled, or dropped
    first = {0.0, *(2 * plain[0, 0]).flatten().tolist()}
    assert set(out[0, 0].flatten().tolist()) <= first
    idle = flashmask_attention(*given, causal=True, dropout=0.5, training=False)
    assert torch.equal(idle, plain)


def test_what_is_asked_for_is_returned():
    given = inputs(1, 20, 20)
    assert isinstance(flashmask_attention(*given), torch.Tensor)
    state = torch.get_rng_state()
    found = flashmask_attention(*given, return_softmax_lse=True, return_seed_offset=True)
    assert [tuple(x.shape) for x in found] == [(1, 20, 2, 8), (1, 2, 20), (2,)]
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn where nothing drops
    ignored = {"name": "attention", "use_varlen": True}
    assert torch.equal(flashmask_attention(*given, **ignored), flashmask_attention(*given))


def test_the_plan_of_equal_indices_is_kept_and_that_of_others_is_not_taken():
    given = inputs(2, 40, 40)
    indices = random_indices(2, 1, 40, 40, 1, True)
    before = indices.clone()
    theirs._plan.cache_clear()
    out = flashmask_attention(*given, indices, causal=True)
    again = flashmask_attention(*given, before, causal=True)
    assert torch.equal(out, again)
    assert theirs._plan.cache_info()[:2] == (1, 1)
    indices.copy_(indices.flip(2))  # the same numbers elsewhere, in the same tensor
    check(given, kept_of(indices, True, 2, 2, 40, 40), indices, causal=True)
    assert theirs._plan.cache_info()[:2] == (1, 2)
    indices.copy_(before)
    assert torch.equal(out, flashmask_attention(*given, indices, causal=True))
    assert theirs._plan.cache_info()[:2] == (2, 2)


def test_indices_of_one_hash_are_told_apart():
    given = inputs(1, 40, 40)
    indices = torch.full((1, 1, 40, 1), 20, dtype=torch.int32)
    others = indices.clone()
    others[0, 0, :2, 0] += torch.tensor([2, -1])  # the second number counts twice
    cpu = torch.device("cpu")
    assert len({hash(theirs.ByValue("indices", x, cpu)) for x in (indices, others)}) == 1
    for x in (indices, others):
        check(given, kept_of(x, True, 1, 2, 40, 40), x, causal=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_batch_rows_and_heads_that_are_alike_share_their_blocks(axis):
    one = random_indices(1, 1, 40, 40, 1, True)
    theirs._plan.cache_clear()
    given = inputs(2, 40, 40, n_heads=2, n_kv_heads=2)
    indices = one.repeat(2, 1, 1, 1) if axis == 0 else one.repeat(2, 2, 1, 1)
    check(given, kept_of(indices, True, 2, 2, 40, 40), indices, causal=True)
    sizes = theirs.Sizes(2, 40, 40, 2, 2)
    key = theirs.ByValue("startend_row_indices", indices, torch.device("cpu"))
    plan = theirs._plan(key, None, True, None, sizes, torch.device("cpu"))
    assert theirs._plan.cache_info().misses == 1
    assert plan.block_mask.shape[:2] == (1, 1)


def test_a_compiler_above_calls_it():
    given, indices = inputs(1, 40, 40), random_indices(1, 1, 40, 40, 1, True)
    compiled = torch.compile(lambda *x: flashmask_attention(*x, causal=True) * 2, backend="eager")
    assert torch.equal(
        compiled(*given, indices), flashmask_attention(*given, indices, causal=True) * 2
    )


ROWS = torch.full((1, 1, 20, 1), 20, dtype=torch.int32)
INDICES = {"startend_row_indices": ROWS}
BLOCKS = torch.ones(1, 1, 1, 1, dtype=torch.int32)
WRONG = {
    "a list": ({"startend_row_indices": [1]}, r"startend_row_indices = list"),
    "floats": ({"startend_row_indices": ROWS.float()}, "must be an integer tensor"),
    "three dimensions": ({"startend_row_indices": ROWS[0]}, r"\[B, heads, kv_len, numbers\]"),
    "keys": (
        {"startend_row_indices": ROWS[:, :, 1:]},
        r"\(1, 1, 19, 1\); it must be \[2, heads, 20",
    ),
    "batch": ({"startend_row_indices": ROWS.expand(3, -1, -1, -1)}, r"\(3, 1, 20, 1\)"),
    "heads": ({"startend_row_indices": ROWS.expand(-1, 3, -1, -1)}, r"heads 1, 2 .*or 4"),
    "numbers": ({**INDICES, "causal": False}, "got 1 numbers for each key; it must have 2 or 4"),
    "on meta": ({"startend_row_indices": ROWS.to("meta")}, "on meta"),
    "causal": ({"causal": 1}, "causal must be True or False"),
    "window and indices": ({**INDICES, "window_size": 3}, "takes one of them"),
    "endless window": ({"window_size": (-1, 0)}, r"window_size=\(-1, 0\); both sides must be 0"),
    "window of three": ({"window_size": (1, 2, 3)}, r"must be an int, or \(left, right\)"),
    "window of a float": ({"window_size": 2.5}, "window_size=2.5"),
    "window of a chunk": ({"window_size": 3, "query": torch.randn(2, 19, 4, 8)}, "as many of both"),
    "blocks": ({"block_mask": BLOCKS.expand(1, 1, 2, 1)}, r"it must be \[2, heads, 1, 1\]"),
    "block numbers": ({"block_mask": BLOCKS * 2}, "block_mask holds 2; it must hold 0 and 1"),
    "float blocks": ({"block_mask": BLOCKS.float()}, "block_mask = torch.float32"),
    "dropout": ({"dropout": 1.0}, "dropout_p=1.0"),
    "seed": ({"fixed_seed_offset": torch.zeros(3).int()}, r"\[seed, offset\]"),
    "seed of a number": ({"fixed_seed_offset": 3}, "fixed_seed_offset = int"),
    "rng_name": ({"rng_name": "mine"}, "rng_name='mine': torch's generators have no names"),
    "group": ({"group": object()}, "gather them first"),
    "sink": ({"learnable_sink": torch.ones(2)}, r"learnable_sink is .*\[n_heads=4\]"),
    "scale": ({"softmax_scale": "a"}, "scale='a'"),
    "packed": ({"query": torch.randn(20, 4, 8)}, r"query is \(20, 4, 8\)"),
    "kv heads": ({"query": torch.randn(2, 20, 3, 8)}, "query has 3 heads, not a multiple of the 2"),
    "rows": ({"query": torch.randn(1, 20, 4, 8)}, "batch rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_in_a_sentence(name):
    changes, message = WRONG[name]
    query, key, value = inputs(2, 20, 20, 4, 2, dim=8)
    given = {"query": query, "key": key, "value": value, "causal": True} | changes
    with pytest.raises(MaskError, match=message):
        flashmask_attention(**given)
