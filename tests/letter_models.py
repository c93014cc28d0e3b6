"""Tiny random language models that read letters, and their tokenizer: no weights are needed."""

import torch

N_HEADS, VOCABULARY = 4, 97


class Letters:
    """A tokenizer: a letter is a token."""

    def __init__(self, bos_token_id=0):
        self.bos_token_id = bos_token_id

    def __call__(self, text, add_special_tokens=True):
        ids = [1 + (ord(letter) - ord("a")) % (VOCABULARY - 1) for letter in text]
        return type("Encoding", (), {"input_ids": ids})()


def tiny(family, **changes):
    """A causal language model of 4 layers with 4 query heads; Gemma's even ones have windows."""
    import transformers

    name = {"llama": "Llama", "gemma2": "Gemma2", "gemma3": "Gemma3Text"}[family]
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": 0.3,
        **changes,
    }
    if family != "llama":
        options |= {
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        }
    if family == "gemma2":
        options |= {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    # transformers lets no Gemma 2 run on sdpa, which has no soft cap
    attention = "eager" if family == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()
