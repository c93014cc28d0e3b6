"""torch's flex_attention, compiled once for each structure of mask."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.dropout import Dropout
from flexsparse.executors import flex_cpu
from flexsparse.executors.captured import captured_by
from flexsparse.tensors import ScoreMod


def _missing_on_cpu() -> str | None:
    if sys.platform == "darwin" or not torch.cpu._is_avx2_supported():
        return "flex_attention on CPU needs an x86 processor with AVX2, under Linux or Windows"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    if shutil.which(compiler) is None:
        return (
            f"flex_attention on CPU needs a C++ compiler, and {compiler} is not to be found: "
            "install it, or name yours in the environment variable CXX"
        )
    return None


_MISSING_ON_CPU = _missing_on_cpu()  # looked up once: torch.compile takes it as a constant


def missing(device: torch.device) -> str | None:
    """Why flex_attention cannot be compiled on this machine, as a sentence, or None if it can."""
    return _MISSING_ON_CPU if device.type == "cpu" else None


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: ScoreMod | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> str | None:
    """Why flex_attention cannot run these inputs, as a sentence, or None if it can."""
    if q.is_cpu:
        if _MISSING_ON_CPU is not None:
            return _MISSING_ON_CPU
        if torch.is_grad_enabled():
            if q.requires_grad or k.requires_grad or v.requires_grad:
                return "flex_attention has no backward on CPU, and an input requires a gradient"
            # a graph being compiled cannot tell what a score_mod reads
            if score_mod and not torch.compiler.is_compiling() and captured_by(score_mod, q):
                return (
                    "flex_attention has no backward on CPU, and score_mod reads a tensor that "
                    "requires a gradient"
                )
        if return_lse:
            return "flex_attention returns no LSE on CPU"
        if dropout is not None:
            return "dropout needs the LSE, and flex_attention returns none on CPU"
        if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"flex_attention on CPU takes float32, bfloat16 and float16, and q is {q.dtype}"
    elif q.is_cuda:
        for name, size in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
            if size < 16:
                return f"flex_attention on CUDA needs a head_dim of 16; that of {name} is {size}"
    if not (q.numel() and k.numel() and v.numel()):
        return "an input is empty"
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    dropout: Dropout | None = None,
    kernel_options: dict[str, bool] | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention with a BlockMask: out [B, n_heads, q_len, Dv], LSE [B, n_heads, q_len] or None."""
    if dropout is not None:
        return _run_dropped(
            q, k, v, block_mask, dropout, scale=scale, score_mod=score_mod, return_lse=return_lse
        )
    hints = kernel_options or {}
    if q.is_cpu:
        # there are no gradients here, and torch refuses inputs that ask for them, no_grad or not
        q, k, v = q.detach(), k.detach(), v.detach()
    if torch.compiler.is_compiling():
        # A compiler above us is at work: hand it the plain operator. Inductor's CPU kernel ignores
        # the storage offset of a view made inside the graph, and fails where it would fuse with
        # what comes after it (torch 2.13): so it gets no views, and a copy seals its output.
        score_mod = score_mod and _scaled(score_mod, None, q.device)
        if not q.is_cpu:
            return _attend(q, k, v, block_mask, score_mod, scale, return_lse, hints)  # type: ignore[no-any-return]
        q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
        out, lse = _attend(q, k, v, block_mask, score_mod, scale, return_lse, hints)
        return _sealed(out), lse
    if scale is not None and scale == q.shape[3] ** -0.5:
        scale = None
    if score_mod is not None or scale is not None:
        score_mod, scale = _scaled(score_mod, scale, q.device), None if scale is None else 1.0
    arguments = (q, k, v, block_mask, score_mod, scale, return_lse, hints)
    if block_mask.mask_mod not in _fixed_tables:
        _fix_table_lengths(block_mask.mask_mod)
        _fixed_tables.add(block_mask.mask_mod)
    if score_mod is not None:
        _fix_table_lengths(score_mod)
    structure = _structure(q, k, v, block_mask, score_mod, return_lse, hints)
    while True:
        is_fixed = structure in _fixed_lengths
        key = (structure, (q.shape, k.shape) if is_fixed else None)
        kernel = _kernels.get(key)
        is_new = kernel is None
        if kernel is None:
            # on CPU, lengths are data from the first call on; measured as fast as fixed lengths
            dynamic = False if is_fixed else True if q.is_cpu else None
            kernel = _compile(dynamic, q.device)
            if score_mod is not None:
                # its numbers are constants, in any case: of others torch 2.15 makes no kernel
                kernel = torch._dynamo.config.patch(specialize_float=True)(kernel)
            _kernels[key] = kernel
        # at every call, since any may compile: a guard fails
        tie_equal_lengths = _untie_equal_lengths()
        try:
            return kernel(*arguments)  # type: ignore[no-any-return]
        except _gave_up():
            # dynamo met its limit of recompilations for this function; a new one has a new limit
            del _kernels[key]
            if is_new:
                raise
        except _compile_error():
            # some masks and score_mods do not compile in C++ with lengths as data (torch 2.13)
            del _kernels[key]
            if not q.is_cpu or is_fixed:
                raise
            _fixed_lengths.add(structure)
        finally:
            tie_equal_lengths()


