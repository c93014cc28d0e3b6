"""Keys of plans that are kept for the values of a tensor, whichever tensor holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from flexsparse import MaskError

ODD = -7046029254386353131  # 2**64 over the golden ratio, as a signed integer


class ByValue:
    """A copy of an integer tensor on a device, equal to every other with the same numbers.

    Its hash is read off all of them, which waits for the device: plans that are kept for other
    numbers are then told apart without a look at theirs.
    """

    def __init__(self, name: str, tensor: Tensor, device: torch.device) -> None:
        if tensor.is_meta:
            raise MaskError(f"{name} is on meta, where tensors have no values; give it on the CPU.")
        # callers write new numbers into the same tensor
        self.tensor = tensor.detach().to(device, copy=True)
        factors = torch.arange(1, tensor.numel() + 1, device=device) * ODD
        total = int((self.tensor.flatten().long() * factors).sum())
        self._hash = hash((tensor.dtype, tensor.shape, device, total))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByValue):
            return NotImplemented
        a, b = self.tensor, other.tensor
        return self._hash == other._hash and a.dtype == b.dtype and torch.equal(a, b)
