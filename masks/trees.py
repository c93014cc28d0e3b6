"""Patterns of trees: documents, or tokens, that continue one another."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from flexsparse import Mask, MaskError, b, kv_idx, maximum, pattern, q_idx
from flexsparse.masks.arguments import at_least, integers, number, tensor_of
from flexsparse.masks.documents import ends_of, sequences_of
from flexsparse.masks.positions import causal


@pattern
def shared_prefix(cu_seqlens: Tensor | Sequence[int], prefix_of: Tensor | Sequence[int]) -> Mask:
    """Packed documents, causal inside; one that continues another sees it and all it continues.

    A prompt is stored once and each response to it sees it, in one packed sequence; in a tree of
    rollouts, each branch sees the path that leads to it.

    shared_prefix([0, 2, 3, 4, 6], [0, 0, 1, 0]), 6 x 6:
        #.....
        ##....
        ###...
        ####..
        ##..#.
        ##..##

    Args:
        cu_seqlens: integers [documents + 1], where each document starts, and the end.
        prefix_of: integers [documents], the document that each one continues; one that continues
            none, such as a prompt, has its own number. Compiling is fastest where documents come
            after those that they continue, and next to them.

    Source: attention-gym's shared_prefix, of depth 1; bifurcated attention (arXiv 2403.08845).
    """
    ends = ends_of("shared_prefix", "cu_seqlens", cu_seqlens)
    parents = integers("shared_prefix", "prefix_of", prefix_of, "[documents]").long()
    documents = torch.arange(len(ends) - 1, device=parents.device)
    fits = len(parents) == len(documents)
    if not fits or bool(((parents < 0) | (parents >= len(documents))).any()):
        raise MaskError(
            f"shared_prefix(prefix_of={reprlib.repr(parents.tolist())}): each of {len(documents)} "
            "documents needs the number of the one that it continues, or its own."
        )
    enter, leave = _subtrees("shared_prefix", parents)
    document, _ = sequences_of(ends)
    enter, leave = enter[document.long()], leave[document.long()]
    mine = number(enter, q_idx)
    its, its_end = number(enter, kv_idx), number(leave, kv_idx)
    continues = (its <= mine) & (mine < its_end)
    if bool((parents <= documents).all()):
        return causal & continues
    return continues & (causal | ~mine.equals(its))


@pattern
def token_tree(parents: Tensor | Sequence[int], context_len: int = 0) -> Mask:
    """Causal, then the tokens of a tree: each sees the context, its ancestors and itself.

    The draft of speculative decoding, verified in one call: compile it with q_len of the tree's
    tokens and kv_len = context_len + q_len.

    token_tree([-1, 0, 0, 1], 2), 6 x 6:    #.....
                                            ##....
    Args:                                   ###...
        parents: integers [tokens] or       ####..
            [B, tokens], the token that     ###.#.
            each one follows; -1 follows    ####.#
            the context.
        context_len: tokens before the tree.

    Source: SpecInfer (arXiv 2305.09781), Medusa (arXiv 2401.10774), EAGLE (arXiv 2401.15077).
    """
    at_least("token_tree", 0, context_len=context_len)
    if not isinstance(parents, Tensor):
        parents = integers("token_tree", "parents", parents, "[tokens] or [B, tokens]")
    shapes = {1: "[tokens]", 2: "[B, tokens]"}
    tensor_of("token_tree", "parents", parents, "integer", shapes)
    n_tokens = parents.shape[-1]
    tokens = torch.arange(n_tokens, device=parents.device)
    if bool(((parents < -1) | (parents >= n_tokens) | (parents == tokens)).any()):
        raise MaskError(
            f"token_tree(parents={reprlib.repr(parents.tolist())}): each of {n_tokens} tokens "
            "needs the number of another, which it follows, or -1."
        )
    # the context is a node of its own, number 0
    nodes = torch.nn.functional.pad(parents.long() + 1, (1, 0))
    subtrees = [_subtrees("token_tree", tree) for tree in nodes.view(-1, n_tokens + 1)]
    enter, leave = (torch.stack(x).view(nodes.shape) for x in zip(*subtrees, strict=True))
    batch = [b] if parents.dim() == 2 else []
    q_node, kv_node = (maximum(x - (context_len - 1), 0) for x in (q_idx, kv_idx))
    mine = number(enter, *batch, q_node)
    its, its_end = number(enter, *batch, kv_node), number(leave, *batch, kv_node)
    return (its <= mine) & (mine < its_end) & (causal | ~mine.equals(its))


def _subtrees(name: str, parents: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of nodes by which x is in the subtree of a where enter[a] <= enter[x] < leave[a].

    A node without a parent has its own number in `parents`, integer [nodes].
    """
    children: list[list[int]] = [[] for _ in range(len(parents))]
    # nodes to visit, last one first; ~node is the end of its subtree
    pending: list[int] = []
    for node, parent in enumerate(parents.tolist()):
        (pending if node == parent else children[parent]).append(node)
    pending.reverse()
    enter, leave = [0] * len(parents), [0] * len(parents)
    visited = 0
    while pending:
        node = pending.pop()
        if node < 0:
            leave[~node] = visited
            continue
        enter[node] = visited
        visited += 1
        pending.append(~node)
        pending.extend(reversed(children[node]))
    if visited < len(parents):
        raise MaskError(f"{name} got a circle: following parents must end at one without a parent.")
    numbers = torch.tensor([enter, leave], dtype=torch.int32, device=parents.device)
    return numbers[0], numbers[1]
