"""Tiny random models of each family, and dense attention to compare them with.

The reference is its own attention implementation of transformers: the dense mask that the library
makes for SDPA, ANDed with dense windows counted from the start of each sequence.
"""

import copy

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from flexsparse.plan import SparsePlan

transformers.logging.set_verbosity_error()

SINK = 3
# the windows of the heads of each layer; None is what the model has
WINDOWS = [[5, 9, 30, None], [7, 50, None, 4]]


def plan_of(windows, past="causal & "):
    return SparsePlan(
        [[w and f"{past}(sink({SINK}) | window({w}))" for w in layer] for layer in windows]
    )


PLAN = plan_of(WINDOWS)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 20}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CHUNKED = {"attention_chunk_size": 16, "moe_layers": [], "intermediate_size_mlp": 96}
# a family: the name of its config, and what it has besides SIZES
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", SLIDING),
    "gemma2": ("Gemma2Config", SLIDING),  # it has a soft-cap too
    "gemma3": ("Gemma3TextConfig", SLIDING),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {**SLIDING, **EXPERTS}),
    "llama4": ("Llama4TextConfig", CHUNKED),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}


def tiny(family, dtype=torch.float64):
    """A model under PLAN. float64 runs blockwise, which has nothing to compile."""
    model = bare(family, dtype)
    PLAN.apply(model)
    return model


def bare(family, dtype=torch.float64, **extra):
    """A model as it comes, with other sizes where `extra` has them."""
    config, more = FAMILIES[family]
    config = getattr(transformers, config)(**{**SIZES, **more, **extra})
    # a config remembers the implementation, so no two models may share one
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()
    if family == "mixtral":
        model.set_experts_implementation("eager")  # the grouped one has no float64
    return model


def places(attention_mask):
    """The position of each token in its sequence: padding before it is not counted."""
    first = attention_mask.argmax(1, keepdim=True)
    return (torch.arange(attention_mask.shape[1]) - first).clamp(min=0)


def dense(module, q, k, v, mask, scaling, dropout=0.0, softcap=None, **_):
    n_heads, q_len, group = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    place = dense.places
    q_place, kv_place = place[:, -q_len:, None], place[:, None]
    for head, window in enumerate(WINDOWS[module.layer_idx]):
        kept = (kv_place < SINK) | (q_place - kv_place < (window or 1 << 30))
        mask = mask.expand(-1, n_heads, -1, -1).clone() if mask.shape[1] == 1 else mask
        mask[:, head] &= kept
    scores = q @ k.repeat_interleave(group, 1).mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -1e30).softmax(-1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2), None


def dense_mask(**arguments):
    return sdpa_mask(**{**arguments, "allow_is_causal_skip": False})


AttentionInterface.register("dense", dense)
AttentionMaskInterface.register("dense", dense_mask)


class Reference:
    """The model with dense attention, while it is entered; it keeps no cache."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation("dense")
        return self

    def __exit__(self, *_):
        self.model.set_attn_implementation(self.before)

    def __call__(self, ids, attention_mask=None):
        dense.places = places(torch.ones_like(ids) if attention_mask is None else attention_mask)
        return self.model(
            ids, attention_mask=attention_mask, position_ids=dense.places, use_cache=False
        ).logits

    def generate(self, ids, attention_mask, n):
        """n greedy tokens, each from the whole text before it."""
        for _ in range(n):
            best = self(ids, attention_mask)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(best)], 1)
        return ids
