import pickle

import mask_mods
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_mods import IDIOMS, OPAQUE, PUBLISHED
from oracles import dense, grids, masks
from torch.nn.attention.flex_attention import create_mask

from flexsparse import MaskError, compile_mask, h, kv_idx, per_head, q_idx
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import classify
from flexsparse.analysis.interval import INTERVAL_READING, Interval
from flexsparse.analysis.validate import problem
from flexsparse.masks import causal, window
from flexsparse.parser import parse
from flexsparse.tracing import from_mask_mod

CPU = torch.device("cpu")


def everywhere(mask, case):
    heads = tuple(range(case.heads or 1))
    grid = Grid(case.q_len, case.kv_len, 0, (64, 64), case.batch or 1, heads)
    return dense(mask, grid)


def by_torch(case):
    return create_mask(case.mask_mod, case.batch, case.heads, case.q_len, case.kv_len, "cpu")


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_a_published_mask_mod_is_traced_whole_and_equal(case):
    mask = from_mask_mod(case.mask_mod)
    assert mask.opaque_operators == ()
    assert torch.equal(everywhere(mask, case), by_torch(case))


@pytest.mark.parametrize("name", IDIOMS)
def test_an_idiom_is_traced_whole_and_equal(name):
    case = mask_mods.Case(name, IDIOMS[name], batch=1, heads=3)
    mask = from_mask_mod(case.mask_mod)
    assert mask.opaque_operators == ()
    assert torch.equal(everywhere(mask, case), by_torch(case))


@pytest.mark.parametrize("name", OPAQUE)
def test_an_operator_without_a_rule_is_exact_and_named(name):
    mask_mod, operators = OPAQUE[name]
    case = mask_mods.Case(name, mask_mod, 300, 200)
    mask = from_mask_mod(mask_mod)
    assert set(mask.opaque_operators) == operators
    assert all(f"opaque<{operator}>" in str(mask) for operator in operators)
    assert torch.equal(everywhere(mask, case), by_torch(case))
    assert bool(mask(*map(torch.tensor, (0, 0, 7, 3)))) == bool(by_torch(case)[0, 0, 7, 3])


@pytest.mark.parametrize("name", OPAQUE)
def test_an_operator_without_a_rule_is_lowered_exactly(name):
    case = mask_mods.Case(name, OPAQUE[name][0], 300, 200)
    lowered = compile_mask(from_mask_mod(case.mask_mod), 300, 200, q_offset=0, device="cpu")
    zero, queries, keys = torch.tensor(0), torch.arange(300)[:, None], torch.arange(200)
    assert torch.equal(lowered.mask_mod(zero, zero, queries, keys), by_torch(case)[0, 0])


@pytest.mark.parametrize("name", OPAQUE)
def test_equal_opaque_masks_are_equal(name):
    mask_mod, _ = OPAQUE[name]
    assert from_mask_mod(mask_mod) == from_mask_mod(mask_mod)


def test_opaque_masks_that_differ_in_which_table_stands_where_differ():
    one, other = torch.arange(600), torch.arange(600).flip(0)
    first = from_mask_mod(lambda b, h, q, k: (one[q] * one * other * one).sum() % 64 > 20)
    second = from_mask_mod(lambda b, h, q, k: (one[q] * one * other * other).sum() % 64 > 20)
    assert first != second
    assert per_head([first, second]).which == (0, 1)


def test_a_traced_mask_is_the_expression_one_would_write():
    size = 256
    traced = from_mask_mod(lambda b, h, q, k: (k <= q) & (q - k < size))
    assert traced == causal & window(256)
    assert str(from_mask_mod(lambda b, h, q, k: h * 2 + q > k)) == str(h * 2 + q_idx > kv_idx)


