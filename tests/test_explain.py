"""explain: the tree says what the mask says, and the named terms settle it."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracles import dense, grids, masks

from flexsparse import MaskError, explain, h, kv_idx, lookup, parse, per_head, q_idx
from flexsparse.analysis.validate import problem
from flexsparse.masks import causal, prefix, sink, window
from flexsparse.questions.explanation import LEVELS_SHOWN

STREAMING = causal & (sink(64) | window(256))
PRINTED = """\
q_idx=1000 does not see kv_idx=500 (h=0, b=0), because sink(64) and window(256) are false.
  causal & (sink(64) | window(256))  false
    causal                           true   kv_idx <= q_idx: 500 <= 1000
    sink(64) | window(256)           false
      sink(64)                       false  kv_idx < 64: 500 < 64
      window(256)                    false  q_idx - kv_idx < 256: 500 < 256"""


def test_an_explanation_prints_as_a_tree():
    assert str(STREAMING.explain(1000, 500)) == PRINTED


@pytest.mark.parametrize(
    ("mask", "q", "kv", "reason"),
    [
        (STREAMING, 1000, 1001, "causal is false"),
        (STREAMING, 1000, 800, "causal and window(256) are true"),
        (STREAMING, 1000, 5, "causal and sink(64) are true"),
        (causal & ~window(3), 10, 9, "window(3) is true"),
        (causal & ~window(3), 10, 2, "causal is true and window(3) is false"),
        (causal ^ window(3), 10, 9, "causal and window(3) are true"),
        (prefix(4), 1, 9, "kv_idx < 4 and causal are false"),
        (causal & prefix(4), 1, 3, "causal is false"),
        (q_idx.equals(kv_idx), 3, 4, "q_idx.equals(kv_idx) is false"),
        (causal, 3, 3, "causal is true"),
        (
            parse("where(kv_idx < 4, q_idx < 2, q_idx < 9)"),
            5,
            8,
            "kv_idx < 4 is false and q_idx < 9 is true",
        ),
    ],
)
def test_a_sentence_names_the_terms_that_decide(mask, q, kv, reason):
    found = explain(mask, q, kv)
    assert found.sentence.endswith(f", because {reason}.")
    assert bool(found) == bool(mask(0, 0, torch.tensor(q), torch.tensor(kv)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(masks, grids, st.data())
def test_explanations_agree_with_the_mask(mask, grid, data):
    assume(problem(mask, grid, torch.device("cpu")) is None)
    shape = (grid.batch, len(grid.heads), grid.q_len, grid.kv_len)
    place, head, row, kv = (data.draw(st.integers(0, n - 1)) for n in shape)
    found = explain(mask, row + grid.q_offset, kv, grid.heads[head], place)
    assert found.kept == bool(dense(mask, grid)[place, head, row, kv]) == found.terms[0].value
    assert found.because
    assert str(found).startswith(found.sentence)


def test_a_name_is_opened_only_where_it_decides():
    texts = [term.text for term in explain(causal & prefix(2), 1, 3).terms]
    assert texts == ["causal & prefix(2)", "causal", "prefix(2)"]
    assert len(explain(prefix(2) & (kv_idx < 9), 1, 3).terms) == 5


def test_comparisons_show_their_numbers():
    documents = lookup(torch.tensor([5, 5, 7]), q_idx).equals(
        lookup(torch.tensor([5, 6, 7]), kv_idx)
    )
    assert explain(documents, 1, 1).because[0].note == "5 == 6"
    assert explain(lookup(torch.eye(3).bool(), q_idx, kv_idx), 1, 2).terms[0].note == "at [1, 2]"


def test_heads_have_explanations_of_their_own():
    heads = per_head([causal, causal & window(3)])
    assert explain(heads, 10, 5, h=0)
    assert not explain(heads, 10, 5, h=1)
    assert explain(causal & (kv_idx > h), 10, 1, h=1).because[0].note == "1 < 1"


def test_long_masks_have_short_explanations():
    mask = sink(1)
    for position in range(1, 2000):
        mask = mask | kv_idx.equals(position)
    found = explain(mask, 0, 5000)
    assert len(found.because) == 2000
    assert "and 1984 more terms" in str(found)
    assert len(str(explain(mask, 0, 1500)).splitlines()) < 20


def test_a_term_in_many_places_is_opened_once():
    mask = causal
    for i in range(40):
        mask = mask | (mask & sink(i))
    found = explain(mask, 3, 5)
    assert found.sentence.endswith("(h=0, b=0), because causal is false.")
    assert any(term.note == "as above" for term in found.terms)
    assert len(str(found)) < 100_000
    assert explain(mask, 5, 3)


def test_terms_deep_inside_are_not_printed():
    mask = causal
    for _ in range(2000):
        mask = ~mask
    lines = str(explain(mask, 5, 3)).splitlines()
    assert len(lines) == LEVELS_SHOWN + 3
    assert lines[-1].strip() == "..."
    assert explain(mask, 5, 3).because[0].text == "causal"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((causal, 1.0, 2), "explain: q=1.0; it must be an int"),
        ((causal, 1, -2), "explain: kv=-2; it must be 0 or more"),
        ((per_head([causal]), 1, 2, 1), "explain: h=1, and the mask has the heads 0 to 0"),
        ((window, 1, 2), "explain takes a Mask or per_head.*, not function"),
        (
            (lookup(torch.ones(9).bool(), q_idx), 9, 2),
            "dimension 0 has 9 entries, and the index q_idx is 9",
        ),
        (
            ((q_idx % kv_idx).equals(0), 9, 0),
            "the divisor of q_idx % kv_idx is 0 at q_idx=9, kv_idx=0",
        ),
    ],
)
def test_bad_places_are_named(arguments, sentence):
    with pytest.raises(MaskError, match=sentence):
        explain(*arguments)
