"""Perplexity, heads and probes of tiny random models, against dense attention written out."""

import math

import pytest
import torch
from letter_models import N_HEADS, VOCABULARY, Letters, tiny
from torch.nn.functional import cross_entropy

from flexsparse import MaskError, everything, h, kv_idx, q_idx
from flexsparse.commands import main
from flexsparse.commands.eval import uniform
from flexsparse.commands.real_model import INSTALL, PACKAGE, load, manual
from flexsparse.executors import flex
from flexsparse.fidelity import (
    Divergence,
    Replay,
    associative_recall,
    draw_perplexity,
    full_layers,
    head_fidelity,
    layer_inputs,
    needle_in_a_haystack,
    own_mask,
    perplexity,
    plan_density,
    recall_sequences,
    sequences,
    token_losses,
)
from flexsparse.fidelity.figure import Point
from flexsparse.masks import causal, sink, window
from flexsparse.plan import SparsePlan

LENGTH = 300
STREAM = causal & (sink(4) | window(32))


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Plain PyTorch attention: a kernel takes seconds to compile, and is tested elsewhere."""
    monkeypatch.setattr(flex, "_MISSING_ON_CPU", "kernels are left out here")


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (2, LENGTH))


def dense_loss(model, ids):
    """The losses of a model in one piece, [sequences, length - 1]."""
    with torch.no_grad():
        logits = model(ids).logits
    return cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")


def masked(model, plan, ids):
    """The losses of a model whose eager attention gets each head's dense mask, written out."""
    q, kv = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
    zero = torch.zeros((), dtype=torch.int64)
    layers = model.model.layers

    def with_mask(layer, heads):
        def hook(module, args, kwargs):
            own = causal(zero, zero, q, kv)
            own_window = getattr(module.self_attn, "sliding_window", None)
            if own_window is not None:
                own = own & (q - kv < own_window)
            masks = [own if mask is None else own & mask(zero, zero, q, kv) for mask in heads]
            bias = torch.zeros(1, len(masks), *own.shape)
            bias.masked_fill_(~torch.stack(masks), -1e30)
            return args, {**kwargs, "attention_mask": bias}

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [
        with_mask(layer, heads or [None] * N_HEADS)
        for layer, heads in zip(layers, plan.layers, strict=True)
    ]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return dense_loss(model, ids)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_perplexity_is_exp_of_the_mean_loss(family, ids, monkeypatch):
    # parts of 10 predictions, so that there are several and a ragged last one
    monkeypatch.setattr("flexsparse.fidelity.replay.LOGITS_AT_ONCE", 10 * VOCABULARY)
    model = tiny(family)
    expected = dense_loss(model, ids)
    torch.testing.assert_close(token_losses(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert perplexity(model, ids) == pytest.approx(expected.mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_perplexity_under_a_plan_is_that_of_dense_masks(family, ids):
    model = tiny(family)
    layers = [None, [causal, STREAM, None, window(8)], None, [STREAM] * N_HEADS]
    plan = SparsePlan(layers)
    expected = masked(model, plan, ids)
    torch.testing.assert_close(token_losses(model, ids, plan), expected, rtol=1e-5, atol=1e-5)
    assert (expected - dense_loss(model, ids)).abs().max() > 0.1
    # and the plan is off the model again
    torch.testing.assert_close(token_losses(model, ids), dense_loss(model, ids))


def test_every_takes_the_last_prediction_and_those_before_it(ids):
    model = tiny("llama")
    every = token_losses(model, ids, every=7)
    expected = dense_loss(model, ids).flip(1)[:, ::7].flip(1)
    torch.testing.assert_close(every, expected)


def test_a_replay_runs_again_from_a_layer_under_another_plan(ids):
    model, row = tiny("gemma3"), ids[:1]
    replay = Replay(model, row, starts=[0, 1, 3])
    plan = SparsePlan([None, None, None, [STREAM] * N_HEADS])
    expected = token_losses(model, row, plan)[0]
    plan.apply(model)
    for start in (0, 1, 3):
        torch.testing.assert_close(replay.losses(start), expected)
    assert not torch.allclose(replay.losses(), expected)  # the recorded run is still there
    replay.record(1)
    torch.testing.assert_close(replay.losses(), expected)
    plan.remove(model)


def test_a_replay_from_a_layer_computes_no_layer_before_it(ids):
    model = tiny("llama")
    replay = Replay(model, ids[:1], starts=[2])
    seen = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: seen.append(i))
    replay.losses(2)
    assert seen == [2, 3]


def test_divergence_is_the_kl_of_the_predictions(ids):
    model, row = tiny("llama"), ids[:1]
    replay = Replay(model, row, starts=[3])
    dense = Divergence(replay)
    assert dense.of(replay) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        p = model(row).logits[0, :-1].log_softmax(-1)
        SparsePlan([None] * 3 + [[STREAM] * N_HEADS]).apply(model)
        q = model(row).logits[0, :-1].log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    # the rest is counted as one token, which can only hide some of it
    assert 0.9 * exact < dense.of(replay, 3) <= exact * (1 + 1e-4)


def test_mass_and_error_of_heads_are_those_of_dense_softmax(ids):
    model = tiny("gemma3")
    inputs = layer_inputs(model, ids[:1], [0, 1])
    hidden = {}
    for i in (0, 1):
        attn = model.model.layers[i].self_attn
        attn.register_forward_hook(lambda *x, i=i: hidden.update({i: x[-1]}), with_kwargs=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(ids[:1])
    kv, q = torch.arange(LENGTH), torch.arange(LENGTH)[:, None]
    for i in (0, 1):
        weights = hidden[i][1][0]  # the model's own, [n_heads, q, kv]
        v = inputs[i].v.repeat_interleave(2, 0)
        kept = weights * ((kv < 4) | (q - kv < 32))
        found = head_fidelity(inputs[i], [causal, STREAM])
        torch.testing.assert_close(found.mass[:, 0], torch.ones(N_HEADS))
        torch.testing.assert_close(found.mass[:, 1], kept.sum(-1).mean(-1))
        sparse, dense = kept / kept.sum(-1, keepdim=True) @ v, weights @ v
        expected = (sparse - dense).norm(dim=(1, 2)) / dense.norm(dim=(1, 2))
        torch.testing.assert_close(found.error[:, 1], expected, rtol=1e-4, atol=1e-5)
        assert found.error[:, 0].max() < 1e-5


def test_a_soft_cap_is_part_of_the_weights(ids):
    model = tiny("gemma2")
    inputs = layer_inputs(model, ids[:1], [1])[1]
    assert inputs.softcap == 5.0
    capped = head_fidelity(inputs, [STREAM]).mass
    assert not torch.allclose(capped, head_fidelity(inputs._replace(softcap=None), [STREAM]).mass)


def test_density_counts_blocks_within_the_models_own_masks():
    config = tiny("gemma3").config
    assert own_mask(config, 1) == causal
    assert full_layers(config) == [1, 3]
    every = [everything] * N_HEADS
    # 16 x 16 blocks: causal computes 136, 128 sinks and window 384 compute 70
    assert plan_density(SparsePlan([None, every, None, None]), config, 2048) == 136 / 256
    streams = [causal & (sink(128) | window(384))] * N_HEADS
    assert plan_density(SparsePlan([None, streams, None, streams]), config, 2048) == 70 / 256
    # a layer with a window of 64 computes two diagonals whatever the plan says
    assert plan_density(SparsePlan([every, None, None, None]), config, 2048) == 31 / 256
    assert plan_density(SparsePlan([None] * 4), config, 2048) == 0
    # a mask that reads the head: two heads see themselves and those before, two their own block
    heads = [(h < 2) | (kv_idx >= q_idx // 128 * 128)] * N_HEADS
    assert plan_density(SparsePlan([None, heads, None, None]), config, 2048) == (136 + 16) / 512


def test_sequences_begin_with_the_token_for_a_beginning():
    found = sequences(Letters(), "abcdefgh", 4)
    assert found.tolist() == [[0, 1, 2, 3], [0, 4, 5, 6]]
    assert sequences(Letters(bos_token_id=None), "abcdefgh", 4).tolist() == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ]


def test_recall_sequences_ask_every_key_once_after_its_pair():
    ids, asked = recall_sequences(20, 64, 8, torch.arange(50), torch.arange(50, 90))
    assert ids.shape == asked.shape == (20, 64)
    for row, where in zip(ids, asked, strict=True):
        pairs = dict(zip(row[0:16:2].tolist(), row[1:16:2].tolist(), strict=True))
        assert len(pairs) == 8
        places = where.nonzero().flatten()
        assert {int(row[at]): int(row[at + 1]) for at in places} == pairs
        filling = torch.ones(64, dtype=torch.bool)
        filling[:16] = False
        filling[places] = filling[places + 1] = False
        assert not set(row[filling].tolist()) & set(pairs)


def test_recall_is_the_probability_of_the_values_asked_for():
    ids, asked = recall_sequences(2, 32, 4, torch.arange(20), torch.arange(20, 40))
    model = tiny("llama")
    losses = dense_loss(model, ids)[asked[:, :-1]]
    assert associative_recall(model, ids, asked) == pytest.approx(
        losses.mean().neg().exp().item(), rel=1e-4
    )


def test_the_needle_probe_measures_the_number_at_each_depth():
    model, text = tiny("llama"), "what stands here is hay " * 50
    found = needle_in_a_haystack(model, Letters(), text, LENGTH, [0.0, 1.0])
    assert found.shape == (2,)
    assert ((found > 0) & (found < 1)).all()
    # the same number at other places of the same hay
    near = needle_in_a_haystack(model, Letters(), text, LENGTH, [0.0])
    assert near[0] == found[0]


def test_a_picture_shows_every_plan_at_its_density():
    pytest.importorskip("matplotlib")
    points = [Point("window(128)", 0.12, 24.6, False), Point("plan.json", 0.27, 11.8, True)]
    figure = draw_perplexity(points, Point("dense", 0.53, 11.6, False), "a title")
    axes = figure.axes[-1]
    at = [
        (x, y) for line in axes.lines[1:] for x, y in [(line.get_xdata()[0], line.get_ydata()[0])]
    ]
    assert at == [(53.0, 11.6), (12.0, 24.6), (27.0, 11.8)]
    names = [text.get_text() for text in axes.texts]
    assert names == ["dense  11.60", "window(128)  24.60", "plan.json  11.80"]


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(MaskError, match=r"The text has 8 tokens, and 1 sequence\(s\) of 10"):
        sequences(Letters(), "abcdefgh", 10)
    with pytest.raises(MaskError, match="3 sequence"):
        sequences(Letters(), "abcdefgh", 4, 3)
    with pytest.raises(MaskError, match="length=1"):
        sequences(Letters(), "abcdefgh", 1)
    with pytest.raises(MaskError, match="haystack of 300"):
        needle_in_a_haystack(tiny("llama"), Letters(), "short", LENGTH)
    with pytest.raises(MaskError, match="depth=2"):
        needle_in_a_haystack(tiny("llama"), Letters(), "x" * 999, LENGTH, [2])


def test_a_text_longer_than_the_model_reads_is_refused(ids):
    model = tiny("llama", max_position_embeddings=128)
    with pytest.raises(MaskError, match="reads at most 128 tokens, and length is 300"):
        perplexity(model, ids)


def test_a_plan_for_another_model_is_refused_and_the_model_left_as_it_was(ids):
    model = tiny("llama")
    for plan in (SparsePlan([None] * 3), SparsePlan([None] * 3 + [[causal] * 2])):
        with pytest.raises(MaskError, match="make it again for this one"):
            perplexity(model, ids, plan)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_does_not_exist_is_refused(ids):
    with pytest.raises(MaskError, match="Layer 4 does not exist; the model has layers 0 to 3"):
        layer_inputs(tiny("llama"), ids, [4])


def test_a_model_without_a_list_of_layers_is_refused(ids):
    with pytest.raises(MaskError, match="Linear has no list of decoder layers"):
        Replay(torch.nn.Linear(2, 2), ids[:1])


def test_recall_sequences_without_room_are_refused():
    keys = torch.arange(50)
    with pytest.raises(MaskError, match="8 pairs take rows of 32 tokens"):
        recall_sequences(1, 31, 8, keys, keys)
    with pytest.raises(MaskError, match="take 9 keys and 8 values"):
        recall_sequences(1, 64, 8, keys[:8], keys)


@pytest.fixture
def letters(monkeypatch, tmp_path):
    """The commands read a tiny model, and a file of letters."""
    for command in ("eval", "search"):
        monkeypatch.setattr(
            f"flexsparse.commands.{command}.load", lambda *_: (tiny("gemma3"), Letters())
        )
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    return ["--text", str(text), "--len", "640"]


def test_eval_compares_plans_masks_and_the_dense_model(letters, capsys, tmp_path):
    plan = SparsePlan([None, [causal, STREAM, STREAM, STREAM], None, None])
    plan.save(tmp_path / "mine.json")
    mask = "causal & (sink(4) | window(32))"
    figure = tmp_path / "figure.png"
    command = ["eval", str(tmp_path / "mine.json"), "--mask", mask, "--sequences", "2", *letters]
    command += ["--mask", "causal & (h<2)|(kv_idx>=q_idx//128*128)"]
    assert main([*command, "--heads", "--probes", "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    ids = sequences(Letters(), "the quick brown fox jumps over the lazy dog " * 60, 640, 2)
    model = tiny("gemma3")
    for name, density, which in (
        # 5 x 5 blocks: causal computes 15, the stream 12 (a sink, the diagonal and one beside it)
        ("dense", 15 / 25, None),
        (mask, 12 / 25, SparsePlan([None, [STREAM] * 4, None, [STREAM] * 4])),
        ("mine.json", (15 + 3 * 12) / 100, plan),
    ):
        line = next(line for line in printed.splitlines() if line.strip().startswith(name))
        assert f"{density:.1%}" in line
        assert f"{perplexity(model, ids, which):.3f}" in line
    assert "mass kept" in printed
    assert "needle at 10%" in printed
    assert figure.stat().st_size > 1000


EVAL_REFUSED = [
    (["--len", "5000"], "reads at most 2,048 tokens"),
    (["--sequences", "9"], "9 sequence"),
    (
        ["--mask", "causal", "--layers", "1,7"],
        "layer 7 does not exist; the model has layers 0 to 3",
    ),
    (["--text", "nowhere.txt"], "cannot read --text nowhere.txt"),
    (["nowhere.json"], "nowhere.json"),
    (["--mask", "window(0)"], "sees no key"),
    (["--mask", "causal", "--figure", "nowhere/x.png"], "cannot write nowhere/x.png: No such file"),
]


@pytest.mark.parametrize(("arguments", "message"), EVAL_REFUSED, ids=lambda x: str(x)[:30])
def test_eval_refuses_in_one_sentence(arguments, message, letters, capsys, monkeypatch):
    monkeypatch.setattr("flexsparse.commands.eval.token_losses", lambda *_: pytest.fail("it ran"))
    assert main(["eval", *letters, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_eval_refuses_a_plan_for_another_model(letters, capsys, tmp_path):
    SparsePlan([None, [causal] * 2]).save(tmp_path / "other.json")
    assert main(["eval", *letters, str(tmp_path / "other.json")]) == 2
    assert "The plan has 2 layers and the model" in capsys.readouterr().err


@pytest.mark.real_model
def test_a_real_model_needs_its_first_tokens(monkeypatch):
    """StreamingLLM's attention sinks, on 600 tokens of the manual."""
    pytest.importorskip(PACKAGE.replace("-", "_"), reason=INSTALL)
    model, tokenizer = load(None, torch.device("cpu"))
    ids = sequences(tokenizer, manual(), 600, 1)
    config = model.config
    assert full_layers(config) == [5, 11, 17]
    dense, sinks, none = (
        perplexity(model, ids, mask and uniform(config, [5, 11, 17], mask))
        for mask in (None, causal & (sink(4) | window(128)), causal & window(128))
    )
    assert dense == pytest.approx(math.exp(dense_loss(model, ids).mean()), rel=1e-3)
    assert dense < sinks < 1.2 * dense < none


def test_a_model_in_training_mode_goes_on_training(ids):
    model = tiny("llama").train()
    assert math.isfinite(perplexity(model, ids, SparsePlan([None] * 3 + [[STREAM] * N_HEADS])))
    assert model.training