@settings(max_examples=150)
@given(masks, grids)
def test_any_mask_is_traced_to_an_equal_one(mask, grid):
    grid = grid._replace(q_offset=0)
    traced = from_mask_mod(lambda *where: mask(*where))
    if problem(mask, grid, CPU) is None:
        assert traced.opaque_operators == ()
        assert problem(traced, grid, CPU) is None
    assert torch.equal(dense(traced, grid), dense(mask, grid))


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, q, k: torch.fmod(q, 64) < k - 30,
        lambda b, h, q, k: torch.div(q, 7, rounding_mode="trunc") * 9 + k > 0,
        lambda b, h, q, k: q.abs() * q.sign() + q**2 > k - 40,
        lambda b, h, q, k: (q & 31) + (q >> 3) + (q % 5) < k // 2,
    ],
)
def test_positions_of_queries_may_be_negative(mask_mod):
    grid = Grid(200, 100, -100, (64, 64), 1, (0,))
    where = torch.tensor(0), torch.tensor(0), torch.arange(-100, 100)[:, None], torch.arange(100)
    assert torch.equal(dense(from_mask_mod(mask_mod), grid)[0, 0], mask_mod(*where))


def test_a_mask_is_its_own_trace():
    assert from_mask_mod(causal) is causal
    assert from_mask_mod(lambda *where: causal(*where)) == causal


def test_a_table_read_twice_is_one_table():
    mask = from_mask_mod(lambda b, h, q, k: mask_mods.DOCUMENTS[q] == mask_mods.DOCUMENTS[k])
    first, second = mask.tables
    assert first is second
    assert first.tensor.data_ptr() == mask_mods.DOCUMENTS.data_ptr()


def test_a_chain_of_a_thousand_masks_is_traced():
    def many(b, h, q, k):
        kept = q >= k
        for size in range(1500):
            kept = kept | (k < size)
        return kept

    assert "kv_idx < 1499" in str(from_mask_mod(many))


@pytest.mark.parametrize(
    "read",
    [
        lambda t, q, k: t[q] > k,
        lambda t, q, k: (t + 1)[q] > k,
        lambda t, q, k: t[5] > k,
        lambda t, q, k: t.sum() > k,
        lambda t, q, k: (t * q).cumsum(0)[3] > k,
    ],
)
def test_a_captured_tensor_that_changes_is_noticed(read):
    table = torch.arange(600)
    mask = from_mask_mod(lambda b, h, q, k: read(table, q, k))
    table[5] = 0
    with pytest.raises(MaskError, match="was written to after the mask was made"):
        compile_mask(mask, 600, 600, device="cpu")


def test_an_index_beyond_a_table_is_refused_with_the_place():
    mask = from_mask_mod(lambda b, h, q, k: mask_mods.DOCUMENTS[k] == 3)
    with pytest.raises(MaskError, match=r"read out of range.* 600 entries.*at q_idx=0, kv_idx=600"):
        compile_mask(mask, 10, 601, q_offset=0, device="cpu")


def test_an_index_that_wraps_too_far_is_refused():
    mask = from_mask_mod(lambda b, h, q, k: mask_mods.DOCUMENTS[k - 700] == 3)
    with pytest.raises(MaskError, match=r"read out of range.*where\(kv_idx - 700 < 0"):
        compile_mask(mask, 10, 200, q_offset=0, device="cpu")


def returns_early(b, h, q, k):
    if q > 3:
        return k < q
    return k <= q


