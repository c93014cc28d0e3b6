"""Any FlexAttention mask_mod -> Mask.

trace.py is the door; tracer.py runs the function once on stand-ins (stand_in.py) and translates
each aten operator: aten.py and moves.py hold the rules, scalars.py the arithmetic of one element,
arrays.py tensors of expressions. What has no rule becomes an opaque leaf (opaque.py).
"""

from flexsparse.tracing.trace import from_mask_mod

__all__ = ["from_mask_mod"]
