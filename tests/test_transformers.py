"""Real attention layers of transformers under a plan, against dense attention."""

import copy
import functools
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

import tiny_models
from tiny_models import FAMILIES, PLAN, Reference, bare, places, plan_of, tiny
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    CompileConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    StaticCache,
)
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)

import flexsparse as fs
from flexsparse import ExecutorError, MaskError
from flexsparse.integrations import transformers as integration
from flexsparse.integrations.transformers import attention, rules
from flexsparse.integrations.transformers.rows import ALL_HEADS, Pick, attend_row, pick
from flexsparse.masks import causal, sink, window
from flexsparse.plan import SparsePlan

LENGTH = 150  # more than a block
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return tiny("llama")


def padding(kind):
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if "left" in kind:
        mask[0, :7] = 0
    if "right" in kind:
        mask[1, -20:] = 0
    if "middle" in kind:
        mask[1, 30:33] = 0
    return mask


@pytest.mark.parametrize("kind", ["none", "left", "right", "left and right", "middle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_dense_attention(family, kind, ids):
    model, mask = tiny(family), padding(kind)
    with torch.no_grad(), Reference(model) as reference:
        expected = reference(ids, None if kind == "none" else mask)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=places(mask)).logits
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    assert out.std() > 0.1


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_sequences_are_as_if_each_were_alone(llama, ids, batch):
    lengths, ids = [70, 17, LENGTH - 87], ids[:batch]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].expand(batch, -1)
    told = {"position_ids": position_ids, "cu_seq_lens_q": torch.tensor([0, 70, 87, LENGTH])}
    with torch.no_grad():
        packed = llama(ids, **told, use_cache=False).logits
        alone = [llama(part, use_cache=False).logits for part in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=0)


def test_packed_sequences_of_one_batch_row_are_what_the_streaming_kernels_take():
    lengths = [70, 17, 43]
    starts = find_packed_sequence_indices(torch.cat([torch.arange(n) for n in lengths])[None])
    packed = and_masks(causal_mask_function, packed_sequence_mask_function(starts))
    own = rules.of(packed, None, (130, 130), 0, 0, torch.device("cpu"))
    (launch,) = fs.compile_mask(own.and_also(causal & (sink(4) | window(9))), 130, 130).launches
    assert launch.streams == ((4, 9),)
    assert launch.positions.cu_seqlens_k.tolist() == [0, 70, 87, 130]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_a_plan_the_model_is_itself(family, ids):
    model = bare(family)
    integration.register()
    with torch.no_grad():
        model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
        expected = model(ids).logits
        model.set_attn_implementation("flexsparse")
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "llama")],
)
def test_compiled_kernels_agree_in_float32(family, ids, monkeypatch):
    windows = [[5, 9, 30, 12], [7, 50, 60, 4]]  # one kernel for all heads
    monkeypatch.setattr(tiny_models, "WINDOWS", windows)
    model = bare(family, torch.float32)
    plan_of(windows).apply(model)
    with torch.no_grad(), Reference(model) as reference:
        expected = reference(ids)
    with torch.no_grad():
        out = model(ids).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 64},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mixtral"])
def test_generated_tokens_are_those_of_dense_attention(family, cache, ids):
    model, mask = tiny(family), padding("left")
    with torch.no_grad(), Reference(model) as reference:
        expected = reference.generate(ids, mask, 6)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, **CACHES[cache], **GREEDY)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search_finds_the_beams_of_dense_attention(cache, llama, ids):
    search = {"attention_mask": padding("left"), "num_beams": 3, "max_new_tokens": 5, **GREEDY}
    plain, forward = llama.generate, llama.forward

    def remember_places(*args, **kwargs):
        tiny_models.dense.places = places(kwargs["attention_mask"])
        return forward(*args, **kwargs)

    with Reference(llama), mock.patch.object(llama, "forward", remember_places):
        expected = plain(ids, use_cache=False, **search)
    assert torch.equal(llama.generate(ids, **CACHES[cache], **search), expected)


