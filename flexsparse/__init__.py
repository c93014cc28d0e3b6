"""flexsparse: a mask compiler for FlexAttention.

An attention pattern is an expression of q_idx and kv_idx; each head has its own; compile_mask proves
which blocks it keeps and runs it.
"""

from flexsparse.compiler import CompiledMask, compile_mask
from flexsparse.errors import ExecutorError, MaskError
from flexsparse.expr import (
    Index,
    Mask,
    b,
    everything,
    h,
    kv_idx,
    lookup,
    maximum,
    minimum,
    nothing,
    pattern,
    q_idx,
)
from flexsparse.heads import PerHead, per_head
from flexsparse.text import parse

__version__ = "0.1.0"

__all__ = [
    "CompiledMask",
    "ExecutorError",
    "Index",
    "Mask",
    "MaskError",
    "PerHead",
    "b",
    "compile_mask",
    "everything",
    "h",
    "kv_idx",
    "lookup",
    "maximum",
    "minimum",
    "nothing",
    "parse",
    "pattern",
    "per_head",
    "q_idx",
]
