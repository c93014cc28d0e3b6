"""flexsparse: a mask compiler for FlexAttention.

An attention pattern is an expression of q_idx and kv_idx; each head has its own; compile_mask
proves which blocks it keeps and runs it.
"""

from flexsparse.compiler import CompiledMask, compile_mask
from flexsparse.drawing import compare, draw, roofline, zoom
from flexsparse.drop_in import create_block_mask
from flexsparse.errors import ExecutorError, MaskError
from flexsparse.expr import (
    Index,
    Mask,
    b,
    bit_and,
    bit_or,
    bit_xor,
    everything,
    h,
    kv_idx,
    lookup,
    maximum,
    minimum,
    nothing,
    q_idx,
    where,
)
from flexsparse.heads import PerHead, per_head
from flexsparse.naming import pattern
from flexsparse.packed.varlen import plan_varlen, varlen
from flexsparse.parser import parse
from flexsparse.questions.checks import Check, check
from flexsparse.questions.difference import Difference, diff
from flexsparse.questions.explanation import Explanation, explain
from flexsparse.tracing import from_mask_mod

# isort: split
from flexsparse import masks  # the last: patterns are written in the names above

__version__ = "0.1.0"

__all__ = [
    "Check",
    "CompiledMask",
    "Difference",
    "ExecutorError",
    "Explanation",
    "Index",
    "Mask",
    "MaskError",
    "PerHead",
    "b",
    "bit_and",
    "bit_or",
    "bit_xor",
    "check",
    "compare",
    "compile_mask",
    "create_block_mask",
    "diff",
    "draw",
    "everything",
    "explain",
    "from_mask_mod",
    "h",
    "kv_idx",
    "lookup",
    "masks",
    "maximum",
    "minimum",
    "nothing",
    "parse",
    "pattern",
    "per_head",
    "plan_varlen",
    "q_idx",
    "roofline",
    "varlen",
    "where",
    "zoom",
]