def _scaled(score_mod: ScoreMod | None, scale: float | None, device: torch.device) -> ScoreMod:
    """A score_mod, any callable, and a scale, each or none, as the function that dynamo takes."""
    # a tensor, because a number would be compiled into the kernel
    factor = None if scale is None else _as_tensor(scale, device)

    def scaled(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if factor is not None:
            score = score * factor
        if score_mod is not None:
            score = score_mod(score, b, h, q_idx, kv_idx)
        # inductor's C++ writes float64 to where it reads float32 (torch 2.13)
        return score.float() if score.dtype == torch.float64 else score

    return scaled


@functools.lru_cache(maxsize=64)
def _as_tensor(number: float, device: torch.device) -> Tensor:
    # kept over calls, of which one in inference_mode must not make it unfit for gradients
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.float32, device=device)


def _run_dropped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    dropout: Dropout,
    *,
    scale: float | None,
    score_mod: ScoreMod | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Dropout by two passes, since flex_attention has none: softmax over what is left, rescaled.

    sum(kept p v) / (1 - p_drop) = softmax(kept s) v * exp(lse of kept s - lse of s) / (1 - p_drop)
    """
    _, lse = run(q, k, v, block_mask, scale=scale, score_mod=score_mod, return_lse=True)
    dropping = dropout.dropping(score_mod, q.device)
    out, kept_lse = run(q, k, v, block_mask, scale=scale, score_mod=dropping, return_lse=True)
    assert lse is not None
    assert kept_lse is not None
    # in a row with nothing left the out is 0, and a finite difference keeps its gradient from NaN
    is_empty = kept_lse == -torch.inf
    part = (kept_lse.masked_fill(is_empty, 0) - lse.masked_fill(is_empty, 0)).exp()
    out = (out * (part / (1 - dropout.p)).unsqueeze(-1)).to(q.dtype)
    return out, lse if return_lse else None


@torch.library.custom_op("flexsparse::sealed", mutates_args=())
def _sealed(x: Tensor) -> Tensor:
    """A copy that no compiler looks into."""
    return x.clone()


@_sealed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_symbols: Any = torch.fx.experimental._config
# Without this, lengths that happen to be equal in a call that compiles would have to stay equal.
# torch.compile sets its own in this way at each call: config.patch takes several times as long.
_untie_equal_lengths = _symbols._make_closure_patcher(use_duck_shape=False)
_kernels: dict[Any, Callable[..., Any]] = {}
_fixed_tables: weakref.WeakSet[Any] = weakref.WeakSet()  # mask_mods, whose tables never change
_fixed_lengths: set[Any] = set()  # structures whose kernels compile for fixed lengths alone


class _GaveUpError(RuntimeError):
    """dynamo ran a kernel's Python body instead of compiling it, which would be dense and slow."""


