"""Whether q, k and v fit a compiled mask and each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flexsparse.dispatch import is_cast_by_autocast

if TYPE_CHECKING:
    from flexsparse.compiler import CompiledMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mismatch(compiled: CompiledMask, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why these inputs do not fit this mask or each other, as a sentence, or None if they do."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        is_tensor = isinstance(x, Tensor)
        if is_tensor and (x.is_nested or x.layout != torch.strided):
            return f"{name} is nested or sparse; pad it, or pack it and use fs.varlen."
        if not is_tensor or x.dim() != 4:
            found = tuple(x.shape) if is_tensor else type(x).__name__
            return f"{name} is {found}; it must be a tensor [batch, heads, tokens, head_dim]."
        if x.dtype != q.dtype and not (is_cast_by_autocast(x) and is_cast_by_autocast(q)):
            return f"{name} is {x.dtype} and q is {q.dtype}; give all three the same dtype."
        if x.device != compiled.device:
            return (
                f"{name} is on {x.device} and this mask was compiled for {compiled.device}. "
                f"Compile again with device={str(x.device)!r}, or move {name}."
            )
    # each x.shape makes a tuple
    batch, n_heads, q_len, head_dim = q.shape
    k_batch, n_kv_heads, k_len, k_head_dim = k.shape
    v_batch, v_heads, v_len, v_head_dim = v.shape
    for name, rows in (("k", k_batch), ("v", v_batch)):
        if rows != batch:
            return f"{name} has {rows} batch rows and q has {batch}; give them the same."
    if q.dtype not in DTYPES:
        return (
            f"q, k and v are {q.dtype}; attention takes floating-point tensors: float16, bfloat16, "
            "float32 or float64."
        )
    for name, n, compiled_n, what in (
        ("q", q_len, compiled.q_len, "q_len"),
        ("k", k_len, compiled.kv_len, "kv_len"),
        ("v", v_len, compiled.kv_len, "kv_len"),
    ):
        if not n:
            return f"{name} has length 0; it must be of 1 token or more."
        if n != compiled_n:
            return (
                f"{name} has length {n} but this mask was compiled for {what}={compiled_n}. "
                f"Compile again with {what}={n}; compiling takes milliseconds."
            )
    if head_dim != k_head_dim:
        return f"q has head_dim {head_dim} and k has {k_head_dim}; they must be the same."
    if 0 in (n_heads, head_dim, v_heads, v_head_dim):
        name, x = ("q", q) if 0 in (n_heads, head_dim) else ("v", v)
        return f"{name} is {tuple(x.shape)}; it must have heads, and a head_dim, of 1 or more."
    if v_heads != n_kv_heads:
        return f"k has {n_kv_heads} heads and v has {v_heads}; they must have the same."
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        return (
            f"q has {n_heads} heads, which is not a multiple of the {n_kv_heads} heads of k and v."
        )
    if compiled.n_heads is not None and n_heads != compiled.n_heads:
        return (
            f"The mask has {compiled.n_heads} heads but q has {n_heads} query heads. Give one mask "
            f"per *query* head (not per kv head: n_kv_heads = {n_kv_heads})."
        )
    if compiled.batch is not None and batch != compiled.batch:
        return f"q has {batch} batch rows but this mask was compiled for batch={compiled.batch}."
    for table in compiled.tables:
        # a graph being compiled knows no versions of tensors
        if not is_compiling() and table.changed:
            return (
                f"The table {table!r} of the mask was written to after it was compiled. Make and "
                "compile the mask again from the new values."
            )
    return None
