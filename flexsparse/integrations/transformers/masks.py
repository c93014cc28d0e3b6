"""Masks on their way from a Hugging Face model to its attention layers, in one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.validate import problem
from flexsparse.compiler import CompiledMask
from flexsparse.errors import ExecutorError, MaskError
from flexsparse.heads import PerHead
from flexsparse.integrations.transformers import rules
from flexsparse.integrations.transformers.rows import ALL_HEADS, Pick, pick
from flexsparse.tensors import MaskMod


class ModelMask(BlockMask):
    """What a model hides: a BlockMask in name only, as transformers passes those on untouched.

    batch, q_len, kv_len: the shape of the scores, heads aside
    n_keys: up to the last query, those that a cache has dropped included, but not its empty room
    is_packed: whether a row is several sequences
    """

    is_packed = False

    def __init__(self, batch: int, q_len: int, kv_len: int, q_offset: int | Tensor) -> None:
        self.batch, self.q_len, self.kv_len = batch, q_len, kv_len
        # a sum is a tensor of its own: a static cache counts on in the one that it gives
        self.n_keys = q_offset + q_len

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, 1, q_len, kv_len], as of the dense mask it stands for."""
        return self.batch, 1, self.q_len, self.kv_len

    def contiguous(self) -> ModelMask:
        """Itself; generate() asks for it."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> ModelMask:
        """Itself; accelerate asks for it."""
        return self

    def __getitem__(self, index: Any) -> ModelMask:
        """Refused: models that pick their keys themselves (DeepSeek V3.2) ask for it."""
        raise ExecutorError(
            "The model's code reads its mask as a tensor, which flexsparse makes no mask of; use "
            'set_attn_implementation("eager") for this model.'
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"

    __str__ = __repr__


class BlocksMask(ModelMask):
    """What a model hides from many queries, to be compiled with the masks of a layer."""

    def __init__(
        self,
        mask_mod: MaskMod,
        padding: Tensor | None,
        shape: tuple[int, int, int],
        q_offset: int | Tensor,
        kv_offset: int,
        device: torch.device,
    ) -> None:
        """Keep what the model says.

        Args:
            mask_mod: of positions.
            padding: boolean [batch, positions], False for padding.
            shape: (batch, q_len, kv_len).
            q_offset: position of query row 0.
            kv_offset: position of key 0.
            device: of the queries.
        """
        super().__init__(*shape, int(q_offset))
        self.q_offset, self.device = int(q_offset), device
        self.rules = rules.of(mask_mod, padding, shape[1:], self.q_offset, kv_offset, device)
        self.is_packed = self.rules.is_packed

    def compiled(self, masks: PerHead, device: torch.device | None = None) -> CompiledMask:
        """The masks of a layer's heads and the model's own; the same ones are compiled once.

        Args:
            masks: of the layer's heads.
            device: of the layer, by default that of the queries the mask was made for.
        """
        device = self.device if device is None else device
        return rules.compiled(
            self.rules, masks, self.q_len, self.kv_len, self.q_offset, self.batch, device
        )


class RowMask(ModelMask):
    """What a model hides from one query: a step of decoding, which needs no blocks.

    Made of tensors alone, so that a compiled step runs on without compiling again.

    kept: bool [batch, 1, 1, kv_len]
    q_place, kv_place: positions from the start of the sequence; they broadcast with it
    """

    def __init__(
        self,
        mask_mod: MaskMod,
        padding: Tensor | None,
        shape: tuple[int, int, int],
        q_offset: int | Tensor,
        kv_offset: int,
        device: torch.device,
    ) -> None:
        """Read the row; the arguments are those of `BlocksMask`."""
        super().__init__(*shape, q_offset)
        q = (torch.as_tensor(self.n_keys, device=device) - 1).view(1, 1, 1, 1)
        kv = torch.arange(kv_offset, kv_offset + self.kv_len, device=device).view(1, 1, 1, -1)
        batch = torch.arange(self.batch, device=device).view(-1, 1, 1, 1)
        kept = mask_mod(batch, torch.zeros_like(q), q, kv)
        kept = kept.expand(self.batch, 1, 1, self.kv_len)  # it may read no key at all
        if padding is not None:
            kept = kept & padding[:, None, None, kv_offset:]
            first = padding.int().argmax(1).view(-1, 1, 1, 1)
            q, kv = (q - first).clamp(min=0), (kv - first).clamp(min=0)
        self.kept, self.q_place, self.kv_place = kept, q, kv
        self._picks: dict[tuple[PerHead, int], list[Pick]] = {}

    def picks(self, masks: PerHead, n_kv_heads: int) -> list[Pick]:
        """The keys to read for each kv head of a layer, found once for all layers alike."""
        if torch.compiler.is_compiling():
            # how many keys are kept is data, which a graph does not know
            return [Pick(ALL_HEADS, None, self._of_kv_heads(masks, n_kv_heads))]
        key = masks, n_kv_heads
        if key not in self._picks:
            self._refuse_unsound(masks)
            self._picks[key] = pick(self._of_kv_heads(masks, n_kv_heads))
        return self._picks[key]

    def _of_kv_heads(self, masks: PerHead, n_kv_heads: int) -> Tensor:
        """`and_also` as bool [batch, n_kv_heads, query heads of each, kv_len]."""
        return self.and_also(masks).view(self.batch, n_kv_heads, -1, self.kv_len)

    def and_also(self, masks: PerHead) -> Tensor:
        """What the masks of a layer's heads keep of it, bool [batch, n_heads, 1, kv_len]."""
        device = self.kept.device
        batch = torch.arange(self.batch, device=device).view(-1, 1, 1, 1)
        kept = self.kept.repeat(1, masks.n_heads, 1, 1)
        for place, mask in enumerate(masks.distinct):
            heads = torch.tensor(masks.heads_of(place), device=device)
            # dynamo asks a callable object for its truth value before it calls it (torch 2.11)
            seen = mask.__call__(batch, heads.view(1, -1, 1, 1), self.q_place, self.kv_place)
            kept[:, heads] &= seen
        return kept

    def _refuse_unsound(self, masks: PerHead) -> None:
        """Raise where a table is read out of range, in the words in which blocks are refused."""
        for place, mask in enumerate(masks.distinct):
            if mask.tables:
                q, kv = int(self.q_place.max()), int(self.kv_place.max())
                grid = Grid(1, kv + 1, q, (1, 128), self.batch, masks.heads_of(place))
                reason = problem(mask, grid, self.kept.device)
                if reason is not None:
                    raise MaskError(reason)