TABLE = torch.arange(7.0)
BAD = [
    (3, r"got int: 3\. A mask_mod is a function of \(b, h, q_idx, kv_idx\)"),
    (lambda q, k: q >= k, r"takes \(q, k\)\. A mask_mod is a function of"),
    (lambda s, b, h, q, k: s + q, r"takes \(s, b, h, q, k\).*A score_mod takes the score as well"),
    (lambda b, h, q, k: q - k, r"returned torch\.int64\. Return one boolean.*`x != 0`"),
    (lambda b, h, q, k: q * 0.5, r"returned torch\.float32 \(what adds to a score is"),
    (lambda b, h, q, k: True, r"returned bool, not a tensor.*q_idx\.new_ones"),
    (lambda b, h, q, k: None, r"returned NoneType, not a tensor"),
    (lambda b, h, q, k: torch.arange(3) > q, r"shape \(3,\) for one place.*\.any\(\)"),
    (returns_early, r"value of an index at .*test_trace.py:\d+ \(if q > 3:\).*where"),
    (lambda b, h, q, k: q >= k.item(), r"depends on the value of an index.*\.item\(\)"),
    (lambda b, h, q, k: q >= k and k > 3, r"depends on the value of an index.*with &"),
    (lambda b, h, q, k: TABLE[: int(q)].sum() > k, r"depends on the value of an index.*int\(\)"),
    (lambda b, h, q, k: TABLE[q > k].sum() > k, r"depends on the value of an index"),
    (lambda b, h, q, k: torch.rand(()) > 0.5, r"draws random numbers \(aten\.rand\)"),
    (lambda b, h, q, k: TABLE.add_(q) > k, r"writes to a captured tensor in place \(aten\.add_\)"),
    (lambda b, h, q, k: q // 0 > k, r"divides by the constant 0"),
    (lambda b, h, q, k: TABLE[9] > k, r"IndexError at .*out of bounds"),
    (
        lambda b, h, q, k: torch.ones(700, dtype=torch.int64, device="meta")[q] > k,
        r"cannot be traced at .*test_trace\.py:\d+ .*is on meta, where tensors have no values",
    ),
    (lambda b, h, q, k: q.no_such_thing, r"AttributeError at .*no attribute 'no_such_thing'"),
]


@pytest.mark.parametrize(("mask_mod", "text"), BAD)
def test_what_is_no_mask_mod_is_refused_with_the_reason(mask_mod, text):
    with pytest.raises(MaskError, match="(?s)" + text):
        from_mask_mod(mask_mod)


def in_place(y, table):
    y += table
    return y


@pytest.mark.parametrize("step", [lambda y, table: (y + y) % 9, in_place])
def test_tables_made_in_a_loop_are_watched(step):
    table = torch.arange(8)

    def mask_mod(b, h, q, k):
        y = table + 1
        for _ in range(1500):
            y = step(y, table)
        return y[q % 8] < k

    mask = from_mask_mod(mask_mod)
    assert compile_mask(mask, 8, 8).tables == pickle.loads(pickle.dumps(mask)).tables
    assert not mask.tables[0].changed
    table += 1
    assert mask.tables[0].changed


@pytest.mark.parametrize("device", ["nowhere", 3.5, []])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(MaskError, match="cannot be used here"):
        from_mask_mod(lambda b, h, q, k: q >= k, device=device)


@pytest.mark.parametrize(
    "text",
    [
        "where(q_idx < kv_idx, q_idx, 3) < 9",
        "where(q_idx < kv_idx, q_idx < 5, kv_idx < 9)",
        "bit_and(q_idx, 85) < bit_or(kv_idx, bit_xor(q_idx, 3))",
    ],
)
def test_where_and_bits_are_written_and_read(text):
    assert str(parse(text)) == text


bounds = st.tuples(st.integers(-70, 70), st.integers(-70, 70)).map(sorted)
large = st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 300)).map(lambda p: [p[0], sum(p)])


@settings(max_examples=400)
@given(st.one_of(bounds, large), st.one_of(bounds, large), st.data())
def test_bounds_of_bits_hold_every_value(a, c, data):
    x, y = data.draw(st.integers(*a)), data.draw(st.integers(*c))
    for op, value in (("bit_and", x & y), ("bit_or", x | y), ("bit_xor", x ^ y)):
        lo, hi = INTERVAL_READING[op](Interval(*a), Interval(*c))
        assert lo <= value <= hi


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
ranges = st.tuples(floats, floats).map(lambda pair: sorted(x + 0.0 for x in pair))  # no -0.0


@settings(max_examples=400)
@given(ranges, ranges, st.data())
def test_bounds_of_floats_hold_every_value(a, c, data):
    x, y = (torch.tensor(data.draw(st.floats(*r, width=32))) for r in (a, c))
    first, second = (Interval(*(torch.tensor(n) for n in r)) for r in (a, c))
    for op, value in (("+", x + y), ("-", x - y), ("*", x * y), ("/", x / y), ("sqrt", x.sqrt())):
        lo, hi = INTERVAL_READING[op](*((first,) if op == "sqrt" else (first, second)))
        assert bool(lo <= value <= hi) or (lo == -torch.inf and hi == torch.inf)


def test_a_hashed_mask_costs_elements_and_is_exact():
    mask = from_mask_mod(OPAQUE["hash"][0])
    classes = classify(mask, Grid(512, 512, 0, (128, 128), 1, (0,)))
    assert classes.partial.blocks == 16
