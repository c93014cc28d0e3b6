"""Masks in the terms that dense and streaming kernels know, and masks of one structure as one."""

import functools
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexsparse import bit_xor, everything, from_mask_mod, h, kv_idx, lookup, nothing, q_idx
from flexsparse.analysis.normal_form import FAR, Term, sink_and_window, terms
from flexsparse.analysis.sequences import sequences_of
from flexsparse.analysis.unify import structure, unify
from flexsparse.masks import causal, same_document, sink, vertical_stripe, window

LENGTH = 12
INDEX = torch.arange(LENGTH)
PAIRS = (torch.tensor(0), torch.tensor(0), INDEX[:, None], INDEX)


def dense(union):
    """The union of terms, element by element."""
    q, kv = INDEX[:, None], INDEX
    kept = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for term in union:
        near = (term.key_lo <= kv) & (kv <= term.key_hi)
        kept |= near & (term.far_lo <= q - kv) & (q - kv <= term.far_hi)
    return kept


numbers = st.integers(-3, LENGTH + 3)
atoms = st.one_of(
    st.just(causal),
    numbers.map(lambda n: kv_idx < n),
    numbers.map(lambda n: q_idx - kv_idx < n),
    numbers.map(lambda n: q_idx - kv_idx >= n),
    numbers.map(lambda n: (2 * kv_idx + 1).equals(n)),
    st.tuples(numbers, st.sampled_from([-3, -1, 2])).map(lambda x: kv_idx * x[1] <= x[0]),
    st.tuples(numbers, st.sampled_from([-2, 1, 3])).map(lambda x: (kv_idx - q_idx) * x[1] < x[0]),
    st.sampled_from([everything, nothing]),
)


def combined(masks):
    """What `&`, `|` and `~` make of masks."""
    return st.one_of(
        st.tuples(masks, masks).map(lambda x: x[0] & x[1]),
        st.tuples(masks, masks).map(lambda x: x[0] | x[1]),
        masks.map(lambda x: ~x),
    )


unions = st.recursive(
    atoms,
    combined,
    max_leaves=6,
)


@settings(max_examples=400)
@given(unions)
def test_the_terms_are_the_mask(mask):
    union = terms(mask)
    if union is not None:
        kept = mask(*PAIRS).expand(LENGTH, LENGTH)
        assert dense(union).equal(kept)


@settings(max_examples=400)
@given(unions)
def test_a_streaming_mask_is_its_sink_and_window(mask):
    numbers = sink_and_window(mask)
    if numbers is not None:
        s, w = numbers
        q, kv = INDEX[:, None], INDEX
        assert ((kv <= q) & ((kv < s) | (q - kv < w))).equal(mask(*PAIRS).expand(LENGTH, LENGTH))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal, (0, FAR)),
        (causal & window(5), (0, 5)),
        (causal & sink(3), (3, 0)),
        (causal & (sink(4) | window(8)), (4, 8)),
        ((causal & sink(4)) | (causal & window(8)), (4, 8)),
        (~(~(kv_idx < 4) & ~window(8)) & ~(kv_idx > q_idx), (4, 8)),
        (causal & (sink(4) | window(8)) & (sink(9) | window(8)), (4, 8)),
        (from_mask_mod(lambda b, h, q, k: (q >= k) & ((k < 4) | (q - k <= 7))), (4, 8)),
        (causal & sink(4) & window(2), None),
        (sink(4) | window(8), None),
        (causal & (kv_idx >= 2), None),
        (causal & (q_idx % 2).equals(0), None),
        (everything, None),
        (causal & same_document(torch.tensor([0, 0, 1])), None),
    ],
    ids=str,
)
def test_streaming_is_recognised_however_it_is_written(mask, expected):
    assert sink_and_window(mask) == expected


def of_the_last_keys(b, h, q_idx, kv_idx):
    keep = kv_idx <= q_idx
    for i in range(1, 40):
        keep = keep | (keep & (q_idx - kv_idx < i))
    return keep


def test_terms_that_are_used_again_are_not_looked_at_again():
    assert sink_and_window(from_mask_mod(of_the_last_keys)) == (0, FAR)
    distance = q_idx - kv_idx
    for _ in range(50):
        distance = distance + distance
    assert terms(distance <= 3) == (Term(far_hi=0),)


