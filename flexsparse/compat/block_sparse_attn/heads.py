"""What Block-Sparse-Attention's arguments say of each head, checked, and as masks.

Positions are FlashAttention's: the last query of a sequence stands at its last key, so query row r
has q_idx = r + kv_len - q_len. Blocks of 128 are counted from the first query and the first key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse import (
    Index,
    Mask,
    MaskError,
    PerHead,
    b,
    h,
    kv_idx,
    lookup,
    maximum,
    minimum,
    nothing,
    per_head,
    q_idx,
)
from flexsparse.masks import causal, full, token_streaming

BLOCK = 128
DENSE, BLOCK_SPARSE, STREAMING = 0, 1, -1


class Lengths(NamedTuple):
    """The tokens of each sequence, and max_seqlen_q_ and max_seqlen_k_, which may be more."""

    q: tuple[int, ...]
    kv: tuple[int, ...]
    max_q: int
    max_kv: int


def mask_of_heads(
    types: list[int],
    streaming_info: list[int],
    base_blockmask: Tensor | None,
    lengths: Lengths,
    *,
    is_causal: bool,
    exact_streaming: bool,
    device: torch.device,
) -> PerHead:
    """The mask of each query head, of positions inside a sequence."""
    dense = causal if is_causal else full
    sparse = None
    if base_blockmask is not None and BLOCK_SPARSE in types:
        kept = _kept_blocks(types, base_blockmask, lengths, device)
        sparse = causal & kept if is_causal else kept
    masks: list[Mask] = []
    for head, kind in enumerate(types):
        if kind == DENSE:
            masks.append(dense)
        elif kind == BLOCK_SPARSE:
            assert sparse is not None
            masks.append(sparse)
        else:
            sink, local = streaming_info[2 * head : 2 * head + 2]
            if exact_streaming:
                masks.append(token_streaming(sink, local))
            elif is_causal:
                masks.append(_causal_block_streaming(sink, local, lengths, device))
            else:
                masks.append(_block_streaming(sink, local, lengths, device))
    return per_head(masks)


def _kept_blocks(
    types: list[int], base_blockmask: Tensor, lengths: Lengths, device: torch.device
) -> Mask:
    """base_blockmask[sequence, j, row of blocks, column of blocks] for the j-th head of type 1."""
    if not base_blockmask.numel():
        return nothing  # no queries or no keys
    # a copy, because callers write new masks into the same tensor
    table = base_blockmask.to(device=device, dtype=torch.bool, copy=True)
    n_heads = table.shape[1]
    # how many heads of type 1 come before each; of other heads it is not read
    before = [min(types[:head].count(BLOCK_SPARSE), n_heads - 1) for head in range(len(types))]
    leading: tuple[Any, ...] = (b, lookup(torch.tensor(before, dtype=torch.int32).to(device), h))
    if bool((table == table[:, :1]).all()):
        table, leading = table[:, 0], (b,)  # heads with one mask share its blocks
    if len(table) == 1:
        table, leading = table[0], leading[1:]
    ahead = _of_sequence([kv - q for q, kv in zip(lengths.q, lengths.kv, strict=True)], device)
    row = q_idx - ahead if ahead != 0 else q_idx
    if isinstance(ahead, Index):
        # tokens of two sequences meet in a block, where a row may be anything
        row = minimum(maximum(row, 0), lengths.max_q - 1)
    kept: Mask = lookup(table, *leading, row // BLOCK, kv_idx // BLOCK)
    return kept.named(f"base_blockmask of {n_heads} head{'s' * (n_heads > 1)}")


def _causal_block_streaming(sink: int, local: int, lengths: Lengths, device: torch.device) -> Mask:
    """The first `sink` blocks of keys, and `local` blocks up to the one where the diagonal ends.

    A row of 128 queries has its last local block where its diagonal ends if kv_len - q_len is
    rounded up to blocks. Where it is no multiple of 128 the diagonal of a row crosses two blocks:
    both are counted as local ones, so that of local=1 hardly any key is left.
    """
    rounding = [-(kv - q) % BLOCK for q, kv in zip(lengths.q, lengths.kv, strict=True)]
    q_block = (q_idx + _of_sequence(rounding, device)) // BLOCK
    kv_block = kv_idx // BLOCK
    kept: Mask = causal & ((kv_block < sink) | (q_block - kv_block < local))
    return kept.named(f"block_streaming({sink}, {local})")


def _block_streaming(sink: int, local: int, lengths: Lengths, device: torch.device) -> Mask:
    """The first `sink` and the last `local` blocks of keys, for every query."""
    kv_block = kv_idx // BLOCK
    n_blocks = _of_sequence([-(-kv // BLOCK) for kv in lengths.kv], device)
    kept: Mask = (kv_block < sink) | (kv_block >= n_blocks - local)
    return kept.named(f"block_streaming({sink}, {local}, is_causal=False)")


def _of_sequence(values: Sequence[int], device: torch.device) -> Any:
    """A number of each sequence; an int if all have the same, so that they share their blocks."""
    if len(set(values)) <= 1:
        return values[0] if values else 0
    return lookup(torch.tensor(values, dtype=torch.int32).to(device), b)


def refuse_lengths(lengths: Lengths) -> None:
    """Raise MaskError unless max_seqlen_q_ and max_seqlen_k_ cover the sequences."""
    for name, most, lens in (
        ("max_seqlen_q_", lengths.max_q, lengths.q),
        ("max_seqlen_k_", lengths.max_kv, lengths.kv),
    ):
        if most < max(lens, default=0):
            raise MaskError(
                f"{name}={most}, and the longest sequence has {max(lens)} tokens; it must be the "
                "length of the longest sequence, or more."
            )


def head_types(head_mask_type: Any, n_heads: int, allowed: Sequence[int]) -> list[int]:
    """head_mask_type as a list, one of the allowed types for each query head."""
    types = _integers("head_mask_type", head_mask_type)
    if len(types) != n_heads:
        raise MaskError(
            f"head_mask_type has {len(types)} entries and q has {n_heads} heads; give one for "
            "each query head."
        )
    meanings = {DENSE: "0 (dense)", BLOCK_SPARSE: "1 (block-sparse)", STREAMING: "-1 (streaming)"}
    for head, kind in enumerate(types):
        if kind not in allowed:
            names = ", ".join(meanings[kind] for kind in allowed)
            raise MaskError(f"head_mask_type[{head}] is {kind}; this call takes {names}.")
    return types


def streaming_numbers(streaming_info: Any, types: list[int]) -> list[int]:
    """streaming_info as a list, checked for the heads that stream."""
    if STREAMING not in types:
        return []
    if streaming_info is None:
        raise MaskError(
            f"streaming_info is None, and head {types.index(STREAMING)} streams; give "
            f"[sink, local] of every query head in turn, {2 * len(types)} integers."
        )
    numbers = _integers("streaming_info", streaming_info)
    if len(numbers) != 2 * len(types):
        raise MaskError(
            f"streaming_info has {len(numbers)} entries; it must have (sink, local) of every query "
            f"head in turn, {2 * len(types)} integers."
        )
    for head, kind in enumerate(types):
        sink, local = numbers[2 * head : 2 * head + 2]
        if kind == STREAMING and (sink < 0 or local < 1):
            what = f"sink {sink}" if sink < 0 else f"local {local}"
            raise MaskError(
                f"streaming_info has {what} for head {head}; sink must be 0 or more, and local, "
                "which counts the query's own token or block, 1 or more."
            )
    return numbers


def refuse_base_blockmask(base_blockmask: Any, types: list[int], lengths: Lengths) -> None:
    """Raise MaskError unless base_blockmask has a mask for each sequence and head of type 1."""
    n_sparse = types.count(BLOCK_SPARSE)
    names = ("batch", "heads of type 1", "rows of 128 queries", "columns of 128 keys")
    rows, columns = (-(-most // BLOCK) for most in (lengths.max_q, lengths.max_kv))
    expected = (len(lengths.q), n_sparse, rows, columns)
    shape = ", ".join(f"{n} {name}" for n, name in zip(expected, names, strict=True))
    if base_blockmask is None:
        if n_sparse:
            raise MaskError(
                f"base_blockmask is None, and head {types.index(BLOCK_SPARSE)} is of type 1; give "
                f"a boolean tensor of {shape}."
            )
        return
    if not isinstance(base_blockmask, Tensor) or base_blockmask.is_floating_point():
        is_tensor = isinstance(base_blockmask, Tensor)
        found = base_blockmask.dtype if is_tensor else type(base_blockmask).__name__
        raise MaskError(f"base_blockmask is {found}; give a boolean tensor of {shape}.")
    if base_blockmask.is_meta:
        raise MaskError(
            "base_blockmask is on meta, where tensors have no values; give it on the device of q."
        )
    if tuple(base_blockmask.shape) != expected:
        raise MaskError(
            f"base_blockmask has shape {tuple(base_blockmask.shape)}; it must be {expected}: "
            f"{shape}."
        )


def _integers(name: str, given: Any) -> list[int]:
    values = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(x, int) and not isinstance(x, bool) for x in values
    ):
        raise MaskError(f"{name} is {given!r}; it must be a tensor of integers of one dimension.")
    return list(values)