def _gave_up() -> tuple[type[Exception], ...]:
    """What says that dynamo met its limit: of fullgraph, newer torch raises an error of its own."""
    theirs = getattr(torch._dynamo.exc, "FailOnRecompileLimitHit", _GaveUpError)
    return _GaveUpError, theirs


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None,
    scale: float | None,
    return_lse: bool,
    hints: dict[str, bool],
) -> Any:
    gqa = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"block_mask": block_mask, "scale": scale, "enable_gqa": gqa}
    if hints:
        options["kernel_options"] = hints
    if return_lse:
        aux = torch_flex.AuxRequest(lse=True)
        out, extra = torch_flex.flex_attention(q, k, v, score_mod, return_aux=aux, **options)
        return out, extra.lse
    return torch_flex.flex_attention(q, k, v, score_mod, **options), None


def _attend_compiled(*arguments: Any) -> Any:
    if not torch.compiler.is_compiling():
        raise _GaveUpError(
            "torch.compile is switched off, and without it flex_attention is dense and slow. "
            'Switch it on, or take executor="blockwise", which compiles nothing.'
        )
    return _attend(*arguments)


def _compile(dynamic: bool | None, device: torch.device) -> Callable[..., Any]:
    """A compiled flex_attention with a code object, and so a cache and a limit, of its own."""
    own_code = _attend_compiled.__code__.replace()
    function = types.FunctionType(own_code, _attend_compiled.__globals__, "_attend_compiled")
    backend = flex_cpu.compile_graph if device.type == "cpu" else "inductor"
    return torch.compile(function, dynamic=dynamic, fullgraph=True, backend=backend)


def _compile_error() -> type[Exception]:
    from torch._inductor.exc import InductorError  # takes a second to import

    return InductorError


def _fix_table_lengths(mod: Any) -> None:
    """Let the compiler take the lengths of captured tables as fixed.

    Inductor's C++ kernel does not compile with tables of symbolic length (torch 2.13). `lower`
    rounds lengths up to powers of 2, so that there are few.
    """
    for table in _captured(mod):
        if isinstance(table, Tensor) and not hasattr(table, "_dynamo_static_indices"):
            torch._dynamo.mark_static(table)


def _captured(mod: Any, seen: tuple[Any, ...] = ()) -> Iterator[Any]:
    """What a function closes over, and what the functions among that do."""
    for cell in getattr(mod, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:
            continue  # not assigned yet
        yield value
        if isinstance(value, types.FunctionType) and value not in seen:
            yield from _captured(value, (*seen, value))


def _numbers_and_code(score_mod: ScoreMod | None) -> Any:
    """What dynamo compiles into the kernel of a score_mod: all but the values of its tensors.

    Each number gets a kernel of its own: one kernel for all would be compiled again at each of
    them, and forget all at dynamo's limit.
    """
    if score_mod is None:
        return None
    return (
        getattr(score_mod, "__code__", None),
        *(
            x if isinstance(x, (int, float)) else getattr(x, "__code__", type(x))
            for x in _captured(score_mod)
        ),
    )


def _structure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None,
    return_lse: bool,
    hints: dict[str, bool],
) -> Any:
    """What a kernel is specialised for: the structure of the mask and never its numbers."""
    code = getattr(block_mask.mask_mod, "__code__", block_mask.mask_mod)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    batch, n_heads, q_len, head_dim = q.shape
    _, n_kv_heads, kv_len, _ = k.shape
    # sizes of 1 and the order of dimensions in memory are specialised by the compiler in any case
    return (
        code,
        _numbers_and_code(score_mod),
        return_lse,
        tuple(hints),
        grad,
        q.device,
        q.dtype,
        n_heads,
        n_kv_heads,
        head_dim,
        v.shape[3],
        block_mask.BLOCK_SIZE,
        tuple([size == 1 for size in block_mask.kv_indices.shape]),
        batch == 1,
        q_len == 1,
        kv_len == 1,
        q.is_contiguous(),
        k.is_contiguous(),
        v.is_contiguous(),
    )