def test_a_step_of_decoding_compiles_nothing(llama, ids):
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        with mock.patch.object(rules, "compile_mask", side_effect=AssertionError):
            llama(ids[:, :1], past_key_values=cache)


def kept_keys(chances, batch=2, group=3, kv_len=200):
    """bool [batch, kv heads, group, kv_len], true by each kv head's chance."""
    chances = torch.tensor(chances).view(1, -1, 1, 1)
    return torch.rand(batch, chances.shape[1], group, kv_len) < chances


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    "chances", [(0.01, 1, 0.5, 0, 0.03), (0.02,), (1,), (0, 0), (0.5, 0.04, 0.6, 1)]
)
def test_keys_that_few_heads_keep_are_all_that_is_read(chances, softcap):
    kept = kept_keys(chances)
    picks = pick(kept)
    kv_heads = len(chances)
    q = torch.randn(2, 3 * kv_heads, 1, 16)
    k, v = torch.randn(2, 2, kv_heads, 200, 16)
    expected = attend_row(q, k, v, [Pick(ALL_HEADS, None, kept)], 0.3, softcap, 0.0)
    seen = kept.any(2)
    is_few = seen.sum(-1).amax(0) <= 50
    for x in (k, v):  # what was read would be seen
        x.masked_fill_((~seen & is_few[:, None])[..., None], torch.nan)
        x[:, :, 0] = x[:, :, 0].nan_to_num()  # which fills up
    torch.testing.assert_close(attend_row(q, k, v, picks, 0.3, softcap, 0.0), expected)
    few = [x for x in picks if x.keys is not None]
    assert len(few) == is_few.any()
    for heads, keys, _ in few:
        assert heads.tolist() == is_few.nonzero().flatten().tolist()
        assert keys.shape[2] == max(1, int(seen.sum(-1).amax(0)[is_few].max()))


def test_heads_that_keep_every_key_need_no_mask():
    kept = kept_keys((1, 0, 1))
    kept[:, 1, :, 5:9] = True
    assert [x.kept for x in pick(kept)] == [None, None, None]
    assert [x.kv_heads for x in pick(kept)[:2]] == [slice(0, 1), slice(2, 3)]


def test_gradients_of_a_row_are_those_of_dense_attention():
    kept = kept_keys((0.05, 0.5))
    q = torch.randn(2, 6, 1, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 200, 16, dtype=torch.float64)
    grads = []
    for picks in (pick(kept), [Pick(ALL_HEADS, None, kept)]):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        attend_row(*inputs, picks, None, None, 0.0).square().sum().backward()
        grads.append([x.grad for x in inputs])
    torch.testing.assert_close(*grads)


def test_equal_layers_are_compiled_once_and_later_forwards_not_at_all(ids):
    model = bare("llama")
    SparsePlan([PLAN.layers[0], PLAN.layers[0]]).apply(model)
    left = padding("left")
    rules.forget()
    compiled = []
    for mask in (None, None, left, left.clone(), padding("right")):
        with torch.no_grad():
            model(ids, attention_mask=mask)
        compiled.append(rules.compiled.cache_info().misses)
    assert compiled == [1, 1, 2, 2, 3]
    assert rules.compiled.cache_info().maxsize <= 256
    PLAN.remove(model)
    assert rules.compiled.cache_info().currsize == 0


def test_a_padding_mask_that_is_written_to_is_read_again(llama, ids):
    mask = padding("left")
    with torch.no_grad():
        llama(ids, attention_mask=mask)
        mask[:] = padding("right")
        out = llama(ids, attention_mask=mask).logits
        expected = llama(ids, attention_mask=padding("right")).logits
    assert torch.equal(out, expected)


