"""Write docs/systems.md: which published pattern is which mask, and which is none, and why.

    python docs/make_systems.py

What a pattern keeps, its picture and its source are read from the docstrings of flexsparse.masks.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import NamedTuple

import flexsparse.masks as library
from flexsparse import Mask

PAGE = Path(__file__).with_name("systems.md")

EXACT = "exact"
TENSOR = "exact, given a tensor"
SCORE = "a score"
NOT = "not a mask"


class System(NamedTuple):
    """A row of the table.

    name: of the system
    kind: EXACT, TENSOR (an estimator's or a plan's), SCORE, or NOT
    here: how it is written with flexsparse; names of patterns in backticks
    note: what the tensor is, what is left out, or why it is not a mask
    """

    name: str
    kind: str
    here: str
    note: str


SYSTEMS = [
    System(
        "AdaSpa",
        TENSOR,
        "`block_sparse(table, 64)`",
        "the blocks found at its search steps, as the paper describes them",
    ),
    System("ALiBi", SCORE, "`score_mod=`", "attention-gym's generate_alibi_bias, next to any mask"),
    System(
        "AnchorAttention",
        TENSOR,
        "`causal & block_sparse(table, (2048, 1))`",
        "columns picked for each 16 blocks of rows; the anchor region set in the same table",
    ),
    System(
        "AttaNet", NOT, "", "pools the keys of a column into one; axial(shape, 0) is only related"
    ),
    System("AttendNeXt", NOT, "", "convolutions; no pair of a query and a key is ever scored"),
    System("Axial Attention", EXACT, "`axial`", ""),
    System(
        "BD3-LMs",
        EXACT,
        "`block_diffusion`; decoding `frame_causal(block_size)`",
        "block diffusion; also the training mask of SDAR (for one sample), Fast-dLLM v2 and LLaDA2",
    ),
    System("BigBird", EXACT, "`bigbird`", "its random blocks are a tensor"),
    System(
        "Bifurcated attention",
        EXACT,
        "`bifurcated`, `shared_prefix`",
        "the context is stored once; that the batch then shares it is the layout, not the mask",
    ),
    System(
        "BLASST",
        TENSOR,
        "`causal & block_sparse(table)`",
        "as the paper describes it: the blocks that its threshold left, which are known only after "
        "their scores",
    ),
    System(
        "Block-Attention, parallel context windows",
        EXACT,
        "`causal & (same_document(ids) | (q_idx >= context_len))`",
        "as the papers describe them: passages read alone, then a question that sees all; their "
        "re-counted positions are not a mask",
    ),
    System(
        "Block-Sparse-Attention",
        EXACT,
        "`block_sparse_attention`; head by head `full`, `causal`, `token_streaming`, "
        "`block_streaming`, `block_sparse`",
        "an empty row has LSE -inf here and +inf there; the output is 0 in both",
    ),
    System(
        "Block (chunked) attention", EXACT, "`chunked`", "Llama 4's chunks; Swin by neighborhood"
    ),
    System(
        "CausVid, Self Forcing",
        EXACT,
        "`frame_causal(size)`; with a window "
        "`frame_causal(size) & (kv_idx >= (q_idx // size + 1) * size - w)`; teacher forcing "
        "`block_diffusion(seq_len, size, clean_first=True)`",
        "size: the tokens of a chunk of frames",
    ),
    System("CHELA", NOT, "", "linear attention between convolutions; there is no softmax to mask"),
    System(
        "Combiner",
        EXACT,
        "`combiner_fixed`",
        "Combiner-Fixed, a mask over the tokens and the summaries appended to them; the summaries "
        "are computed outside. The axial variants nest one attention in another: not a mask",
    ),
    System(
        "DeepSeek-V3.2, GLM-5 (DSA)",
        TENSOR,
        "`causal & block_sparse(table, 1)`",
        "the keys that the indexer picks for each query, the same for all heads: exact, but blocks "
        "of 128 skip little",
    ),
    System(
        "DeepSeek-V4",
        TENSOR,
        "`(causal & window(w) & (kv_idx < seq_len)) | "
        "((kv_idx >= seq_len) & (kv_idx - seq_len < (q_idx + 1) // rate))`",
        "its heavily compressed layers, over the tokens and the entries appended to them; the "
        "compressed sparse layers keep of the entries those of a table. The learned sink is as in "
        "GPT-OSS",
    ),
    System(
        "Delta Attention",
        NOT,
        "",
        "adds to the output under a mask, any mask, a difference taken at a few dense rows",
    ),
    System(
        "DFlash, JetSpec",
        EXACT,
        "`dflash`",
        "the training of the drafter, given its anchors; JetSpec's is causal inside a block",
    ),
    System(
        "Differential Transformer",
        NOT,
        "",
        "the difference of two softmaxes; each of them takes any mask",
    ),
    System(
        "Double Sparsity",
        TENSOR,
        "`causal & kept_keys(bits)`",
        "the heavy tokens of each head, picked by a few channels",
    ),
    System(
        "DuoAttention",
        EXACT,
        "`duo_attention`, `duo_streaming`",
        "given which heads it found to be retrieval heads",
    ),
    System(
        "Dynamic Mask Attention",
        TENSOR,
        "`causal & kept_keys(bits)`",
        "the top keys by its gate; the gate's bias is a score_mod",
    ),
    System(
        "Efficient-vDiT",
        EXACT,
        "`attention_tile`",
        "as the paper describes it; its search picks the reference frames",
    ),
    System(
        "Flamingo (attention-gym)",
        EXACT,
        "`(lookup(start, kv_idx // size) <= q_idx) & (q_idx < lookup(end, kv_idx // size))`",
        "keys are images of `size` tokens; each is seen by an interval of the text",
    ),
    System(
        "FlashAttention-2",
        EXACT,
        "`full`, `causal`, `causal & window(size)`, `packed`",
        "a dense kernel; window_size=(size - 1, 0), and bottom-right as here",
    ),
    System(
        "FlashMask",
        EXACT,
        "`flashmask`",
        "its tensor as it is; its block_mask is & block_sparse(block_mask.bool())",
    ),
    System(
        "FlashInfer (block-sparse)",
        TENSOR,
        "`block_sparse(table, (rows, columns))`",
        "BlockSparseAttentionWrapper with R = rows and C = columns",
    ),
    System(
        "FlexAttention blog",
        EXACT,
        "`causal`, `window`, `prefix`, `same_document`, `packed`, `neighborhood`",
        "its sliding window of W is causal & window(W + 1)",
    ),
    System(
        "FlexPrefill",
        TENSOR,
        "`vertical_slash(vertical, slash, 128)`; query-aware heads `causal & block_sparse(table)`",
        "columns and diagonals of blocks, estimated from the last 128 queries",
    ),
    System(
        "Forgetting Transformer",
        SCORE,
        "`score_mod=`",
        "c[h][q_idx] - c[h][kv_idx], where c sums the log forget gates; next to `causal`",
    ),
    System(
        "Gemma 3",
        EXACT,
        "`causal | clusters(image)`, `(causal & window(size)) | clusters(image)`",
        "the image of each token, negative for text; text alone needs no tensor",
    ),
    System(
        "Gist tokens",
        EXACT,
        "`causal & ((kv_idx >= start) | (q_idx < end))`",
        "gist tokens stand at start to end - 1; after them nothing before them is seen",
    ),
    System(
        "GPT-OSS",
        EXACT,
        "`causal`, `causal & window(128)`",
        "the learned sink of a head is no key: multiply the output by sigmoid(lse - sink)",
    ),
    System(
        "H2O, SnapKV, PyramidKV",
        TENSOR,
        "`causal & (q_idx < lookup(dropped, h, kv_idx))`",
        "dropped: the first query that no longer sees a key, past all queries for one that stays. "
        "SnapKV and PyramidKV drop at the end of the prompt, H2O while decoding; to skip the keys "
        "of a decoded token, give `kept_keys` its bits",
    ),
    System(
        "HashAttention, TokenSelect, Twilight",
        TENSOR,
        "`causal & kept_keys(bits)`",
        "as the papers describe them: the tokens picked for a decoded token, by hashes, by a vote "
        "of heads, or down to a probability",
    ),
    System(
        "HSTU",
        NOT,
        "",
        "SiLU of each score and no softmax; which pairs it keeps is a mask all the same",
    ),
    System(
        "HyperAttention",
        NOT,
        "",
        "its sampled keys carry the weight of those left out, and may count twice: a reweighted "
        "estimate. Its sorted blocks alone are clusters(rank_q // block, rank_k // block)",
    ),
    System(
        "Infini-attention",
        NOT,
        "",
        "a memory read by linear attention is mixed in by a gate; the rest of it is chunked",
    ),
    System(
        "InfLLM-V2 (MiniCPM4)",
        TENSOR,
        "`causal & block_sparse(table, (1, 64))`",
        "the blocks of keys of each query, the first and the local ones among them",
    ),
    System(
        "Kimi Linear, Lightning Attention",
        NOT,
        "",
        "linear attention, without a softmax; their full layers are causal",
    ),
    System(
        "Landmark attention",
        NOT,
        "",
        "a softmax in each block, times the weight of its landmark",
    ),
    System(
        "LM-Infinite",
        EXACT,
        "`token_streaming`",
        "its global_branch and local_branch; distances cut at a limit are positions, not a mask",
    ),
    System(
        "LongGen",
        EXACT,
        "`longgen`",
        "as the paper describes it; its code and block sizes are not published",
    ),
    System("Longformer", EXACT, "`longformer`", ""),
    System(
        "LongLoRA",
        EXACT,
        "`causal & chunked(size)`; the second half of the heads "
        "`causal & ((q_idx + size // 2) // size).equals((kv_idx + size // 2) // size)`",
        "as its flash-attention code has it; without that, the shift wraps round",
    ),
    System(
        "LongNet",
        NOT,
        "",
        "several softmaxes, merged by their denominators: a key in two of them counts twice",
    ),
    System(
        "LServe",
        EXACT,
        "`lserve`; the pages when decoding: `kept_keys(pages, 64)`",
        "the prefill; the pages are a tensor of its page selector",
    ),
    System(
        "MagiAttention",
        EXACT,
        "`attention_slices`",
        "its ranges and types as they are; how it spreads them over GPUs is not a mask",
    ),
    System(
        "MagicPIG",
        NOT,
        "",
        "as the paper describes it: keys sampled by hashes, and weighted by how likely that was",
    ),
    System(
        "MInference",
        TENSOR,
        "`a_shape`, `tri_shape`, `vertical_slash`, `causal & block_sparse(table, 64)`",
        "A-shape and tri-shape need no tensor. Vertical-slash is the rule of the paper; the "
        "released kernel widens each diagonal to 64 keys and keeps a superset",
    ),
    System(
        "MiniMax-M3",
        TENSOR,
        "`causal & block_sparse(table, (1, size))`",
        "the blocks of keys of each query and group of heads, the local ones among them",
    ),
    System(
        "MLA",
        NOT,
        "",
        "how keys and values are stored; takes any mask",
    ),
    System(
        "MMInference",
        EXACT,
        "`mminference_grid`, `a_shape`, `vertical_slash`",
        "the grid of its search; its kernel merges two passes in which a key may count twice. "
        "Heads with tables for each modality are the union of "
        "`lookup(modality, q_idx).equals(m) & vertical_slash(vertical_m, slash_m)`",
    ),
    System(
        "MoA",
        EXACT,
        "`moa`",
        "the run-time spans, given alpha and beta of each head; its search uses one block more",
    ),
    System(
        "MoBA",
        TENSOR,
        "`causal & block_sparse(table, (1, size))`",
        "the blocks of keys that its gate picks for each query, the query's own among them",
    ),
    System(
        "MTraining",
        TENSOR,
        "`vertical_slash_blocks`",
        "the mask of each shard; the ring that moves the keys is not a mask",
    ),
    System("Mustafar", NOT, "", "drops elements of key and value vectors; every pair stays"),
    System("N:M sparse training (BDWP)", NOT, "", "prunes weights; every pair stays"),
    System(
        "Native Sparse Attention",
        NOT,
        "",
        "three softmaxes, mixed by learned gates: three masks, one of them over pooled keys",
    ),
    System(
        "NATTEN",
        EXACT,
        "`neighborhood`",
        "1-D to 3-D, stride, dilation, causal axes; its functions and modules are in "
        "flexsparse.compat.natten",
    ),
    System(
        "Orion-MSP",
        EXACT,
        "`orion_msp`",
        "as documented, and as released (as_released=True), where the window is lost",
    ),
    System(
        "PAROAttention",
        TENSOR,
        "`block_sparse(table, block_size)`",
        "on tokens permuted by its axis order, as the paper describes it; its quantisation is not "
        "a mask",
    ),
    System(
        "PBS-Attn",
        TENSOR,
        "`block_sparse(table) & (lookup(original, h, kv_idx) <= q_idx)`",
        "on keys sorted inside segments; the second term is causal by original positions",
    ),
    System("Phi-3-small", EXACT, "`phi3_small`", "the names and defaults of its configuration"),
    System("Prefix-LM", EXACT, "`prefix`", "one length, or one for each batch row"),
    System(
        "QK-sparse, hash-sparse (SCFA)", TENSOR, "`qk_sparse`, `hash_sparse`", "bits, and hashes"
    ),
    System(
        "Quest", TENSOR, "`causal & kept_keys(pages, 16)`", "the pages picked for a decoded token"
    ),
    System(
        "Radial Attention",
        EXACT,
        "`radial_attention`",
        "the blocks of the released code, which rounds the bands of the paper",
    ),
    System(
        "Relative position", SCORE, "`score_mod=`", "a term added to the score, next to any mask"
    ),
    System(
        "Ring attention, Ulysses",
        NOT,
        "",
        "where keys are; examples/context_parallel.py runs any mask so",
    ),
    System(
        "Routing Transformer",
        TENSOR,
        "`clusters`",
        "hard assignment, a token in one cluster. Balanced clusters overlap, with a softmax each: "
        "not one mask",
    ),
    System(
        "S2-Attention (dkernel)", EXACT, "`s2_attention`, `local_stride`, `relative_stride`", ""
    ),
    System(
        "scaled_dot_product_attention",
        TENSOR,
        "`causal`, `block_sparse(attn_mask, 1)`",
        "a boolean attn_mask; its is_causal counts from the first query: compile with q_offset=0",
    ),
    System(
        "SeerAttention",
        TENSOR,
        "`causal & block_sparse(table, 64)`; decoding `kept_keys(blocks, 64)`",
        "the blocks of its learned gate",
    ),
    System(
        "SeqBoat",
        NOT,
        "",
        "relu attention over activated tokens, without a softmax. With softmax: qk_sparse and a "
        "window over ranks, lookup(rank, q_idx) - lookup(rank, kv_idx) <= w",
    ),
    System(
        "Shared prefix (attention-gym)",
        EXACT,
        "`shared_prefix`",
        "and trees of prefixes, such as rollouts that branch",
    ),
    System(
        "SLA",
        NOT,
        "",
        "adds linear attention of the blocks between; its critical blocks are block_sparse(table)",
    ),
    System("Sliding Tile Attention", EXACT, "`sliding_tile`", "tokens stored tile by tile"),
    System("Soft-capping", SCORE, "`score_mod=`", "attention-gym's generate_tanh_softcap"),
    System(
        "SpargeAttn",
        TENSOR,
        "`block_sparse(table, (128, 64))`",
        "(64, 128) on Hopper. What it skips of the products with values, by the scores at run "
        "time, and its quantisation are not a mask",
    ),
    System(
        "SpecInfer, Medusa, EAGLE",
        EXACT,
        "`token_tree`",
        "the tree of a draft, one for all batch rows or for each",
    ),
    System(
        "Sparse Transformer", EXACT, "`sparse_transformer_fixed`, `sparse_transformer_strided`", ""
    ),
    System("Sparse VideoGen", EXACT, "`spatial_head`, `temporal_head`", ""),
    System(
        "Sparse VideoGen 2",
        TENSOR,
        "`lookup(table, h, lookup(q_cluster, h, q_idx), lookup(kv_cluster, h, kv_idx))`",
        "which clusters of keys a cluster of queries sees; whole blocks, where tokens stand in the "
        "order of their clusters",
    ),
    System(
        "Sparse-vDiT",
        EXACT,
        "`diagonal`, `multi_diagonal`, `vertical_stripe`",
        "as the paper describes it (no code is released); widths and columns come from its search; "
        "a head it skips is ~full",
    ),
    System("SparseD", TENSOR, "`block_sparse(table)`", "the blocks picked once in a generation"),
    System(
        "SPARSEK",
        TENSOR,
        "`causal & (window(w) | (lookup(rank_u, kv_idx) > lookup(rank_tau, q_idx)))`",
        "its scores and thresholds as ranks; the weights on the kept values are not a mask",
    ),
    System(
        "Sparsifiner",
        TENSOR,
        "`block_sparse(table, 1)`",
        "single pairs: exact, but blocks of 128 skip nothing",
    ),
    System(
        "Star Attention",
        EXACT,
        "`star_attention`",
        "both phases as one mask; which host has which block is not a mask",
    ),
    System(
        "Stick-breaking attention",
        NOT,
        "",
        "weights from a product over the keys between, without a softmax",
    ),
    System(
        "StreamingLLM",
        EXACT,
        "`streaming_llm`, `token_streaming`",
        "which keys are seen; the positions re-counted inside the cache are not a mask",
    ),
    System("T5", EXACT, "`prefix`", ""),
    System(
        "Transfusion",
        EXACT,
        "`causal | (kv_idx < lookup(ends, q_idx))`",
        "the end of the image that a token is in, 0 for text",
    ),
    System(
        "TriangleMix",
        EXACT,
        "`tri_shape`",
        "as the paper describes it: in the deeper layers; those before are dense",
    ),
    System("VSA", TENSOR, "`block_sparse(table, tile)`", "its fine pass, on tokens in tile order"),
    System(
        "WeNet (U2)",
        EXACT,
        "`frame_causal(size)`; with left chunks "
        "`frame_causal(size) & (q_idx // size - kv_idx // size <= left)`",
        "subsequent_chunk_mask, of streaming speech encoders",
    ),
    System(
        "xFormers (attn_bias)",
        EXACT,
        "`causal`, `causal & window(size)`, `packed`, `padding`; local attention "
        "`(kv_idx >= q_idx - left) & (kv_idx <= q_idx + right)`",
        "those named FromBottomRight; LowerTriangularMask is causal compiled with q_offset=0",
    ),
    System(
        "XAttention", TENSOR, "`causal & block_sparse(table)`", "blocks by anti-diagonal scores"
    ),
    System(
        "Zoology (MQAR)", NOT, "", "a task to test masks with: each answer is at one earlier token"
    ),
]


def page() -> str:
    """The whole page."""
    lines = [
        "# Systems",
        "",
        "<!-- written by docs/make_systems.py; run it again after changing a docstring -->",
        "",
        "What each published system keeps, as a mask of flexsparse. *Exact*: the same pairs of "
        "query and key, element by element. *Exact, given a tensor*: the system estimates or "
        "learns which keys to keep; flexsparse takes its result and runs it. *A score*: changes "
        "scores and masks nothing; pass it as `score_mod=`. *Not a mask*: nothing said about pairs "
        "can express it.",
        "",
        "| system | with flexsparse | which is | remarks |",
        "|---|---|---|---|",
    ]
    rows = sorted(SYSTEMS, key=lambda s: (s.kind == NOT, s.name.lower()))
    lines += [f"| {s.name} | {cell(s.here)} | {s.kind} | {cell(s.note)} |" for s in rows]
    lines += [
        "",
        "# Patterns",
        "",
        "`from flexsparse.masks import ...`; combine them with `&`, `|`, `~`, and give heads their "
        "own with `per_head`. In the pictures a row is a query and `#` is a key it sees; several "
        "heads stand side by side.",
        "",
        "| pattern | what it keeps | source |",
        "|---|---|---|",
    ]
    names = sorted(library.__all__)
    lines += [f"| [`{n}`](#{n}) | {summary(n)} | {source(n)} |" for n in names]
    for name in names:
        lines += [
            "",
            f"## {name}",
            "",
            "```",
            f"{name}{signature(name)}",
            "",
            description(name),
            "```",
        ]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text in a cell, where patterns link to their section."""
    return re.sub(
        r"`(\w+)`",
        lambda m: f"[`{m[1]}`](#{m[1]})" if m[1] in library.__all__ else m[0],
        text,
    ).replace("|", "\\|")


def _doc(name: str) -> str:
    pattern = getattr(library, name)
    if isinstance(pattern, Mask):
        return f"{'Every query sees every key' if name == 'full' else str(pattern)}."
    return inspect.getdoc(pattern) or ""


def summary(name: str) -> str:
    """The first sentence of a docstring."""
    return _doc(name).splitlines()[0].replace("|", "\\|")


def source(name: str) -> str:
    """What a docstring says after 'Source:'."""
    found = re.search(r"Source: (.*)", re.sub(r"\s{2,}[#.][#. ]*$", "", _doc(name), flags=re.M))
    return found[1].rstrip(".") if found else ""


def signature(name: str) -> str:
    """The arguments of a pattern, without types."""
    pattern = getattr(library, name)
    if isinstance(pattern, Mask):
        return ""
    parameters = inspect.signature(pattern).parameters.values()
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"


def description(name: str) -> str:
    """A docstring whole."""
    return _doc(name)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
