"""Whether a call is one of plain tensors, for which torch needs no operator."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = frozenset((Tensor, torch.nn.Parameter))
# what torch dispatches by where nothing but autograd is on
USUAL = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)
UNUSUAL = ~USUAL.raw_repr()


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether anything but autograd is to see an operator of these tensors.

    That is a compiler or tracer, a mode (fake tensors, selective checkpointing, a count of FLOPs),
    torch.func, a batch of gradients, or a kind of tensor that is not its memory.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._dispatch_tls_local_include_set().raw_repr() & UNUSUAL:
        return True
    return any(x is not None and (type(x) not in KINDS or x.is_neg()) for x in tensors)
