"""Attention over block lists in plain PyTorch: any device, any dtype, with gradients.

    s = q k^T * scale      p = softmax(score_mod(s) where kept)      out = (p dropped) v

Only kept blocks are computed. Lines of blocks of one length are done together, in batches small
enough for the cache; long lines are merged piece by piece by their running maximum. The backward
recomputes p from that maximum, so memory is O(length) plus one batch. Everything is computed in
float32 (float64 for float64 inputs). Inside, scores are powers of 2: exp2 is several times faster
than exp. A hidden key may hold anything, NaN too; a hidden value may not: 0 * NaN is NaN.
Gradients of k and v are added up by index_add_, whose order is not fixed on CUDA unless
torch.use_deterministic_algorithms is on. There is no second derivative; to ask for it raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from flexsparse.dropout import Dropout
from flexsparse.errors import ExecutorError
from flexsparse.executors.blockwise_schedule import Sizes
from flexsparse.executors.blockwise_scores import Call
from flexsparse.executors.captured import Captured, captured_by, with_variables_of_now
from flexsparse.uncompiled import uncompiled

Mod = Callable[..., Tensor]

LARGEST_BLOCK = 1 << 24  # scores
NO_GRAPH = (
    "flexsparse's blockwise executor, which on CPU has the gradients, dropout and the LSE, loops "
    "over its block lists and runs between graphs: drop fullgraph=True, or export under "
    "torch.no_grad()"
)
HAS_GRADIENTS = "The blockwise executor, which on CPU has the gradients,"
DENSE_DOES = 'executor="reference" does, and computes every pair of query and key.'


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    score_mod: Mod | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the blocks that block_mask lists, and its LSE or None; differentiable, both.

    Args:
        q: [B, n_heads, q_len, D].
        k: [B, n_kv_heads, kv_len, D]; query head h reads kv head h // (n_heads / n_kv_heads).
        v: [B, n_kv_heads, kv_len, Dv].
        block_mask: lists for B or 1 batch rows and n_heads or 1 heads, and a mask_mod of raw
            indices, which says what is kept inside PARTIAL blocks.
        scale: of the scores; 1 / sqrt(D) by default.
        score_mod: as in FlexAttention; tensors that it captures receive gradients too. The
            backward calls it again, with the variables that it read here.
        dropout: of the weights.
        return_lse: give the LSE of the undropped softmax: float32, natural log, -inf where a row
            keeps nothing (and out is 0).
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg=NO_GRAPH)
    return _run(q, k, v, block_mask, scale, score_mod, dropout, return_lse)


@uncompiled
def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    scale: float | None,
    score_mod: Mod | None,
    dropout: Dropout | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    lengths = zip(block_mask.BLOCK_SIZE, (q.shape[2], k.shape[2]), strict=True)
    block_q, block_kv = (min(block, max(length, 1)) for block, length in lengths)
    call = Call(
        block_mask=block_mask,
        sizes=Sizes(
            batch=q.shape[0],
            n_heads=q.shape[1],
            n_kv_heads=k.shape[1],
            q_len=q.shape[2],
            kv_len=k.shape[2],
            block=(block_q, block_kv),
            mask_batch=block_mask.kv_num_blocks.shape[0],
            mask_heads=block_mask.kv_num_blocks.shape[1],
        ),
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        mask_mod=None if block_mask.mask_mod is noop_mask else block_mask.mask_mod,
        score_mod=with_variables_of_now(score_mod),
        dropout=None if dropout is None else dropout.with_seed_of_now(),
    )
    captured = Captured([], [], [])
    if call.score_mod is not None and torch.is_grad_enabled():
        captured = captured_by(call.score_mod, q)
    n = len(captured.with_gradients)
    out, lse, _, _ = _Blockwise.apply(  # type: ignore[no-untyped-call]
        call, n, q, k, v, *captured.with_gradients, *captured.others
    )
    return out, lse.float() if return_lse else None


def unsupported(q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int]) -> str | None:
    """Why this executor cannot run these inputs, as a sentence, or None if it can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return f"{name} is {x.dtype}; it takes float16, bfloat16, float32 or float64"
        if x.is_nested or x.layout != torch.strided:
            return f"{name} is not a plain strided tensor; pad it, or pack it and use varlen"
        if x.is_meta:
            return f"{name} has no data (device meta)"
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return (
            "it loops over its block lists, which torch.export cannot record; what needs no "
            "gradients, dropout or LSE runs on flex: export under torch.no_grad()"
        )
    block_q, block_kv = block_size
    scores = min(block_q, q.shape[2]) * min(block_kv, k.shape[2])
    if scores > LARGEST_BLOCK:
        return (
            f"one block of {block_q} x {block_kv} has {scores} scores, more than the "
            f"{LARGEST_BLOCK} it holds at once; compile the mask with block_size=128"
        )
    return None


