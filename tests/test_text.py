import functools
import operator

import pytest

from flexsparse import (
    MaskError,
    compile_mask,
    everything,
    h,
    kv_idx,
    masks,
    nothing,
    parse,
    per_head,
    q_idx,
    where,
)
from flexsparse.masks import causal, sink, window
from flexsparse.text import MOST_WRITTEN, amount, formula, shown

NAMES = vars(masks)
READS = [
    ("causal & (sink(64) | window(256))", causal & (sink(64) | window(256))),
    ("  causal&~window( size = 4 )", causal & ~window(4)),
    ("kv_idx <= q_idx", kv_idx <= q_idx),
    ("q_idx - kv_idx - 1 < q_idx % 4", q_idx - kv_idx - 1 < q_idx % 4),
    ("(q_idx // 64).equals(kv_idx // 64)", (q_idx // 64).equals(kv_idx // 64)),
    ("q_idx == kv_idx", q_idx.equals(kv_idx)),
    ("(kv_idx >= 3) ^ (abs(q_idx) > -2)", (kv_idx >= 3) ^ (abs(q_idx) > -2)),
]
MISTAKES = [
    ("causal & windw(3)", 10, "unknown name 'windw'; did you mean 'window'"),
    ("causal & ", 9, "found the end of the text"),
    ("(causal and window(3))", 9, "'and' is not part of the mask language; write &"),
    ("not causal", 1, "write ~"),
    ("q_idx / 2 < kv_idx", 7, "write //"),
    ("lookup(int64[4], q_idx) < 1", 1, "a text holds no tables"),
    ("causal causal", 8, "expected an operator and found 'causal'"),
    ("causal & $", 10, r"'\$' is not part of the mask language"),
    ("0 <= q_idx <= 4", 12, "comparisons do not chain"),
    ("kv_idx <= q_idx & causal", 17, "parentheses round comparisons"),
    ("window", 7, "window needs its arguments"),
    ("window()", 1, "missing 1 required positional argument"),
    ("window(0)", 1, "sees no key"),
    ("q_idx + 3", 1, "an index expression, not a mask"),
    ("causal.__class__", 8, "only .equals"),
    ("__import__('os')", 1, "unknown name '__import__'"),
    ("(" * 200 + "causal" + ")" * 200, 41, "40 levels"),
    ("q_idx.equals()", 7, "takes one index"),
    ("window(size=3, size=400)", 16, "size is given twice"),
    ("q_idx < " + "9" * 5000, 9, "a number of 5000 digits"),
    ("__builtins__", 1, "unknown name '__builtins__'"),
    ("positions", 1, "unknown name 'positions'"),
    ("", 1, "the end of the text"),
    ("where(causal, True, 3) < 3", 1, "combines two Masks, but one side is int"),
    ("q_idx // 0 < 1", 7, "Division by zero: q_idx // 0"),
    ("5 % 0 < q_idx", 3, "Division by zero: 5 % 0"),
    ("lserve([1, 0])", 1, "the masks of 2 heads, not one mask; .*, such as causal"),
    ("causal & lserve([0, 1])", 8, "one side is the masks of 2 heads; .*, such as token_stream"),
    ("'causal'", 1, "the text is 'causal', not a mask; write one mask"),
    ("minimum(True, 3) < q_idx", 1, "not Mask: True"),
]


def test_one_of_a_thing_is_not_many():
    assert amount(1, "query", "queries") == "1 query"
    assert amount(4096, "query", "queries") == "4,096 queries"
    report = str(compile_mask(per_head([causal]), 1, 1, device="cpu"))
    assert report.startswith("CompiledMask: 1 head, 1 query x 1 key, ")
    assert str(compile_mask(causal, 9, 9, device="cpu").cost()).startswith("1 block, ")
    assert str(per_head([causal])).startswith("PerHead: 1 head, 1 distinct mask\n")


@pytest.mark.parametrize(("text", "mask"), READS, ids=lambda x: str(x)[:30])
def test_text_is_read(text, mask):
    assert parse(text, NAMES) == mask


CONSTANTS = [
    where(h < 1, causal, everything),
    where(everything, causal, nothing),
    where(kv_idx < 9, nothing, everything),
    where(everything, 3, 4) < q_idx,
    causal & everything,
    ~nothing,
]


@pytest.mark.parametrize("mask", CONSTANTS, ids=str)
def test_true_and_false_are_read_back_as_masks(mask):
    assert parse(str(mask)) == mask


@pytest.mark.parametrize(("text", "column", "message"), MISTAKES, ids=lambda x: str(x)[:30])
def test_mistakes_are_pointed_at(text, column, message):
    with pytest.raises(MaskError, match=f"column {column}: .*{message}") as error:
        parse(text, NAMES)
    assert str(error.value).splitlines()[-1] == " " * (column + 1) + "^"


def test_only_text_is_parsed():
    with pytest.raises(MaskError, match="not int"):
        parse(3)


def test_names_are_those_of_a_dict_or_of_a_module():
    assert parse("causal", masks) == causal
    for names in (["causal"], 3):
        with pytest.raises(MaskError, match="give a dict or a module"):
            parse("causal", names)


def test_nothing_is_called_that_was_not_handed_in():
    with pytest.raises(MaskError, match="unknown name 'causal'"):
        parse("causal")


def test_a_long_text_is_read_back():
    mask = functools.reduce(operator.or_, (kv_idx.equals(7 * i) for i in range(5000)))
    assert parse(str(mask)) == mask


def test_a_text_that_doubles_with_each_term_is_cut():
    mask = causal
    for i in range(300):
        mask = mask | (mask & sink(i))
    assert len(str(mask)) == len(mask.name) == MOST_WRITTEN
    assert mask.name.startswith("causal | causal & sink(0) | (causal | causal & sink(0)) & sink(1)")
    assert mask.name.endswith("...")
    assert formula(mask, 20) == str(mask)[:17] + "..."
    for text in (str(compile_mask(mask, 256, 256)), str(per_head([mask])), shown(mask)):
        assert len(text) < 2000


def test_dividing_does_not_write_the_dividend():
    index = q_idx
    for _ in range(300):
        index = index // 2 + index % 3
    assert len(str(index)) == MOST_WRITTEN