def test_long_masks_and_long_sums_are_recognised():
    index, mask = kv_idx, causal
    for _ in range(2000):
        index, mask = index + 1, ~mask
    assert terms(mask & (index < 2004)) == (Term(key_hi=3, far_lo=0),)
    assert terms(vertical_stripe(range(0, 1000, 2))) is None


ENDS = torch.tensor([0, 2, 7, LENGTH])
IDS = torch.tensor([5, 1, 3]).repeat_interleave(ENDS.diff())
POSITIONS = INDEX - ENDS[:-1].repeat_interleave(ENDS.diff())
SAME = same_document(IDS)
Q, KV = lookup(POSITIONS, q_idx), lookup(POSITIONS, kv_idx)


def of_documents(mask):
    return terms(mask, sequences_of(mask, LENGTH))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (SAME & causal, (Term(far_lo=0),)),
        (causal & (Q - KV < 5) & SAME, (Term(far_lo=0, far_hi=4),)),
        ((SAME & causal) & (KV < 2), (Term(key_hi=1, far_lo=0),)),
        (SAME & (window(3) | (KV + 1 <= 2)), (Term(far_hi=2), Term(key_hi=1))),
        (SAME & (SAME | causal), (Term(),)),
        (SAME & ~SAME, ()),
        (SAME & causal & (kv_idx < 2), None),  # places in the pack, not positions
        (SAME & (kv_idx <= Q), None),
        (SAME & (Q < 3), None),
        (SAME & same_document(IDS % 2), None),
        (SAME | causal, None),
        ((SAME & causal) | (SAME & window(2)), None),
        (same_document(IDS[INDEX % 5]) & causal, None),  # documents in several runs
        (lookup(IDS, q_idx).equals(lookup(IDS + 1, kv_idx)) & causal, None),
        (SAME & (lookup(POSITIONS + 1, q_idx) >= KV), (Term(far_lo=-1),)),
        (SAME & (lookup(POSITIONS // 2, q_idx) >= KV), None),
    ],
    ids=str,
)
def test_masks_of_documents_are_recognised_by_positions_in_them(mask, expected):
    assert of_documents(mask) == expected


in_documents = st.recursive(
    st.one_of(
        st.sampled_from([causal, SAME, Q >= KV, everything]),
        numbers.map(lambda n: q_idx - kv_idx < n),
        numbers.map(lambda n: n <= Q - KV),
        numbers.map(lambda n: n > KV),
        numbers.map(lambda n: kv_idx < n),
        numbers.map(lambda n: q_idx - KV < n),
    ),
    combined,
    max_leaves=5,
)

STARTS, LASTS = (x.repeat_interleave(ENDS.diff()) for x in (ENDS[:-1], ENDS[1:] - 1))
FROM_ITS_START = kv_idx >= lookup(STARTS, q_idx)
UP_TO_ITS_END = kv_idx <= lookup(LASTS, q_idx)
BEFORE_ITS_END = q_idx < lookup(LASTS + 1, kv_idx)
AFTER_ITS_START = q_idx >= lookup(STARTS, kv_idx)
BOTH = (Term(far_lo=0, far_hi=2), Term(key_hi=1, far_lo=0))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (FROM_ITS_START & UP_TO_ITS_END, (Term(),)),
        (BEFORE_ITS_END & AFTER_ITS_START, (Term(),)),
        (FROM_ITS_START & AFTER_ITS_START, (Term(),)),
        (causal & FROM_ITS_START, (Term(far_lo=0),)),
        (BEFORE_ITS_END & causal, (Term(far_lo=0),)),
        (BEFORE_ITS_END & window(3) & causal, (Term(far_lo=0, far_hi=2),)),
        (BEFORE_ITS_END & causal & (window(3) | (KV < 2)), BOTH),
        (FROM_ITS_START & (kv_idx < lookup(INDEX + 1, q_idx)), (Term(far_lo=0),)),
        ((kv_idx >= lookup(INDEX, q_idx)) & UP_TO_ITS_END, (Term(far_hi=0),)),
        (FROM_ITS_START & (kv_idx <= lookup(INDEX - 1, q_idx)), (Term(far_lo=1),)),
        (BEFORE_ITS_END & (q_idx >= lookup(INDEX + 2, kv_idx)), (Term(far_lo=2),)),
        (FROM_ITS_START & UP_TO_ITS_END & (Q >= KV), (Term(far_lo=0),)),
        (FROM_ITS_START & (kv_idx < lookup(LASTS, q_idx)), None),  # hides its last
        (FROM_ITS_START, None),  # sees later documents
        (BEFORE_ITS_END, None),
        (UP_TO_ITS_END & causal, None),
        (AFTER_ITS_START & causal, None),
        (FROM_ITS_START & BEFORE_ITS_END, None),  # both hide earlier documents
        (FROM_ITS_START | causal, None),
        (causal & (kv_idx >= lookup(STARTS - 1, q_idx)), None),  # a token of the one before
        (causal & (q_idx <= lookup(LASTS + 1, kv_idx)), None),
        (causal & (kv_idx >= lookup(STARTS // 2, q_idx)), None),
        (causal & FROM_ITS_START & (kv_idx < 4), None),  # places, not positions
        (causal & FROM_ITS_START & (kv_idx >= lookup(STARTS + 1, q_idx)), None),
    ],
    ids=str,
)
def test_masks_are_recognised_by_where_documents_begin_and_end(mask, expected):
    assert of_documents(mask) == expected


def a_table(draw):
    """A table that says where documents begin or end, nearly, or something else."""
    cuts = draw(st.sets(st.integers(1, LENGTH - 1), max_size=4))
    lengths = torch.tensor([0, *sorted(cuts), LENGTH]).diff()
    ends = lengths.cumsum(0)
    table = draw(st.sampled_from([ends - lengths, ends, ends - 1])).repeat_interleave(lengths)
    if draw(st.booleans()):
        return table
    place = draw(st.integers(0, LENGTH - 1))
    return table.index_fill(0, torch.tensor([place]), draw(st.integers(0, LENGTH)))


@st.composite
def bounds(draw):
    """A comparison of a token with an entry of a table at the other."""
    one, other = draw(st.sampled_from([(q_idx, kv_idx), (kv_idx, q_idx)]))
    entry = lookup(a_table(draw), other)
    return draw(st.sampled_from([one <= entry, one < entry, one >= entry, one > entry]))


DOCUMENTS = st.sampled_from([FROM_ITS_START, UP_TO_ITS_END, BEFORE_ITS_END, AFTER_ITS_START])


@settings(max_examples=600)
@given(st.lists(st.one_of(bounds(), DOCUMENTS, in_documents), min_size=1, max_size=4))
def test_sequences_found_by_their_bounds_are_all_that_the_mask_keeps(conditions):
    mask = functools.reduce(operator.and_, conditions)
    sequences = sequences_of(mask, LENGTH)
    if sequences is None:
        return
    kept = mask(*PAIRS).expand(LENGTH, LENGTH)
    lengths = sequences.cu_seqlens.diff().tolist()
    assert not (kept & ~torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()).any()
    union = terms(mask, sequences)
    if union is not None:
        alone = torch.block_diag(*(dense(union)[:n, :n] for n in lengths)).bool()
        assert alone.equal(kept)


@settings(max_examples=400)
@given(in_documents)
def test_the_terms_of_documents_are_the_mask_in_each(mask):
    union = of_documents(SAME & mask)
    if union is None:
        return
    kept = (SAME & mask)(*PAIRS).expand(LENGTH, LENGTH)
    lengths = ENDS.diff().tolist()
    alone = torch.block_diag(*(dense(union)[:n, :n] for n in lengths)).bool()
    assert alone.equal(kept)


def test_other_lookups_are_not_recognised():
    assert terms(SAME & causal) is None
    assert terms(causal & bit_xor(q_idx, kv_idx).equals(0)) is None


def test_masks_of_one_structure_become_one_that_reads_its_numbers_by_head():
    masks = {0: causal & (sink(1) | window(4)), 2: causal & (sink(3) | window(4))}
    assert structure(masks[0]) == structure(masks[2])
    one = unify(masks, torch.device("cpu"))
    for head, mask in masks.items():
        pairs = (PAIRS[0], torch.tensor(head), *PAIRS[2:])
        assert one(*pairs).equal(mask(*PAIRS))
    # the window is the same for both, and stays a number
    assert [tuple(table.tensor.tolist()) for table in one.tables] == [(1, 0, 3)]


@pytest.mark.parametrize(
    "other", [causal, causal & (q_idx - kv_idx <= 4), causal | window(4), causal & (h < 4)], ids=str
)
def test_other_structures_do_not(other):
    assert structure(causal & window(4)) != structure(other)


def test_numbers_beyond_int32_keep_their_width():
    one = unify({0: kv_idx < 5, 1: kv_idx < 2**40}, torch.device("cpu"))
    assert one.tables[0].tensor.tolist() == [5, 2**40]