class _Scratch:
    """Memory by name, used again by every batch: fresh pages cost more than the arithmetic."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, device=self._device, dtype=self._dtype)
        return self._flat[name][:size].view(shape)

    def take(self, name: str, blocks: Tensor, index: Tensor, entries: int) -> Tensor:
        """blocks[index] in the working dtype, as [entries, tokens, D]."""
        taken = self(name, len(index), *blocks.shape[1:])
        if blocks.dtype == self._dtype:
            torch.index_select(blocks, 0, index, out=taken)
        else:
            taken.copy_(blocks.index_select(0, index))
        return taken.view(entries, -1, blocks.shape[2])


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        call: Call, n: int, q: Tensor, k: Tensor, v: Tensor, *captured: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block_q, block_kv = call.sizes.block
        dtype = torch.promote_types(q.dtype, torch.float32)
        q_blocks = _blocks(q.to(dtype) * (call.scale * call.unit), block_q)
        k_blocks, v_blocks = _blocks(k, block_kv), _blocks(v, block_kv)
        per_row = (len(q_blocks), block_q)
        out = q_blocks.new_zeros(*per_row, v.shape[3])
        top = q_blocks.new_full((*per_row, 1), -torch.inf)  # the maximum of a row's scores so far
        mass = q_blocks.new_zeros(*per_row, 1)  # the sum of their exp(score - top)
        scratch = _Scratch(q.device, dtype)
        for batch in call.batches(q.device, dtype):
            at, entries = batch.at, len(batch.q_idx)
            qs = scratch.take("q", q_blocks, at.q_block, entries)
            ks = scratch.take("k", k_blocks, at.kv_block, entries)
            vs = scratch.take("v", v_blocks, at.kv_block, entries)
            flat = (entries, qs.shape[1], ks.shape[1])
            s = torch.bmm(qs, ks.mT, out=scratch("s", *flat))
            s = s.view(entries, -1, block_q, flat[2])
            if call.score_mod is not None:
                # a copy: it may be a tensor that the score_mod captured
                s = call.modify(s, batch).clone(memory_format=torch.contiguous_format)
            s = call.hide_(s, batch)
            new_top = s.amax(-1).view(-1, block_q, 1)
            if not batch.work.is_first:
                old_top = top.index_select(0, at.q_block)
                new_top = torch.maximum(new_top, old_top)
            # so that -inf meets no -inf in a row that keeps nothing so far
            base = new_top.masked_fill(new_top == -torch.inf, 0)
            p = call.exp_(s.sub_(base.view(*s.shape[:3], 1)))
            new_mass = p.sum(-1).view(-1, block_q, 1)
            factor = call.drop_factor(batch, dtype)
            if factor is not None:
                p = p.mul_(factor)
            new_out = torch.bmm(p.reshape(flat), vs, out=scratch("o", *flat[:2], v.shape[3]))
            new_out = new_out.view(-1, block_q, v.shape[3])
            if not batch.work.is_first:
                shrink = call.exp_(old_top - base)
                new_mass.addcmul_(mass.index_select(0, at.q_block), shrink)
                new_out.addcmul_(out.index_select(0, at.q_block), shrink)
            top.index_copy_(0, at.q_block, new_top)
            mass.index_copy_(0, at.q_block, new_mass)
            out.index_copy_(0, at.q_block, new_out)
        out.div_(mass.masked_fill(mass == 0, 1))
        top, mass = (_unblocks(x, q).squeeze(-1) for x in (top, mass))
        return _unblocks(out, q).to(q.dtype), top / call.unit + mass.log(), top, mass

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, n, q, k, v, *captured = inputs
        ctx.captured = captured[:n]
        out, _, top, mass = output
        # top and mass apart: their sum, the lse, would round away the mass where scores are large
        ctx.save_for_backward(q, k, v, out, top, mass, *captured)
        ctx.mark_non_differentiable(top, mass)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: None) -> Any:
        # is_grads_batched maps by an older vmap, which asks no function for a rule
        for grad in (grad_out, grad_lse):
            if grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad):
                _refuse_batches()
        saved = ctx.saved_tensors  # torch refuses if any was written to, and to be asked twice
        gradients = _Gradients.apply(  # type: ignore[no-untyped-call]
            ctx.call, ctx.captured, grad_out, grad_lse, *saved
        )
        n_others = len(saved) - 6 - len(ctx.captured)
        return None, None, *gradients, *[None] * n_others


class _Gradients(torch.autograd.Function):
    """The backward of `_Blockwise`, as a function that says that it has none itself."""

    @staticmethod
    def forward(
        call: Call,
        captured: list[Tensor],
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        top: Tensor,
        mass: Tensor,
        *_: Tensor,
    ) -> Any:
        block_q, block_kv = call.sizes.block
        dtype = torch.promote_types(q.dtype, torch.float32)
        q_blocks = _blocks(q.to(dtype) * (call.scale * call.unit), block_q)
        k_blocks, v_blocks = _blocks(k, block_kv), _blocks(v, block_kv)
        # grad_s = p / mass * (grad_p - delta), and what is divided by mass is the smaller factor
        mass = mass.masked_fill(mass == 0, 1).unsqueeze(-1)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_out = grad_out.to(dtype) / mass
        delta = (grad_out * out.to(dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse.unsqueeze(-1) / mass
        # p = exp(s - level); 0 in rows that keep nothing or lie past the end
        level = top.masked_fill(top == -torch.inf, torch.inf).unsqueeze(-1)
        o_blocks, delta = _blocks(grad_out, block_q), _blocks(delta, block_q)
        level = _blocks(level, block_q, past_end=torch.inf)
        # a hidden key may hold NaN, of which even 0 times is NaN
        keys_are_finite = math.isfinite(k.sum(dtype=dtype))

        grad_q = torch.zeros_like(q_blocks)
        grad_k = torch.zeros_like(k_blocks, dtype=dtype)
        grad_v = torch.zeros_like(v_blocks, dtype=dtype)
        grad_captured = [torch.zeros_like(x) for x in captured]
        scratch = _Scratch(q.device, dtype)
        for batch in call.batches(q.device, dtype):
            at, entries = batch.at, len(batch.q_idx)
            qs = scratch.take("q", q_blocks, at.q_block, entries)
            os = scratch.take("o", o_blocks, at.q_block, entries)
            ks = scratch.take("k", k_blocks, at.kv_block, entries)
            vs = scratch.take("v", v_blocks, at.kv_block, entries)
            flat = (entries, qs.shape[1], ks.shape[1])
            shape = (entries, flat[1] // block_q, block_q, flat[2])
            s = torch.bmm(qs, ks.mT, out=scratch("s", *flat)).view(shape)
            grad_s = torch.bmm(os, vs.mT, out=scratch("grad_s", *flat)).view(shape)
            if call.score_mod is not None:
                natural = call.hide_(s, batch, with_zero=True)
                with torch.enable_grad():
                    modified = call.modify(natural.requires_grad_(), batch)
                s = modified.detach().clone(memory_format=torch.contiguous_format)
            s = call.hide_(s, batch)
            p = call.exp_(s.sub_(level.index_select(0, at.q_block).view(*shape[:3], 1)))
            dropped = p
            factor = call.drop_factor(batch, dtype)
            if factor is not None:
                grad_s, dropped = grad_s.mul_(factor), factor.mul_(p)
            grad_s.sub_(delta.index_select(0, at.q_block).view(*shape[:3], 1)).mul_(p)
            grad_vs = torch.bmm(dropped.reshape(flat).mT, os, out=scratch("grad_v", *vs.shape))
            _add_blocks(grad_v, at.kv_block, grad_vs)
            if call.score_mod is not None and not modified.requires_grad:
                grad_s.zero_()  # it gives scores that depend on nothing that has a gradient
            elif call.score_mod is not None:
                grad_s, *grads = torch.autograd.grad(
                    modified,
                    [natural, *captured],
                    grad_s,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for total, grad in zip(grad_captured, grads, strict=True):
                    total += grad
                grad_s = call.hide_(grad_s.contiguous(), batch, with_zero=True)
            grad_s = grad_s.reshape(flat)
            _add_blocks(
                grad_k, at.kv_block, torch.bmm(grad_s.mT, qs, out=scratch("grad_k", *ks.shape))
            )
            if not keys_are_finite:
                ks.nan_to_num_(0, 0, 0)
            _add_blocks(grad_q, at.q_block, torch.bmm(grad_s, ks, out=scratch("grad_q", *qs.shape)))
        grad_q = _unblocks(grad_q.mul_(call.scale), q).to(q.dtype)
        grad_k = _unblocks(grad_k.div_(call.unit), k).to(k.dtype)
        return grad_q, grad_k, _unblocks(grad_v, v).to(v.dtype), *grad_captured

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise ExecutorError(f"{HAS_GRADIENTS} computes no second derivatives. {DENSE_DOES}")

    @staticmethod
    def vmap(*_: Any) -> Any:
        _refuse_batches()


def _refuse_batches() -> NoReturn:
    raise ExecutorError(
        f"{HAS_GRADIENTS} takes one gradient of its output at a time, and not a batch of them "
        f"as jacrev and is_grads_batched give. {DENSE_DOES}"
    )


def _blocks(x: Tensor, block: int, past_end: float = 0.0) -> Tensor:
    """[B, heads, length, D] -> contiguous [B * heads * blocks, block, D]."""
    x = functional.pad(x, (0, 0, 0, -x.shape[2] % block), value=past_end)
    # also where reshape would give a view: gradients are added up in what is made like this
    return x.reshape(-1, block, x.shape[3]).contiguous()


def _unblocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_blocks`, to the batch, heads and length of `like`."""
    x = blocks.reshape(like.shape[0], like.shape[1], -1, blocks.shape[2])
    return x[:, :, : like.shape[2]].contiguous()


def _add_blocks(total: Tensor, index: Tensor, x: Tensor) -> None:
    """total[index] += x, block by block; a block may come more than once."""
    total.flatten(1).index_add_(0, index, x.reshape(len(index), -1))
