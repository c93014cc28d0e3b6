"""Plans: values, files, and the files of other systems."""

import json
from types import SimpleNamespace

import pytest
import torch

import flexsparse as fs
from flexsparse import MaskError, masks
from flexsparse.masks import causal, sink, window
from flexsparse.plan import SparsePlan
from flexsparse.plan_files import (
    from_duo_attention,
    from_minference,
    from_moa,
    from_phi3_small,
)

STREAMING = "causal & (sink(4) | window(256))"
GROWING = "causal & window(span(-100, 0.5))"
PLAN = SparsePlan([None, ["causal", STREAMING, STREAMING, None], None, [causal] * 3 + [GROWING]])

PRINTED = """\
SparsePlan: 4 layers x 4 query heads
  layers 0, 2   as the model has them
  layer 1
    head 0   causal
    heads 1-2   causal & (sink(4) | window(256))
    head 3   as the model has it
  layer 3
    heads 0-2   causal
    head 3   causal & window(span(-100, 0.5))"""

SAVED = """\
{
  "flexsparse_plan": 1,
  "n_layers": 4,
  "n_heads": 4,
  "layers": {
    "1": {
      "0": "causal",
      "1-2": "causal & (sink(4) | window(256))"
    },
    "3": {
      "0-2": "causal",
      "3": "causal & window(span(-100, 0.5))"
    }
  }
}
"""


def dense(mask, n):
    return mask(0, 0, torch.arange(n)[:, None], torch.arange(n)).expand(n, n)


def test_a_plan_prints_what_each_head_has():
    assert str(PLAN) == repr(PLAN) == PRINTED


