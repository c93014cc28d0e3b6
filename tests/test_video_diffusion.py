"""The Wan model of diffusers with a mask for each head, by examples/video_diffusion.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import video_diffusion as example
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from flexsparse import MaskError
from flexsparse.masks import neighborhood, spatial_head, temporal_head

# latent videos of 150 tokens, upright and lying
UPRIGHT, LYING = (3, 20, 10), (3, 10, 20)


def four_heads(n_heads, frames, height, width):
    place, size = height * width, (frames, height, width)
    return [
        spatial_head(0, place, width=1, round_width=1),
        temporal_head(0, frames, place, width=1),
        neighborhood(size, (1, 3, 3)),
        neighborhood(size, (frames, 1, 3)),
    ]


LAYERS = [None, four_heads, example.near_or_far]


class Dense(WanAttnProcessor):
    """diffusers' attention, given the masks token by token."""

    def __init__(self, masks, latent):
        super().__init__()
        size = latent[0], latent[1] // 2, latent[2] // 2
        place = torch.arange(size[0] * size[1] * size[2])
        heads = [mask(0, 0, place[:, None], place) for mask in masks(4, *size)]
        self.mask = torch.stack(heads)[None]

    def __call__(self, attn, hidden_states, text, attention_mask, rotary_emb):
        return super().__call__(attn, hidden_states, text, self.mask, rotary_emb)


def wan():
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 3}
    small = {"text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    return WanTransformer3DModel(**sizes, **small)


def video(latent):
    """Two rows of video, time and text, as classifier-free guidance has."""
    return torch.randn(2, 16, *latent), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 16)


def under_dense_masks(model, latent):
    for block, masks in zip(model.blocks, LAYERS, strict=True):
        block.attn1.set_processor(Dense(masks, latent) if masks else WanAttnProcessor())


def output_and_gradients(model, inputs):
    out = model(*inputs).sample
    return [out, *torch.autograd.grad(out.sin().sum(), list(model.parameters()))]


def test_output_and_gradients_are_those_under_dense_masks():
    model, inputs = wan(), video(UPRIGHT)
    example.sparsify(model, LAYERS)
    found = output_and_gradients(model, inputs)
    under_dense_masks(model, UPRIGHT)
    assert example.difference(found, output_and_gradients(model, inputs)) < 1e-5


def test_each_size_is_compiled_once():
    model = wan()
    example.sparsify(model, LAYERS)
    processor = model.blocks[1].attn1.processor
    model(*video(UPRIGHT))
    first = dict(processor.compiled)
    model(*video(LYING))
    model(*video(UPRIGHT))
    assert len(processor.compiled) == 2
    assert all(processor.compiled[key] is attend for key, attend in first.items())


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_as_exact_as_dense_attention(autocast):
    model, inputs = wan(), video(UPRIGHT)
    under_dense_masks(model, UPRIGHT)
    exact = model(*inputs).sample
    if not autocast:
        model, inputs = model.bfloat16(), [x.bfloat16() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dense = model(*inputs).sample
        example.sparsify(model, LAYERS)
        sparse = model(*inputs).sample
    assert sparse.dtype == dense.dtype
    assert (sparse - exact).abs().max() <= 2 * (dense - exact).abs().max()


def test_checkpointed_layers_remember_their_video():
    model, inputs = wan(), [video(UPRIGHT), video(LYING)]
    example.sparsify(model, [None, None, four_heads])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        sum(model(*x).sample.sin().sum() for x in inputs).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert example.difference(*gradients) < 1e-5


def test_attention_to_text_is_that_of_diffusers():
    model = wan()
    before = [block.attn2.processor for block in model.blocks]
    example.sparsify(model, LAYERS)
    assert [block.attn2.processor for block in model.blocks] == before
    attn, tokens, text = model.blocks[1].attn2, torch.randn(2, 150, 48), torch.randn(2, 7, 48)
    expected = attn(tokens, text)
    attn.set_processor(model.blocks[1].attn1.processor)
    assert attn(tokens, text).equal(expected)


def test_fused_projections_give_the_same():
    model, inputs = wan(), video(UPRIGHT)
    example.sparsify(model, LAYERS)
    expected = model(*inputs).sample
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(*inputs).sample, expected)


def test_what_the_model_had_comes_back():
    model, inputs = wan(), video(UPRIGHT)
    expected, before = model(*inputs).sample, model.attn_processors
    example.sparsify(model, LAYERS)
    assert not model(*inputs).sample.allclose(expected)
    model.set_attn_processor(before)
    assert model(*inputs).sample.equal(expected)


def test_mistakes_are_named():
    model = wan()
    with pytest.raises(ValueError, match="Got 2 layers; the model has 3 self-attentions"):
        example.sparsify(model, LAYERS[:2])
    model.set_attn_processor(example.SparseSelfAttention(four_heads))
    with pytest.raises(ValueError, match="does not say the size of the video"):
        model(*video(UPRIGHT))
    example.sparsify(model, [lambda *sizes: four_heads(*sizes)[:3]] * 3)
    with pytest.raises(MaskError, match="The mask has 3 heads but q has 4"):
        model(*video(UPRIGHT))
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model.blocks[0].attn1(torch.randn(2, 150, 48), None, torch.ones(2, 150))


@pytest.mark.slow
def test_a_compiled_model_is_one_graph():
    model, inputs = wan(), video(UPRIGHT)
    example.sparsify(model, [None, None, example.near_or_far])
    with torch.no_grad():
        expected = model(*inputs).sample
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(*inputs).sample, expected)
        with pytest.raises(RuntimeError, match="run the model on a video of this size"):
            compiled(*video(LYING))


@pytest.mark.slow
def test_the_example_runs():
    small = ["--frames", "3", "--height", "20", "--width", "20", "--head-dim", "12"]
    done = subprocess.run(
        [sys.executable, example.__file__, *small], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "4 heads, 300 queries x 300 keys" in done.stdout
    differences = re.findall(r"(?:attention|gradients): (\S+)", done.stdout)
    assert len(differences) == 2
    assert all(float(difference) < 1e-5 for difference in differences)
