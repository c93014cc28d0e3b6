"""Masks in the terms that dense and streaming kernels know, and masks of one structure as one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexsparse import bit_xor, everything, from_mask_mod, h, kv_idx, lookup, nothing, q_idx
from flexsparse.analysis.normal_form import FAR, Term, sink_and_window, terms
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
unions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda x: x[0] & x[1]),
        st.tuples(inner, inner).map(lambda x: x[0] | x[1]),
        inner.map(lambda x: ~x),
    ),
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


def test_documents_are_recognised_and_other_lookups_are_not():
    ids = torch.tensor([0, 0, 1])
    same = lookup(ids, q_idx).equals(lookup(ids, kv_idx))
    (term,) = terms(causal & same)
    assert term.documents.tensor is ids
    assert term.far_lo == 0
    other = lookup(ids, q_idx).equals(lookup(ids + 1, kv_idx))
    assert terms(other) is None
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
