"""A video diffusion transformer of diffusers whose self-attention is sparse, each head in its way.

    python examples/video_diffusion.py --frames 7 --height 30 --width 52

`sparsify(pipe.transformer, layers)` gives masks to the Wan model of a pipeline, for videos of any
size. Here it is a tiny random one: its first layer stays dense, one has the spatial and temporal
heads of Sparse VideoGen, one has neighborhoods. The last lines compare output and gradients with
diffusers' own attention under the same masks, dense. Tried with diffusers 0.42.1.
"""

import argparse
from math import prod

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

import flexsparse as fs
from flexsparse.masks import neighborhood, spatial_head, temporal_head


def spatial_and_temporal(n_heads, frames, height, width):
    """Half of the heads see the frames round theirs, half their place in all frames."""
    place, half = height * width, n_heads // 2
    spatial = spatial_head(0, place, width=1, round_width=1)
    return [spatial] * half + [temporal_head(0, frames, place, width=1)] * (n_heads - half)


def near_or_far(n_heads, frames, height, width):
    """Half of the heads see half of 3 frames, half a fifth of all frames; rows are seen whole."""
    size, half = (frames, height, width), n_heads // 2
    near, far = (min(3, frames), height // 2, width), (frames, height // 5, width)
    return [neighborhood(size, near)] * half + [neighborhood(size, far)] * (n_heads - half)


class SparseSelfAttention(WanAttnProcessor):
    """A mask for each head of Wan's self-attention; attention to text is diffusers' own.

    masks: the masks of the heads, by (n_heads, frames, height, width); a video is counted in tokens
    compiled: by size of the video and device, what they became
    """

    def __init__(self, masks, block_size=128):
        super().__init__()
        self.masks, self.block_size, self.compiled = masks, block_size, {}

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ):
        """What WanAttnProcessor does, with its attention replaced."""
        if encoder_hidden_states is not None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        if attention_mask is not None:
            raise ValueError("Sparse self-attention takes no attention_mask: put it in the masks.")
        size = rotary_emb and getattr(rotary_emb[0], "video_size", None)
        if size is None:
            raise ValueError("rotary_emb does not say the size of the video: sparsify the model.")
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        qkv = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        q, k, v = (x.transpose(1, 2) for x in qkv)  # [B, n_heads, tokens, head_dim]
        rotation = [x[0, :, 0] for x in rotary_emb]  # [tokens, head_dim]
        q, k = (apply_rotary_emb(x, rotation) for x in (q, k))
        if (size, q.device) not in self.compiled:
            self.compile_masks(attn.heads, size, q.device)
        out = self.compiled[size, q.device](q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))

    @torch.compiler.disable(reason="run the model on a video of this size before you compile it")
    def compile_masks(self, n_heads, size, device):
        """Compile the masks for a size of video, once."""
        mask, tokens = fs.per_head(self.masks(n_heads, *size)), prod(size)
        self.compiled[size, device] = fs.compile_mask(
            mask, tokens, tokens, device=device, block_size=self.block_size
        )


def sparsify(model, layers, block_size=128):
    """Give each self-attention of a Wan model masks, as SparseSelfAttention takes them, or None.

    None leaves a layer as it is. `model.set_attn_processor(before)` undoes it all, where `before`
    was `model.attn_processors`.
    """
    found = [x for x in model.modules() if isinstance(x, WanAttention) and not x.is_cross_attention]
    if len(layers) != len(found):
        raise ValueError(f"Got {len(layers)} layers; the model has {len(found)} self-attentions.")
    model.rope.register_forward_hook(say_size)
    processors = {masks: SparseSelfAttention(masks, block_size) for masks in layers if masks}
    for attn, masks in zip(found, layers, strict=True):
        if masks:
            attn.set_processor(processors[masks])


def say_size(rope, inputs, rotary_emb):
    """The embedding tells its layers the size of the video, also when they are checkpointed."""
    latent = inputs[0].shape[2:]  # (frames, height, width), the order of its tokens
    rotary_emb[0].video_size = tuple(n // p for n, p in zip(latent, rope.patch_size, strict=True))


def difference(found, expected):
    """The largest difference of two lists of tensors, by the largest number of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(((x - true).abs().max() / true.abs().max()).item() for x, true in pairs)


def main(options):
    """Run a model with sparse attention, and with dense attention under the same masks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"num_attention_heads": options.heads, "attention_head_dim": options.head_dim}
    small = {"num_layers": 3, "text_dim": 64, "freq_dim": 64, "ffn_dim": 256}
    model = WanTransformer3DModel(**sizes, **small).to(device)
    shape = options.batch, 16, options.frames, options.height, options.width
    video, text = torch.randn(shape), torch.randn(options.batch, 32, 64)
    inputs = [x.to(device) for x in (video, torch.full(shape[:1], 500), text)]

    def run():
        """The output, and the gradients of all weights."""
        with torch.no_grad():
            out = model(*inputs).sample
        loss = model(*inputs).sample.square().mean()
        return [out, *torch.autograd.grad(loss, list(model.parameters()))]

    # 1. The first layer dense, the others sparse
    before = model.attn_processors
    sparsify(model, [None, spatial_and_temporal, near_or_far], options.block_size)
    found = run()
    sparse = [block.attn1 for block in model.blocks[1:]]
    for attn in sparse:
        print(*attn.processor.compiled.values())

    # 2. The same by diffusers, which takes a mask [1, n_heads, tokens, tokens]
    size = options.frames, options.height // 2, options.width // 2
    places = torch.arange(prod(size), device=device)
    for attn in sparse:
        heads = attn.processor.masks(options.heads, *size)
        dense = torch.stack([mask(0, 0, places[:, None], places) for mask in heads])[None]
        attn.register_forward_pre_hook(lambda _, x, dense=dense: (*x[:2], dense, *x[3:]))
    model.set_attn_processor(before)
    expected = run()
    print(f"difference from dense attention: {difference(found[:1], expected[:1]):.2g}")
    print(f"of gradients: {difference(found[1:], expected[1:]):.2g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="2 for classifier-free guidance")
    parser.add_argument("--frames", type=int, default=7, help="of the latent video")
    parser.add_argument("--height", type=int, default=30, help="of it; a token has 2")
    parser.add_argument("--width", type=int, default=52, help="of it; a token has 2")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--block-size", type=int, default=64, help="128 for frames of 1,000 tokens")
    main(parser.parse_args())