def gradients(model, logits):
    model.zero_grad()
    logits.logsumexp(-1).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_are_those_of_dense_attention(llama, ids):
    mask = padding("left")
    real = mask.bool()
    with Reference(llama) as reference:
        expected = gradients(llama, reference(ids, mask)[real])
    logits = llama(ids, attention_mask=mask, position_ids=places(mask)).logits
    torch.testing.assert_close(gradients(llama, logits[real]), expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, ids):
    model = bare("llama", attention_dropout=0.3).train()
    PLAN.apply(model)
    torch.manual_seed(3)
    expected = gradients(model, model(ids, use_cache=False).logits)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    out = gradients(model, model(ids, use_cache=False).logits)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)


def test_attention_dropout_drops_in_training_alone(ids):
    model, plain = bare("llama", attention_dropout=0.3), tiny("llama")
    PLAN.apply(model)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        model.train()
        torch.manual_seed(5)
        once, other = model(ids).logits, model(ids).logits
        torch.manual_seed(5)
        assert torch.equal(model(ids).logits, once)
    assert not torch.allclose(once, other)


def test_compiled_models_give_the_same(llama, ids):
    torch.compiler.reset()
    mask = padding("left")
    expected = llama(ids, attention_mask=mask).logits
    out = torch.compile(llama, backend="aot_eager")(ids, attention_mask=mask).logits
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(llama, out), gradients(llama, expected))


def test_a_compiled_step_of_decoding_is_one_graph(llama, ids):
    torch.compiler.reset()
    cache = StaticCache(config=llama.config, max_cache_len=LENGTH + 8)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        same = copy.deepcopy(cache)
        step = torch.compile(llama, backend="eager", fullgraph=True)
        for _ in range(3):
            expected = llama(ids[:, :1], past_key_values=cache).logits
            torch.testing.assert_close(step(ids[:, :1], past_key_values=same).logits, expected)


def test_generate_compiles_its_steps(llama, ids):
    torch.compiler.reset()
    options = CompileConfig(backend="eager", mode=None)
    options._compile_all_devices = True
    static = {"cache_implementation": "static", "max_new_tokens": 6, **GREEDY}
    out = llama.generate(ids, compile_config=options, **static)
    assert torch.equal(out, llama.generate(ids, max_new_tokens=6, **GREEDY))


@pytest.mark.parametrize("make", [DynamicCache, functools.partial(StaticCache, max_cache_len=333)])
def test_spans_follow_the_number_of_keys(make, ids):
    model = tiny("llama")
    plan = SparsePlan([["causal & window(span(-20, 0.25))"] * 4, None])
    with torch.no_grad():
        plan.apply(model)
        out = model(ids).logits
        cache = make(config=model.config)
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache).logits
        SparsePlan([[f"causal & window({int(LENGTH * 0.25 - 20)})"] * 4, None]).apply(model)
        expected = model(ids).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache)
        expected_step = model(ids[:, -1:], past_key_values=cache).logits
    assert torch.equal(out, expected)
    assert torch.equal(step, expected_step)


def test_masks_may_read_the_head_and_tables(llama, ids):
    stripes = fs.lookup(torch.arange(LENGTH) % 7 == 0, fs.kv_idx)
    table = fs.lookup(torch.tensor([4, 8, 16, 1000]), fs.h)
    mask = (fs.q_idx - fs.kv_idx < table) | stripes
    model = copy.deepcopy(llama)
    SparsePlan([[mask] * 4, None]).apply(model)
    left = padding("left")
    with torch.no_grad():
        out = model(ids[:1], attention_mask=left[:1]).logits[:, 7:]
        expected = model(ids[:1, 7:]).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_a_step_of_decoding_refuses_what_no_block_mask_is_made_of(ids):
    model, table = bare("llama"), torch.arange(LENGTH + 7) % 7 == 0
    few = fs.lookup(torch.tensor([4, 8]), fs.h)  # of the two heads that have it
    heads = [fs.lookup(table, fs.kv_idx) | window(4)] * 2
    SparsePlan([[fs.q_idx - fs.kv_idx < few] * 2 + heads, None]).apply(model)
    left = padding("left")[:1]  # 7 tokens, which need no place in the table
    out = model.generate(ids[:1], attention_mask=left, max_new_tokens=15, **GREEDY)
    assert out.shape[1] == LENGTH + 15
    with pytest.raises(MaskError, match=r"bool\[157\] is read out of range"):
        model.generate(ids[:1], attention_mask=left, max_new_tokens=16, **GREEDY)
    with torch.no_grad():
        cache = model(ids).past_key_values
        table[:] = True
        with pytest.raises(MaskError, match="was written to"):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("q_len", [1, 40])
