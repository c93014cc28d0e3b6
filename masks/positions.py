"""Patterns of positions: which keys a query sees by where the two stand."""

from __future__ import annotations

from torch import Tensor

from flexsparse import Mask, MaskError, b, everything, kv_idx, pattern, q_idx
from flexsparse.masks.arguments import at_least, flag, number, tensor_of

full = everything.named("full")
causal = (kv_idx <= q_idx).named("causal")


@pattern
def window(size: int) -> Mask:
    """Each query sees its `size` most recent positions, itself included: q_idx - kv_idx < size.

    Says nothing about the future; combine with `causal`.       causal & window(3), 5 x 5:
                                                                #....
    FlashAttention's window_size is (size - 1, 0), and          ##...
    the FlexAttention blog's sliding window sees size + 1.      ###..
                                                                .###.
    Args:                                                       ..###
        size: keys seen, in tokens, 1 or more.

    Source: Longformer (arXiv 2004.05150), section 3.1.
    """
    if isinstance(size, int) and size < 1:
        raise MaskError(
            f"window(size={size}) sees no key. `size` counts the query's own position; "
            "use size >= 1."
        )
    at_least("window", 1, size=size)
    return q_idx - kv_idx < size


@pattern
def sink(size: int) -> Mask:
    """Every query sees the first `size` keys: kv_idx < size.

    causal & (sink(1) | window(2)), 5 x 5:      #....
                                                ##...
    Args:                                       ###..
        size: keys kept, in tokens, 0 or more.  #.##.
                                                #..##
    Source: StreamingLLM (arXiv 2309.17453), section 3.2.
    """
    at_least("sink", 0, size=size)
    return kv_idx < size


@pattern
def prefix(length: int | Tensor) -> Mask:
    """A prefix that sees itself whole, causal after it: (kv_idx < length) | causal.

    prefix(3), 5 x 5:                                   ###..
                                                        ###..
    Args:                                               ###..
        length: of the prefix, in tokens, or integer    ####.
            [B], the length in each batch row.          #####

    Source: T5 (arXiv 1910.10683), section 3.2.1; the FlexAttention blog's "PrefixLM".
    """
    if isinstance(length, Tensor):
        tensor_of("prefix", "length", length, "integer", {1: "[B]"})
        return (kv_idx < number(length, b)) | causal
    at_least("prefix", 1, length=length)
    return (kv_idx < length) | causal


@pattern
def dilated(size: int, dilation: int) -> Mask:
    """Each query sees `size` positions, `dilation` apart, up to its own.

    Says nothing about the future; combine with `causal`.   causal & dilated(2, 2), 5 x 5:
                                                            #....
    Args:                                                   .#...
        size: keys seen, 1 or more.                         #.#..
        dilation: tokens from one key to the next.          .#.#.
                                                            ..#.#
    Source: Longformer (arXiv 2004.05150), section 3.1.
    """
    at_least("dilated", 1, size=size, dilation=dilation)
    return (q_idx - kv_idx < size * dilation) & ((q_idx - kv_idx) % dilation).equals(0)


@pattern
def strided(stride: int) -> Mask:
    """Each query sees every `stride`-th position, counted from its own, both ways.

    causal & strided(3), 5 x 5:             #....
                                            .#...
    Args:                                   ..#..
        stride: in tokens, 1 or more.       #..#.
                                            .#..#
    Source: Sparse Transformers (arXiv 1904.10509), section 4.2.
    """
    at_least("strided", 1, stride=stride)
    return ((q_idx - kv_idx) % stride).equals(0)


@pattern
def chunked(size: int) -> Mask:
    """Positions see each other inside chunks of `size`: q_idx // size == kv_idx // size.

    chunked(2), 5 x 5:                      ##...
                                            ##...
    Args:                                   ..##.
        size: of a chunk, in tokens.        ..##.
                                            ....#
    Source: Llama 4's chunked attention; blockwise attention (arXiv 1911.02972).
    """
    at_least("chunked", 1, size=size)
    return (q_idx // size).equals(kv_idx // size)


@pattern
def global_tokens(tokens: int | Tensor) -> Mask:
    """Global tokens see every key and are seen by every query.

    global_tokens(1), 4 x 4:                ####
                                            #...
    Args:                                   #...
        tokens: how many first tokens are   #...
            global, or a boolean tensor
            [tokens] that says which are.

    Source: Longformer (arXiv 2004.05150), section 3.1.
    """
    if isinstance(tokens, Tensor):
        tensor_of("global_tokens", "tokens", tokens, "boolean", {1: "[tokens]"})
        return flag(tokens, q_idx) | flag(tokens, kv_idx)
    at_least("global_tokens", 1, tokens=tokens)
    return (q_idx < tokens) | (kv_idx < tokens)
