"""Patterns of a few first keys and a window of recent ones: the streaming family."""

from __future__ import annotations

from flexsparse import Mask, MaskError, kv_idx, pattern, q_idx
from flexsparse.masks.arguments import at_least, booleans, is_int, one_of
from flexsparse.masks.positions import causal, chunked, sink, window

DUO_PHASES = ("training", "training_blocks", "prefill", "decoding")


@pattern
def token_streaming(sink_size: int, local_size: int) -> Mask:
    """Causal, of which each query sees the first keys and the latest ones, in tokens.

    local_size counts the query's own position, as window(size) does.

    token_streaming(1, 2), 5 x 5:                         #....
                                                          ##...
    Args:                                                 ###..
        sink_size: first keys, in tokens, 0 or more.      #.##.
        local_size: latest keys, in tokens, 1 or more.    #..##

    Source: Block-Sparse-Attention's token_streaming_attn_func (streaming_info, exact_streaming).
    """
    at_least("token_streaming", 0, sink_size=sink_size)
    at_least("token_streaming", 1, local_size=local_size)
    return causal & (sink(sink_size) | window(local_size))


@pattern
def block_streaming(
    sink_blocks: int,
    local_blocks: int,
    block_size: int = 128,
    is_causal: bool = True,
    q_offset: int = 0,
    kv_len: int | None = None,
) -> Mask:
    """The first blocks of keys and the latest, the query's own included: sink and window in blocks.

    A query sees (local_blocks - 1) * block_size + 1 to local_blocks * block_size recent keys.

    block_streaming(1, 2, 2), 8 x 8:
        #.......
        ##......
        ###.....
        ####....
        #####...
        ######..
        ##..###.
        ##..####

    Args:
        sink_blocks: first blocks of keys, 0 or more.
        local_blocks: latest blocks of keys, 1 or more.
        block_size: tokens of a block; 128 as published.
        is_causal: without it the "local" blocks are the last ones of the keys, for every query.
        q_offset: position of query row 0. Blocks of queries are counted from there while causal
            goes by position: where it is no multiple of block_size a local block is nearly lost.
        kv_len: keys, in tokens; read only if not is_causal.

    Source: Block-Sparse-Attention's block_streaming_attn_func (streaming_info); MoA; DuoAttention.
    """
    at_least("block_streaming", 0, sink_blocks=sink_blocks)
    at_least("block_streaming", 1, local_blocks=local_blocks, block_size=block_size)
    if not is_int(q_offset):
        raise MaskError(f"block_streaming(q_offset={q_offset!r}): q_offset must be an int.")
    booleans("block_streaming", is_causal=is_causal)
    kv_block = kv_idx // block_size
    if is_causal:
        # the block of a row, counted so that the diagonal ends in the last local block
        q_block = (q_idx + -q_offset % block_size) // block_size
        return causal & ((kv_block < sink_blocks) | (q_block - kv_block < local_blocks))
    if kv_len is None:
        raise MaskError(
            "block_streaming(is_causal=False) keeps the last blocks of the keys: give kv_len=..., "
            "in tokens."
        )
    at_least("block_streaming", 1, kv_len=kv_len)
    return (kv_block < sink_blocks) | (kv_block >= -(-kv_len // block_size) - local_blocks)


@pattern
def streaming_llm(start_size: int = 4, recent_size: int = 512, evict_first: bool = False) -> Mask:
    """What a query sees of StreamingLLM's cache: the first keys and the latest, itself included.

    The query's window is recent_size + 1 keys: recent_size from the cache, and itself. Its
    positions, re-counted inside the cache, are not part of a mask.

    streaming_llm(1, 1), 5 x 5:                        #....
                                                       ##...
    Args:                                              ###..
        start_size: first keys kept in the cache.      #.##.
        recent_size: latest keys kept in the cache.    #..##
        evict_first: the cache makes room before the step (evict_for_space), so the window is
            recent_size, the query's own included.

    Source: StreamingLLM (arXiv 2309.17453), StartRecentKVCache.
    """
    at_least("streaming_llm", 0, start_size=start_size)
    at_least("streaming_llm", 1, recent_size=recent_size)
    booleans("streaming_llm", evict_first=evict_first)
    return causal & (sink(start_size) | window(recent_size + (not evict_first)))


@pattern
def duo_streaming(
    sink_size: int = 64,
    recent_size: int = 256,
    phase: str = "decoding",
    chunk_size: int | None = None,
) -> Mask:
    """A streaming head of DuoAttention; how many keys recent_size means depends on the phase.

    "training": recent_size, the query's own included. "training_blocks": both sizes rounded up to
    blocks of 128. "decoding": recent_size + 1, the query's own included. "prefill": recent_size
    before the chunk of the query, and the chunk up to the query.

    duo_streaming(1, 1, 'prefill', 3), 8 x 8:
        #.......
        ##......
        ###.....
        #.##....
        #.###...
        #.####..
        #....##.
        #....###

    Args:
        sink_size: first keys, in tokens.
        recent_size: latest keys, in tokens.
        phase: one of the four above; the first prefill of the released code is causal.
        chunk_size: tokens of a chunk of a chunked prefill; read only in phase "prefill".

    Source: DuoAttention (arXiv 2410.10819), its training masks and StaticKVCache.
    """
    at_least("duo_streaming", 0, sink_size=sink_size)
    at_least("duo_streaming", 1, recent_size=recent_size)
    one_of("duo_streaming", "phase", phase, DUO_PHASES)
    if phase == "training":
        return causal & (sink(sink_size) | window(recent_size))
    if phase == "training_blocks":
        return block_streaming(-(-sink_size // 128), -(-recent_size // 128))
    if phase == "decoding":
        return causal & (sink(sink_size) | window(recent_size + 1))
    if chunk_size is None:
        raise MaskError('duo_streaming(phase="prefill") needs chunk_size=..., in tokens.')
    at_least("duo_streaming", 1, chunk_size=chunk_size)
    return causal & (sink(sink_size) | (q_idx // chunk_size * chunk_size - recent_size <= kv_idx))


@pattern
def a_shape(n_init: int = 128, n_local: int = 3968) -> Mask:
    """Each query sees the first n_init keys and its latest n_local, itself included; causal.

    a_shape(1, 2), 5 x 5:                              #....
                                                       ##...
    Args:                                              ###..
        n_init: first keys, in tokens.                 #.##.
        n_local: latest keys, in tokens, 1 or more.    #..##

    Source: MInference (arXiv 2407.02490), streaming_forward.
    """
    at_least("a_shape", 0, n_init=n_init)
    at_least("a_shape", 1, n_local=n_local)
    return causal & (sink(n_init) | window(n_local))


@pattern
def tri_shape(kv_len: int, n_init: int = 128, n_local: int = 3968, n_last: int = 100) -> Mask:
    """The A-shape, and the last n_last queries see all before them.

    tri_shape(6, 1, 2, 2), 6 x 6:                                        #.....
                                                                         ##....
    Args:                                                                ###...
        kv_len: of the prompt, in tokens: the last queries end there.    #.##..
        n_init: first keys, in tokens.                                   #####.
        n_local: latest keys, in tokens, the query's own included.       ######
        n_last: last queries, in tokens.

    Source: MInference's tri_shape, next to streaming_forward.
    """
    at_least("tri_shape", 1, kv_len=kv_len, n_local=n_local)
    at_least("tri_shape", 0, n_init=n_init, n_last=n_last)
    return causal & (sink(n_init) | window(n_local) | (q_idx >= kv_len - n_last))


@pattern
def star_attention(context_len: int, block_size: int, anchor_size: int | None = None) -> Mask:
    """Causal, of which the context sees its own block and the anchor, and the query after it all.

    A block is run there behind a copy of the anchor, which sees itself alone, as the first tokens
    do: their keys are the same.

    star_attention(6, 2, 1), 8 x 8:
        #.......
        ##......
        #.#.....
        #.##....
        #...#...
        #...##..
        #######.
        ########

    Args:
        context_len: tokens of the context; those after it are the query and the answer.
        block_size: tokens of a block of the context.
        anchor_size: first tokens of the first block that every block sees: all of them by default;
            with 0 each block is read alone.

    Source: Star Attention (arXiv 2411.17116), StarAttentionModel.
    """
    anchor_size = block_size if anchor_size is None else anchor_size
    at_least("star_attention", 0, context_len=context_len, anchor_size=anchor_size)
    at_least("star_attention", 1, block_size=block_size)
    if anchor_size > block_size:
        raise MaskError(
            f"star_attention(block_size={block_size}, anchor_size={anchor_size}): the anchor is a "
            f"part of the first block; use an anchor_size of at most {block_size}."
        )
    return causal & (chunked(block_size) | sink(anchor_size) | (q_idx >= context_len))