def test_functions_that_a_model_adds_to_its_mask_are_kept(q_len, llama):
    config = copy.deepcopy(llama.config)
    kinds = torch.arange(40) // 8
    cache = DynamicCache()
    past = torch.zeros(2, 2, 40 - q_len, 16)
    if q_len < 40:
        cache.update(past, past, 0)
    embeds = torch.zeros(2, q_len, 64)

    def sees_its_kind(b, h, q_idx, kv_idx):
        return kinds[q_idx] == kinds[kv_idx]

    asked = (config, embeds, None, cache if q_len < 40 else None)
    config._attn_implementation = "sdpa"
    expected = create_causal_mask(*asked, or_mask_function=sees_its_kind)
    config._attn_implementation = "flexsparse"
    mask = create_causal_mask(*asked, or_mask_function=sees_its_kind)
    everything = fs.per_head([fs.everything] * 4)
    if q_len == 1:
        kept = mask.and_also(everything)
    else:
        compiled = mask.compiled(everything, torch.device("cpu")).masks[0]
        kept = compiled(0, 0, torch.arange(40)[:, None], torch.arange(40))
    assert torch.equal(kept.expand(2, 4, q_len, 40), expected.expand(2, 4, q_len, 40))


def test_documents_that_a_model_adds_to_its_mask_may_be_padded(llama):
    config = copy.deepcopy(llama.config)
    documents = (torch.arange(40) // 11).expand(2, -1)
    padding = torch.ones(2, 40)
    padding[0, -6:] = 0
    asked = {"inputs_embeds": torch.zeros(2, 40, 64), "attention_mask": padding}
    asked["and_mask_function"] = packed_sequence_mask_function(documents)
    config._attn_implementation = "sdpa"
    expected = create_causal_mask(config, past_key_values=None, **asked)
    config._attn_implementation = "flexsparse"
    mask = create_causal_mask(config, past_key_values=None, **asked)
    (compiled,) = mask.compiled(fs.per_head([fs.everything])).masks
    rows, places = torch.arange(2)[:, None, None], torch.arange(40)
    assert torch.equal(compiled(rows, 0, places[:, None], places), expected[:, 0])


def test_encoders_run_without_a_plan():
    integration.register()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=97, intermediate_size=32, **sizes)).double().eval()
    ids, mask = torch.randint(97, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, -5:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        model.set_attn_implementation("flexsparse")
        out = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()])


def test_encoders_with_decoders_run_without_a_plan(ids):
    integration.register()
    config = BartConfig(init_std=0.2, forced_eos_token_id=None, **BART)
    model = BartForConditionalGeneration(config).double().eval()
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.set_attn_implementation("flexsparse")
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS = [
    BartConfig(**BART),
    BertConfig(vocab_size=97, is_decoder=True, add_cross_attention=True, **BERT),
    GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True),
]


