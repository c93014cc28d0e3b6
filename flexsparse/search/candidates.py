"""Patterns that a search chooses from, and what each computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.fidelity.density import BLOCK, blocks, own_mask
from flexsparse.masks import block_streaming, causal, local_stride
from flexsparse.text import shown

# in blocks
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
STRIPES = ((2, 4), (3, 4), (4, 4), (3, 2))  # latest, and from stripe to stripe


def candidates_for(length: int) -> list[Mask]:
    """Everything; the latest blocks with the first one; the latest with every second or fourth.

    As far as a length has room for them. They are whole blocks: where a block is computed anyway,
    masking a part of it saves nothing.
    """
    n = -(-length // BLOCK)
    windows = (block_streaming(1, window) for window in WINDOWS if window + 1 < n)
    stripes = (local_stride(*stripe, block_size=BLOCK) for stripe in STRIPES if sum(stripe) < n)
    return [causal, *windows, *stripes]


def costs_of(candidates: Sequence[Mask], config: Any, layers: Sequence[int], length: int) -> Tensor:
    """int64[layers x heads, candidates]: blocks a head computes, of what its layer sees anyway.

    Raises:
        MaskError: a candidate hides everything from a head.
    """
    rows = []
    for layer, head in itertools.product(layers, range(config.num_attention_heads)):
        own = own_mask(config, layer)
        rows.append([blocks(own & mask, length, head) for mask in candidates])
        if 0 in rows[-1]:
            mask = candidates[rows[-1].index(0)]
            where = f"head {head} of layer" if "h" in mask.variables else "layer"
            raise MaskError(f"The candidate {shown(mask)} keeps no block in {where} {layer}.")
    return torch.tensor(rows, device="cpu")