def test_a_plan_is_saved_as_text_that_people_read(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == SAVED
    assert SparsePlan.load(tmp_path / "plan.json") == PLAN


ROUND_TRIPS = {
    "per_head": SparsePlan([masks.s2_attention(4, 2, 4), None]),
    "formulas": SparsePlan([[fs.q_idx // 64 >= fs.kv_idx // 64, None]]),
    "a name of one's own": SparsePlan([[(causal & window(3)).named("mine")]]),
    "heads": SparsePlan([[causal & (fs.kv_idx % 4).equals(fs.h)] * 2]),
    "a constant": SparsePlan([[fs.where(fs.h < 1, causal, fs.everything)]]),
    "nothing": SparsePlan([None, None]),
    "longgen": SparsePlan([[mask] * 3 for mask in masks.longgen(6, causal & window(5))]),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_plans_survive_their_files(name, tmp_path):
    plan = ROUND_TRIPS[name]
    plan.save(tmp_path / "plan.json")
    loaded = SparsePlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert (loaded.n_layers, loaded.n_heads) == (plan.n_layers, plan.n_heads)


def test_layers_and_heads_are_counted():
    assert (PLAN.n_layers, PLAN.n_heads) == (4, 4)
    assert PLAN.layers[1][1] == causal & (sink(4) | window(256))
    assert SparsePlan([None, [None, None]]).layers == (None, None)
    assert SparsePlan([None]).n_heads is None


@pytest.mark.parametrize(
    ("text", "kv_len", "size"),
    [
        ("window(span(-100, 0.5))", 1000, 400),
        ("window(span(-100, 0.5))", 100, 1),  # at least one
        ("window(span(5000, 0))", 300, 300),  # at most all
        ("window(span(0, 0.3, 64))", 1000, 5),  # blocks, rounded up
        ("window(span(beta=1, alpha=-1))", 10, 9),
    ],
)
def test_a_span_grows_with_the_keys(text, kv_len, size):
    assert SparsePlan([[text]]).at(kv_len) == SparsePlan([[window(size)]])


CONSTRUCTED = [
    ([], "give a list with one entry for each layer"),
    ("causal", "give a list with one entry for each layer"),
    (causal, "give a list with one entry for each layer"),
    ([causal], "for layer 0; give a list with a mask for each query head"),
    (["causal"], "for layer 0; give a list with a mask for each query head"),
    ([None, []], "for layer 1; give a list"),
    ([[causal], None, [causal, causal]], "got 2 heads for layer 2 and 1 for one before it"),
    ([[causal, 3]], "got int for head 1 of layer 0: 3. Give a Mask, the text of one"),
    ([[lambda b, h, q, k: q >= k]], "got function for head 0 of layer 0"),
    ([["causal & windw(4)"]], "head 0 of layer 0: Cannot read the mask at column 10"),
    ([["__import__('os')"]], "unknown name '__import__'"),
    ([["window(span(1))"]], "head 0 of layer 0: Cannot read the mask"),
    ([["window(span(1, 2, 0))"]], "block_size must be an int of 1 or more"),
    ([[fs.b <= 3]], "reads the batch row b, which a plan does not know"),
]


@pytest.mark.parametrize(("layers", "message"), CONSTRUCTED)
def test_what_is_no_plan_is_refused(layers, message):
    with pytest.raises(MaskError) as error:
        SparsePlan(layers)
    assert message in str(error.value)


@pytest.mark.parametrize("kv_len", [0, -1, True, 2.0, None])
def test_a_length_must_be_a_length(kv_len):
    with pytest.raises(MaskError, match="kv_len must be an int of 1 or more"):
        PLAN.at(kv_len)


CONFIGS = [
    ({"num_hidden_layers": 4, "num_attention_heads": 4}, None),
    ({"num_hidden_layers": 5, "num_attention_heads": 4}, "The plan has 4 layers and"),
    ({"num_hidden_layers": 4, "num_attention_heads": 8}, "The plan has 4 query heads and"),
    ({"num_hidden_layers": 4}, "has no num_attention_heads"),
    ({"is_encoder_decoder": True}, "has an encoder too"),
]


@pytest.mark.parametrize(("config", "reason"), CONFIGS)
def test_a_plan_checks_itself_against_a_config(config, reason):
    found = PLAN.problem(SimpleNamespace(model_type="llama", **config))
    assert found is None if reason is None else reason in found


def test_masks_without_a_text_are_not_saved(tmp_path):
    table = masks.kept_keys(torch.tensor([[[True, False]]]), 4)
    with pytest.raises(MaskError, match="The mask of head 1 of layer 0 cannot be saved"):
        SparsePlan([[causal, table.at(b=0)]]).save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def changed(**changes):
    return json.dumps({**json.loads(SAVED), **changes})


FILES = [
    ("", "it is no JSON"),
    ("[" * 100_000, "it is no JSON"),
    ("[]", "\"flexsparse_plan\" is 'list' and must be 1"),
    (changed(flexsparse_plan=2), '"flexsparse_plan" is 2 and must be 1'),
    (changed(n_layers=None), '"n_layers" is None and must be an int'),
    (changed(n_layers=10**12), '"n_layers" is 1000000000000 and must be an int of 1 to'),
    (changed(n_heads=True), '"n_heads" is True and must be an int'),
    (changed(layers=[]), '"layers" is list and must be an object'),
    (changed(layers={"4": {}}), "layer '4' does not exist; there are 0 to 3"),
    (changed(layers={"0": {"2-4": "causal"}}), "layer 0, head '2-4' does not exist"),
    (changed(layers={"0": {"a": "causal"}}), "layer 0, head 'a' must be numbers such as"),
    (changed(layers={"0-1, 1": {}}), "layer 1 stands there twice"),
    (changed(layers={"0": {"0": "causal", "0-1": "causal"}}), "layer 0, head 0 stands there twice"),
    (changed(layers={"0": "causal"}), "layer 0 is str and must be an object"),
    (changed(layers={"0": {"1": 5}}), "layer 0, head 1 is 5 and must be the text of a mask"),
    (changed(layers={"0": {"1": "cusal"}}), "head 1 of layer 0: Cannot read the mask at column 1"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_files_that_hold_no_plan_are_refused(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(MaskError) as error:
        SparsePlan.load(tmp_path / "plan.json")
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(MaskError, match=r"Cannot read a plan from .*No such file"):
        SparsePlan.load(tmp_path / "plan.json")


# the files of other systems


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


VALUES = [[0.9, 0.0, 0.5], [0.4999, 1.0, 1.2]]
TSV = "\n".join("\t".join(f"{value:.18e}" for value in row) for row in VALUES) + "\n"


def test_duo_attention_splits_heads_by_a_threshold(tmp_path):
    write(tmp_path / "full_attention_heads.tsv", TSV)
    write(tmp_path / "config.json", {"sink_size": 128, "recent_size": 200})
    plan = from_duo_attention(tmp_path, group_size=2)
    streams = masks.duo_streaming(128, 200)
    assert plan == SparsePlan(
        [
            [causal, causal, streams, streams, causal, causal],
            [streams, streams, causal, causal, causal, causal],
        ]
    )
    own = from_duo_attention(tmp_path, 1, threshold=0, sink_size=1, recent_size=2)
    assert own == SparsePlan([[causal] * 3] * 2)


@pytest.mark.parametrize(("sparsity", "n"), [(0, 0), (0.25, 2), (0.5, 3), (0.9, 5), (1, 6)])
def test_duo_attention_streams_a_share_of_the_heads(sparsity, n, tmp_path):
    file = write(tmp_path / "heads.tsv", TSV)
    plan = from_duo_attention(file, 1, sparsity=sparsity)
    heads = [mask for layer in plan.layers for mask in layer]
    streaming = [i for i, mask in enumerate(heads) if mask != causal]
    # as many as lie below the quantile, the lowest of 0.9, 0, 0.5, 0.4999, 1, 1
    assert streaming == sorted([1, 3, 2, 0, 4, 5][:n])


ALPHAS = [[-1024.0, 0.0, 1024.0, 2048.5, 8192.0], [0.0, 100.0, 0.0, -64.0, -4096.0]]
BETAS = [[0.875, 0.125, 0.5, 0.0, 1.0], [0.0, 0.5, 0.875, 0.06, 0.9]]


@pytest.mark.parametrize("n", [5, 100, 127, 129, 511, 1500])
def test_moa_spans_are_those_of_moa(n, tmp_path):
    plan = from_moa(write(tmp_path / "moa.json", {"alphas": ALPHAS, "betas": BETAS}))
    for layer, alphas, betas in zip(plan.at(n).layers, ALPHAS, BETAS, strict=True):
        expected = masks.moa(alphas, betas, n, max_new_token=0)
        for head, mask in enumerate(layer):
            assert torch.equal(dense(mask, n), dense(expected[head], n)), (n, head)
    plan.save(tmp_path / "plan.json")
    assert SparsePlan.load(tmp_path / "plan.json") == plan


MINFERENCE = [
    {"0": ["stream_llm", 100, 800, 0.9], "1": ["vertical_and_slash", 30, 700, 0.8]},
    {"1": ["flex_vertical_and_slash", [0.9, 512], [0.9, 2048], 0.0]},
]


def test_minference_heads_become_what_is_said(tmp_path):
    file = write(tmp_path / "best_pattern.json", MINFERENCE)
    a_shape = masks.a_shape
    assert from_minference(file, 2, estimated="a_shape") == SparsePlan(
        [[a_shape(100, 800), a_shape(30, 700)], [a_shape(1000, 6096), a_shape(512, 2048)]]
    )
    expected = SparsePlan([[a_shape(100, 800), None], None])
    assert from_minference(file, 2, estimated="model") == expected


PHI3_SMALL = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_vert_stride": 4,
    "blocksparse_homo_head_pattern": False,
    "dense_attention_every_n_layers": 2,
    "hidden_size": 4096,
}


def test_phi3_small_is_read_from_its_config(tmp_path):
    write(tmp_path / "config.json", PHI3_SMALL)
    names = [name for name in PHI3_SMALL if name not in ("num_hidden_layers", "hidden_size")]
    arguments = {name: PHI3_SMALL[name] for name in names}
    plan = from_phi3_small(tmp_path)
    assert plan == SparsePlan([masks.phi3_small(i, **arguments) for i in range(4)])
    assert plan.layers[1] == (causal,) * 8


FOREIGN = [
    (from_duo_attention, (1,), "0.5\tx\n", "line 1 must be numbers separated by tabs"),
    (from_duo_attention, (1,), "0.5\t1\n0.5\n", "line 2 has 1 numbers and line 1 2"),
    (from_duo_attention, (1,), "0.5\tnan\n", "line 1 must be numbers separated by tabs"),
    (from_duo_attention, (1,), "\n", "it is empty"),
    (from_duo_attention, (0,), "0.5\n", "group_size must be an int of 1 or more"),
    (from_moa, (), [], "it is list and must be an object"),
    (from_moa, (), {"alphas": [[1]]}, '"betas" must be a list of numbers for each layer'),
    (from_moa, (), {"alphas": [[1]], "betas": [[1, 2]]}, "must have the same layers and heads"),
    (from_moa, (), {"alphas": [["1"]], "betas": [[1]]}, "must be a list of numbers"),
    (from_minference, (2,), MINFERENCE, "pick their keys at run time. Say what they become"),
    (from_minference, (2,), {}, "it must be a list with an object for each layer"),
    (from_minference, (1,), [{"0": 7}], "a head is 7 and must be [type, size, size, score]"),
    (
        from_minference,
        (1,),
        [{"2": MINFERENCE[0]["0"]}],
        "head '2' of layer 0 does not exist; n_heads is 1",
    ),
    (from_phi3_small, (), {}, "it has no num_hidden_layers, as the config of a Phi-3-small has"),
    (from_phi3_small, (), [], "it is list and must be an object"),
    (from_phi3_small, (), {**PHI3_SMALL, "num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
]


@pytest.mark.parametrize(("read", "arguments", "value", "message"), FOREIGN)
def test_files_that_are_not_as_published_are_refused(read, arguments, value, message, tmp_path):
    with pytest.raises(MaskError) as error:
        read(write(tmp_path / "file", value), *arguments)
    assert message in str(error.value)
