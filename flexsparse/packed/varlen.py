"""varlen: attention of packed sequences, each under one mask with positions of its own.

Sequences of one length are a batch, of which q, k and v are views. Others run as one sequence, in
which tokens see only their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.arguments import MOST_HEADS, block_sizes, check_size, usable_device
from flexsparse.compiler import CompiledMask, compile_mask
from flexsparse.default_device import cpu_by_default
from flexsparse.dropout import Dropout, is_kept
from flexsparse.errors import MaskError
from flexsparse.expr import Mask, everything
from flexsparse.heads import PerHead, as_per_head, refuse_other
from flexsparse.launch import refuse_unknown
from flexsparse.modifiers import Modifiers
from flexsparse.packed.cu_seqlens import first_positions, lengths
from flexsparse.packed.packing import Pack, PackedTokens
from flexsparse.tensors import ScoreMod
from flexsparse.text import amount

PLANS_KEPT = 64


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    mask: Mask | PerHead = everything,
    *,
    q_offset: int | Sequence[int] | Tensor | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    executor: str | None = None,
    block_size: int | tuple[int, int] = 128,
    own_blocks: bool | None = None,
) -> Any:
    """Attention inside each of several packed sequences: what each would give alone.

    In the mask (and the score_mod) q_idx and kv_idx are positions in the sequence, and b is the
    number of the sequence, so a table [B, ...] holds something for each. A query row that sees no
    key has output 0 and LSE -inf. The plan is kept: calls with the same lengths and an equal mask
    analyse nothing. cu_seqlens are read by value, which waits for the device once.

    >>> cu_seqlens = torch.tensor([0, 700, 2048])  # two sequences of 700 and 1,348 tokens
    >>> out = fs.varlen(q, k, v, cu_seqlens, mask=causal & window(256))

    Args:
        q: [total_q, n_heads, D].
        k: [total_k, n_kv_heads, D]; n_kv_heads divides n_heads (GQA).
        v: [total_k, n_kv_heads, Dv].
        cu_seqlens_q: integer [sequences + 1], where each sequence starts in q, and total_q.
        cu_seqlens_k: the same for k and v; that of q by default.
        mask: one for all heads, or `per_head([...])`.
        q_offset: position of each sequence's first query, or one for each sequence; by default its
            last query stands at its last key (bottom-right, as in FlashAttention).
        scale: of the scores; 1 / sqrt(D) by default.
        score_mod: FlexAttention's, of (score, b, h, q_idx, kv_idx).
        dropout_p: the chance to drop a weight, in [0, 1).
        dropout_seed: of the dropout, 64 bits; drawn from torch's generator by default.
        return_lse: also return the log of the sum of exponentials of each row's scores.
        executor: insist on one of those that CompiledMask names; by default flexsparse chooses.
        block_size: tokens of a block, or (of queries, of keys).
        own_blocks: start each sequence in a block of its own, so that a mask made of blocks is
            computed in those blocks and not in more that overlap them. It costs a copy of q, k, v
            and out with padding, so it pays for sequences of many blocks. By default that is done
            for masks that read a table of two dimensions or more, such as one of blocks.

    Returns:
        out [total_q, n_heads, Dv], or (out, lse) with lse float32 [n_heads, total_q].

    Raises:
        MaskError: q, k, v, cu_seqlens or mask do not fit each other; the text says which.
        ExecutorError: the executor asked for cannot run this call.
    """
    refuse_unpacked(q, k, v)
    plan = plan_varlen(
        mask,
        cu_seqlens_q,
        cu_seqlens_k,
        n_heads=q.shape[1],
        q_offset=q_offset,
        device=q.device,
        block_size=block_size,
        own_blocks=own_blocks,
    )
    return plan(
        q,
        k,
        v,
        scale=scale,
        score_mod=score_mod,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        executor=executor,
    )


def plan_varlen(
    mask: Mask | PerHead,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    n_heads: int,
    q_offset: int | Sequence[int] | Tensor | None = None,
    device: torch.device | str | None = None,
    block_size: int | tuple[int, int] = 128,
    own_blocks: bool | None = None,
) -> VarlenMask:
    """What `varlen` runs: made once for each mask and lengths, of which the latest 64 are kept.

    Inside your own torch.compile cu_seqlens cannot be read: make the plan before it, and call it
    there with q, k and v. The arguments are those of `varlen`; q, k and v will be on `device`, by
    default cu_seqlens_q's.
    """
    refuse_other("varlen", mask)
    check_size("n_heads", n_heads, MOST_HEADS)
    blocks = block_sizes("block_size", block_size)
    q_lens, kv_lens = lengths(cu_seqlens_q, cu_seqlens_k)
    q_offsets = first_positions(q_offset, q_lens, kv_lens)
    device = cu_seqlens_q.device if device is None else usable_device(device)
    if own_blocks is None:
        masks = mask.distinct if isinstance(mask, PerHead) else (mask,)
        own_blocks = any(table.tensor.dim() > 1 for x in masks for table in x.tables)
    return plan_of_lengths(
        PlanKey(mask, q_lens, kv_lens, q_offsets, n_heads, device, blocks, own_blocks)
    )


class PlanKey(NamedTuple):
    """All that a VarlenMask is made of.

    q_lens, kv_lens: the tokens of each sequence
    q_offsets: the position of each sequence's first query
    own_blocks: start each sequence in a block of its own
    """

    mask: Mask | PerHead
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q_offsets: tuple[int, ...]
    n_heads: int
    device: torch.device
    block_size: tuple[int, int]
    own_blocks: bool


def plan_of_lengths(key: PlanKey) -> VarlenMask:
    """The VarlenMask of a key, from those that are kept or made now."""
    plan = _plans.get(key)
    if plan is None or plan.is_stale:
        plan = VarlenMask(key)
    _plans[key] = plan
    _plans.move_to_end(key)
    if len(_plans) > PLANS_KEPT:
        _plans.popitem(last=False)
    return plan


_plans: OrderedDict[PlanKey, VarlenMask] = OrderedDict()


def refuse_unpacked(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise MaskError unless q, k and v have the three dimensions of packed tokens."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise MaskError(f"{name} is {found}; it must be a tensor [tokens, heads, head_dim].")


class VarlenMask:
    """A mask compiled for packed sequences of given lengths: call it on q, k and v, or print it.

    q_lens, kv_lens: the tokens of each sequence
    compiled: the mask of the call that computes all sequences; None if there is nothing to compute
    is_batch: whether that call has a batch row for each sequence, all being of one length
    """

    @cpu_by_default()
    def __init__(self, key: PlanKey) -> None:
        mask, q_lens, kv_lens, q_offsets, n_heads, device, block_size, own_blocks = key
        self.q_lens, self.kv_lens = q_lens, kv_lens
        self.is_batch = len({*zip(q_lens, kv_lens, q_offsets, strict=True)}) == 1
        self.compiled: CompiledMask | None = None
        if not sum(q_lens) or not sum(kv_lens):
            return
        options: dict[str, Any] = {"n_heads": n_heads, "device": device, "block_size": block_size}
        if self.is_batch:
            options |= {"batch": len(q_lens), "q_offset": q_offsets[0]}
            self.compiled = compile_mask(mask, q_lens[0], kv_lens[0], **options)
            return
        steps = block_size if own_blocks else (1, 1)
        self._q, self._kv = Pack(q_lens, steps[0], device), Pack(kv_lens, steps[1], device)
        self._tokens = PackedTokens(self._q, self._kv, q_offsets)
        options |= {"batch": 1, "q_offset": 0}
        packed = self._tokens.of_heads(as_per_head(mask, n_heads))
        self.compiled = compile_mask(packed, self._q.size, self._kv.size, **options)

    @property
    def is_stale(self) -> bool:
        """Whether a table of the mask was written to since: the plan can no longer run."""
        return self.compiled is not None and any(table.changed for table in self.compiled.tables)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: bool = False,
        score_mod: ScoreMod | None = None,
        **options: Any,
    ) -> Any:
        """Attention inside each sequence; shapes and options are those of `varlen`."""
        for name, x, lens, ends in (
            ("q", q, self.q_lens, "cu_seqlens_q"),
            ("k", k, self.kv_lens, "cu_seqlens_k"),
            ("v", v, self.kv_lens, "cu_seqlens_k"),
        ):
            if len(x) != sum(lens):
                raise MaskError(
                    f"{ends} ends at {sum(lens)} and {name} has {len(x)} tokens; it must end at "
                    f"the number of tokens of {name}."
                )
        options |= {"return_lse": return_lse, "score_mod": score_mod}
        lse: Tensor | None
        if self.compiled is None:
            _refuse(**options)
            out, lse = _nothing(q, k, v)
        elif self.is_batch:
            n = len(self.q_lens)
            rows = [x.view(n, len(x) // n, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
            out, lse = _pair(self.compiled(*rows, **options), return_lse)
            out = out.transpose(1, 2).flatten(0, 1)
            lse = lse.transpose(0, 1).flatten(1) if lse is not None else None
        else:
            if score_mod is not None:
                options["score_mod"] = self._tokens.score_mod(score_mod)
            packs = ((self._q, q), (self._kv, k), (self._kv, v))
            one_row = [pack.spread(x).transpose(0, 1)[None] for pack, x in packs]
            out, lse = _pair(self.compiled(*one_row, **options), return_lse)
            out = self._q.gather(out[0].transpose(0, 1))
            lse = self._q.gather(lse[0].T).T if lse is not None else None
        out = out.contiguous()
        return (out, lse) if return_lse else out

    def dropout_pattern(self, sequence: int, n_heads: int, p: float, seed: int | Tensor) -> Tensor:
        """Which weights of a sequence dropout keeps: bool [n_heads, q_len, kv_len] of it."""
        b, q_start, kv_start = sequence, 0, 0
        if not self.is_batch and self.compiled is not None:
            b, q_start, kv_start = 0, *(int(x.starts[sequence]) for x in (self._q, self._kv))
        heads, rows, columns = (
            torch.arange(n, device=None if self.compiled is None else self.compiled.device)
            for n in (n_heads, self.q_lens[sequence], self.kv_lens[sequence])
        )
        return is_kept(
            seed, p, b, heads[:, None, None], rows[:, None] + q_start, columns + kv_start
        )

    def __str__(self) -> str:
        queries = amount(sum(self.q_lens), "query", "queries")
        title = (
            f"VarlenMask: {amount(len(self.q_lens), 'sequence')}, {queries} and "
            f"{amount(sum(self.kv_lens), 'key')}, run as "
            f"{'a batch' if self.is_batch else 'one packed sequence'}"
        )
        return f"{title}\n{self.compiled}" if self.compiled is not None else title

    __repr__ = __str__


def _refuse(
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    executor: str | None = None,
) -> None:
    """Raise for the options that are refused wherever there is something to compute."""
    Modifiers(scale, score_mod, Dropout.of(dropout_p, dropout_seed), return_lse).checked()
    refuse_unknown(executor)


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the LSE where there are no queries or no keys; gradients are 0."""
    zero = q[:0].sum() + k[:0].sum() + v[:0].sum()
    lse = torch.full((q.shape[1], len(q)), -torch.inf, device=q.device)
    return zero.expand(*q.shape[:2], v.shape[2]), lse


def _pair(result: Any, has_lse: bool) -> tuple[Tensor, Tensor | None]:
    return result if has_lse else (result, None)