@pytest.mark.parametrize("config", DECODERS, ids=["bart", "bert", "gpt2"])
def test_a_plan_is_for_what_a_decoder_sees_of_its_own_tokens(config, ids):
    config = copy.deepcopy(config)
    config.initializer_range = config.init_std = 0.2
    model = AutoModelForCausalLM.from_config(config).double().eval()
    encoded = {"encoder_hidden_states": torch.randn(2, 33, 32, dtype=torch.float64)}
    mask = causal & (sink(4) | window(9))
    places = torch.arange(LENGTH)
    dense = mask(0, 0, places[:, None], places).expand(2, 1, -1, -1)
    with torch.no_grad():
        expected = model(ids, attention_mask=dense, **encoded, use_cache=False).logits
        SparsePlan([[mask] * 2] * 2).apply(model)
        cache = model(ids[:, :-1], **encoded).past_key_values
        step = model(ids[:, -1:], past_key_values=cache, **encoded).logits
        out = model(ids, **encoded, use_cache=False).logits
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(step, expected[:, -1:])


def test_images_are_seen_both_ways_as_the_model_has_it(ids):
    vision = {"image_size": 28, "patch_size": 14, "num_hidden_layers": 3}
    vision |= {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**tiny_models.SIZES, **tiny_models.SLIDING}
    image = {"mm_tokens_per_image": 4, "image_token_index": 96}
    config = Gemma3Config(text_config=text, vision_config=vision, **image)
    model = Gemma3ForConditionalGeneration(config).double().eval()
    ids = ids.clamp(max=95)
    ids[:, 5:9] = 96
    inputs = {"input_ids": ids, "token_type_ids": (ids == 96).long(), "use_cache": False}
    inputs["pixel_values"] = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    plan_of(tiny_models.WINDOWS, past="").apply(model)
    with torch.no_grad():
        out = model(**inputs).logits
        model.set_attn_implementation({"text_config": "dense"})
        tiny_models.dense.places = torch.arange(LENGTH).expand(2, -1)
        torch.testing.assert_close(out, model(**inputs).logits, atol=1e-5, rtol=0)


def test_plans_come_off_again(ids):
    model = bare("llama")
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(ids).logits
        PLAN.apply(model)
        other = SparsePlan([None, ["causal & window(3)"] * 4])
        other.apply(model)
        sparse = model(ids).logits
        other.remove(model)
        assert torch.equal(model(ids).logits, expected)
    assert model.config._attn_implementation == "sdpa"
    assert not torch.allclose(sparse, expected)
    assert not any(attention.HEADS in vars(module) for module in model.modules())
    other.remove(model)  # nothing is on it any more


def test_plans_go_on_compiled_and_on_copied_models(llama, ids):
    twin = copy.deepcopy(llama)
    plan = SparsePlan([["causal & window(3)"] * 4, None])
    plan.apply(torch.compile(twin, backend="eager"))
    with torch.no_grad():
        assert not torch.allclose(twin(ids).logits, llama(ids).logits)
        expected = llama(ids).logits
        PLAN.apply(twin)
        assert torch.equal(twin(ids).logits, expected)


def test_plans_go_through_what_wraps_a_model(ids):
    class Adapter(torch.nn.Module):  # as those of PEFT
        def __init__(self, model):
            super().__init__()
            self.model = model

        def __getattr__(self, name):
            return self._modules.get(name) or getattr(self._modules["model"], name)

    model = bare("llama")
    with torch.no_grad():
        expected = model(ids).logits
        PLAN.apply(Adapter(model))
        assert not torch.allclose(model(ids).logits, expected)
    PLAN.remove(model)
    assert model.config._attn_implementation == "sdpa"


LAYER = ["causal"] * 4
MISTAKES = [
    (SparsePlan([LAYER]), "The plan has 1 layers and the model \\(llama\\) has 2"),
    (SparsePlan([LAYER[:3], None]), "The plan has 3 query heads and the model \\(llama\\) has 4"),
]


@pytest.mark.parametrize(("plan", "message"), MISTAKES)
def test_a_plan_for_another_model_is_refused(plan, message, llama):
    with pytest.raises(MaskError, match=message):
        plan.apply(llama)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), None, "llama"])
def test_what_is_no_model_of_transformers_is_refused(model):
    for call in (PLAN.apply, PLAN.remove):
        with pytest.raises(MaskError, match="whose attention cannot be swapped"):
            call(model)


