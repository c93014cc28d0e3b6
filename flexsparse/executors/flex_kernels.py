"""The compiled kernels of flex_attention: one for each structure of mask, kept for the process."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.errors import ExecutorError
from flexsparse.executors import flex_cpu
from flexsparse.tensors import ScoreMod

_symbols: Any = torch.fx.experimental._config
# Without this, lengths that happen to be equal in a call that compiles would have to stay equal.
# torch.compile sets its own in this way at each call: config.patch takes several times as long.
_untie_equal_lengths = _symbols._make_closure_patcher(use_duck_shape=False)
_kernels: dict[Any, Callable[..., Any]] = {}
_fixed_tables: weakref.WeakSet[Any] = weakref.WeakSet()  # mask_mods, whose tables never change
_fixed_lengths: set[Any] = set()  # structures whose kernels compile for fixed lengths alone


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None,
    scale: float | None,
    return_lse: bool,
    hints: dict[str, bool],
) -> tuple[Tensor, Tensor | None]:
    """`attend` by the compiled kernel of this structure: out, and the LSE or None."""
    arguments = (q, k, v, block_mask, score_mod, scale, return_lse, hints)
    if block_mask.mask_mod not in _fixed_tables:
        _fix_table_lengths(block_mask.mask_mod)
        _fixed_tables.add(block_mask.mask_mod)
    if score_mod is not None:
        _fix_table_lengths(score_mod)
    structure = _structure(q, k, v, block_mask, score_mod, return_lse, hints)
    is_fixed = structure in _fixed_lengths
    while True:
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
            result = kernel(*arguments)
        except _gave_up():
            # dynamo met its limit of recompilations for this function; a new one has a new limit
            _kernels.pop(key, None)  # another thread may have taken it out
            if is_new:
                raise
        except _compile_error() as error:
            _kernels.pop(key, None)
            if not q.is_cpu or is_fixed:
                raise ExecutorError(_no_kernel(error)) from error
            # some masks and score_mods do not compile in C++ with lengths as data (torch 2.13)
            is_fixed = True
        else:
            if is_fixed:
                # not before: what fails either way, as on a full disk, says nothing of lengths
                _fixed_lengths.add(structure)
            return result  # type: ignore[no-any-return]
        finally:
            tie_equal_lengths()


class _GaveUpError(RuntimeError):
    """dynamo ran a kernel's Python body instead of compiling it, which would be dense and slow."""


def _gave_up() -> tuple[type[Exception], ...]:
    """What says that dynamo met its limit: of fullgraph, newer torch raises an error of its own."""
    theirs = getattr(torch._dynamo.exc, "FailOnRecompileLimitHit", _GaveUpError)
    return _GaveUpError, theirs


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None,
    scale: float | None,
    return_lse: bool,
    hints: dict[str, bool],
) -> tuple[Tensor, Tensor | None]:
    """The flex_attention of torch, as it is: out, and the LSE or None."""
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
    return attend(*arguments)


def _compile(dynamic: bool | None, device: torch.device) -> Callable[..., Any]:
    """A compiled flex_attention with a code object, and so a cache and a limit, of its own."""
    own_code = _attend_compiled.__code__.replace()
    function = types.FunctionType(own_code, _attend_compiled.__globals__, "_attend_compiled")
    backend = flex_cpu.compile_graph if device.type == "cpu" else "inductor"
    return torch.compile(function, dynamic=dynamic, fullgraph=True, backend=backend)


def _compile_error() -> type[Exception]:
    from torch._inductor.exc import InductorError  # takes a second to import

    return InductorError


def _no_kernel(error: Exception) -> str:
    """That torch compiled no kernel, and the fix; torch's own text takes hundreds of lines."""
    # of a C++ compiler, what it printed says why, and not the command before it
    lines = (str(error).partition("\nOutput:\n")[2] or str(error)).splitlines()
    why = next((line.strip(" :") for line in lines if line.strip()), type(error).__name__)
    return (
        f"torch.compile made no kernel of flex_attention for this call ({why}; its own error "
        'comes before this one). Take executor="blockwise", which compiles nothing and gives the '
        "same."
    )


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