def small(config, **sizes):
    import transformers

    config = getattr(transformers, f"{config}Config")(vocab_size=97, **sizes)
    names = transformers.models.auto.modeling_auto.MODEL_MAPPING
    return names[type(config)](config)


def test_models_whose_attention_cannot_be_swapped_are_refused():
    falcon = small("Falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    before = falcon.config._attn_implementation
    with pytest.raises(MaskError, match="The attention of FalconModel cannot be swapped"):
        PLAN.apply(falcon)
    assert falcon.config._attn_implementation == before
    vit = small("ViT", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    before = vit.config._attn_implementation
    with pytest.raises(MaskError, match=r"No attention of ViTModel says which layer it is in"):
        PLAN.apply(vit)
    assert vit.config._attn_implementation == before
    mamba = small("Mamba", hidden_size=64, num_hidden_layers=2)
    with pytest.raises(MaskError, match="has no num_attention_heads"):
        PLAN.apply(mamba)
    t5 = small("T5", d_model=64, num_layers=2, num_heads=4, d_ff=64)
    with pytest.raises(MaskError, match="has an encoder too"):
        PLAN.apply(t5)


class Forgetful(DynamicCache):
    """A cache that drops keys and does not tell the mask."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys[:, :, 4:], values[:, :, 4:]


REFUSED = [
    (
        {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)},
        "its mask is a Tensor",
    ),
    ({"attention_mask": torch.ones(2, LENGTH, LENGTH)}, r"attention_mask is \(2, 150, 150\)"),
    ({"past_key_values": Forgetful()}, "its cache gives 146 keys and told the model's mask of 150"),
    ({"cu_seq_lens_q": torch.tensor([0, 70, LENGTH])}, "its sequences are packed"),
    ({"output_attentions": True}, "the weights that output_attentions=True asks for"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_no_mask_can_say_is_refused_in_a_sentence(arguments, message, llama, ids):
    with pytest.raises(ExecutorError, match=message):
        llama(ids, **arguments)


def test_a_lost_mask_is_refused(llama, ids):
    from transformers.masking_utils import AttentionMaskInterface

    own = AttentionMaskInterface._global_mapping.pop("flexsparse")
    try:
        with pytest.raises(ExecutorError, match="hands over no mask, and its causality would be"):
            llama(ids)
    finally:
        AttentionMaskInterface.register("flexsparse", own)


def test_learned_sinks_are_refused(llama):
    layer = llama.model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16)
    with pytest.raises(ExecutorError, match=r"a learned term in the softmax \(s_aux\)"):
        attention.attention_forward(layer, q, k, k, None, s_aux=torch.zeros(4))


def test_models_that_read_their_masks_themselves_are_refused():
    mask = integration.model_mask(1, 4, 4, mask_function=causal)
    with pytest.raises(ExecutorError, match="reads its mask as a tensor"):
        mask[:, 0]


def test_a_missing_or_old_transformers_is_one_sentence():
    with (
        mock.patch.dict("sys.modules", {"transformers.masking_utils": None}),
        pytest.raises(MaskError, match=r"pip install 'flexsparse\[hf\]'"),
    ):
        integration.register()


def test_the_example_of_the_guide_runs(tmp_path, monkeypatch):
    guide = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text()
    code = guide.split("```python\n")[1].split("```")[0]
    sizes = {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
    model = bare("llama", **sizes)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert SparsePlan.load("plan.json") == names["plan"]
    assert model.config._attn_implementation == "sdpa"


def test_heads_split_over_devices_are_refused(llama):
    layer = llama.model.layers[0].self_attn
    q, k = torch.zeros(1, 2, 1, 16), torch.zeros(1, 1, 1, 16)
    mask = integration.model_mask(1, 1, 1, mask_function=causal)
    with pytest.raises(ExecutorError, match="has 4 query heads and this layer computes 2"):
        attention.attention_forward(layer, q, k, k, mask)
