"""Mask -> mask_mod whose numbers are data: masks of one structure run through one compiled kernel.

A mask becomes a flat Python function. Its constants are entries of a small tensor on the device and
its tables are captured tensors, so that torch.compile sees the same code for every window size.
Of (kv_idx <= q_idx) & (q_idx - kv_idx < 256), n0 being q_offset and n1 256:

    def bind(torch, n0, n1):
        def mask_mod(b, h, q_idx, kv_idx):
            v0 = q_idx + n0
            v1 = kv_idx <= v0
            v2 = v0 - kv_idx
            v3 = v2 < n1
            v4 = v1 & v3
            return v4
        return mask_mod
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexsparse.arguments import INT32_MAX
from flexsparse.expr import Index, Mask
from flexsparse.tensors import CASTS, MaskMod, Opaque, Table
from flexsparse.text import shown
from flexsparse.tree import VARIABLES
from flexsparse.walks import postorder


class Lowering(NamedTuple):
    """A mask as Python code and its data, without the position of query row 0.

    bind: makes the mask_mod of torch, numbers and tables
    numbers: of the mask, each an integer tensor
    tables: the tensors and functions that it reads
    """

    bind: Callable[..., MaskMod]
    numbers: tuple[Tensor, ...]
    tables: tuple[Any, ...]
    device: torch.device

    def at(self, q_offset: int) -> MaskMod:
        """The mask_mod whose query row 0 stands at position q_offset, in tokens."""
        return self.bind(torch, *_numbers([q_offset], self.device), *self.numbers, *self.tables)


def lower(mask: Mask, device: torch.device, q_offset: int = 0, *, wide: bool = False) -> MaskMod:
    """The mask as a mask_mod of row numbers: query row r stands at position r + q_offset.

    The arguments are those of `lowering`.
    """
    return lowering(mask, device, None, wide).at(q_offset)


def lowering(mask: Mask, device: torch.device, heads: Sequence[int] | None, wide: bool) -> Lowering:
    """The mask as code and data.

    Args:
        mask: what to lower.
        device: where the kernel runs; the mask's tables must be there already.
        heads: the head that each head index of the launch stands for; None where they are the same.
        wide: compute in int64 because some index leaves int32 (kernels count in int32).
    """
    numbers: list[int] = []
    tables: list[Any] = []
    lines: list[str] = []

    def number(value: int) -> str:
        numbers.append(value)
        return f"n{len(numbers)}"  # n0 is q_offset

    def table(tensor: Any) -> str:
        tables.append(tensor)
        return f"t{len(tables) - 1}"

    # by node, not by value: window(64) & sink(64) must become the code of window(64) & sink(8)
    names: dict[int, str] = {}
    for node in postorder(mask):
        args = [names[id(a)] if id(a) in names else number(a.payload) for a in node.args]
        if node.op == "q_idx":
            # widened first: with q_offset beyond int32 the sum would wrap round
            text = "q_idx + n0" if not wide else "q_idx.to(torch.int64) + n0"
        elif node.op == "kv_idx" and wide:
            text = "kv_idx.to(torch.int64)"
        elif node.op == "h" and heads is not None:
            text = f"{table(padded(torch.tensor(list(heads), device=device)))}[h]"
        elif node.op in ("b", "h") and wide:
            text = f"{node.op}.to(torch.int64)"
        elif node.op in VARIABLES:
            names[id(node)] = node.op
            continue
        elif node.op == "const" and isinstance(node, Mask):
            text = f"kv_idx {'>=' if node.payload else '<'} 0"
        elif node.op == "const":
            continue  # written where it is used
        elif isinstance(node.payload, Table):
            text = _read(node.payload.tensor, args, table, number)
            if isinstance(node, Index) and wide:
                text += ".to(torch.int64)"
            elif isinstance(node, Index) and node.payload.tensor.element_size() < 4:
                text += ".to(torch.int32)"  # arithmetic on narrow integers would wrap round
        elif node.op == "number":
            value, dtype = node.payload
            text = table(torch.tensor(value, dtype=dtype, device=device))
        elif node.op in CASTS:
            text = f"{args[0]}.to({node.payload})"
        elif isinstance(node.payload, Opaque):
            text = f"{table(node.payload.call)}({', '.join(args)})"
        else:
            text = TEXT_READING.get(node.op, f"{{}} {node.op} {{}}").format(*args)
        if isinstance(node, Index) and (node.op in CASTS or isinstance(node.payload, Opaque)):
            text += f".to(torch.int{64 if wide else 32})"  # arithmetic on it would wrap round
        names[id(node)] = f"v{len(lines)}"
        lines.append(f"v{len(lines)} = {text}")
    bind = _bind(_function(lines, names[id(mask)], 1 + len(numbers), len(tables)))
    return Lowering(bind, _numbers(numbers, device), tuple(tables), device)


def _numbers(numbers: list[int], device: torch.device) -> tuple[Tensor, ...]:
    """Numbers as tensors without dimensions, int32 if they all fit."""
    fits = max(map(abs, numbers), default=0) <= INT32_MAX
    dtype = torch.int32 if fits else torch.int64
    return torch.tensor(numbers, dtype=dtype, device=device).unbind()


class LoweredMask:
    """A lowered mask as an object, which prints, compares by identity and can be pickled.

    It is the mask_mod of a public BlockMask: a function made from source cannot be pickled.
    """

    def __init__(self, mask: Mask, device: torch.device, q_offset: int, wide: bool) -> None:
        self._arguments = (mask, device, q_offset, wide)
        self._mask_mod = lower(mask, device, q_offset, wide=wide)

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The mask at row numbers."""
        return self._mask_mod(b, h, q_idx, kv_idx)

    def to(self, device: torch.device | str) -> LoweredMask:
        """The same mask_mod on a device."""
        mask, _, q_offset, wide = self._arguments
        device = torch.empty(0, device=device).device
        return LoweredMask(mask.to(device), device, q_offset, wide)

    def __reduce__(self) -> tuple[Any, ...]:
        return LoweredMask, self._arguments

    def __repr__(self) -> str:
        mask, device, q_offset, _ = self._arguments
        return f"mask_mod of {shown(mask)}, query row 0 at position {q_offset}, on {device}"


TEXT_READING = {
    "~": "~{}",
    "abs": "abs({})",
    "minimum": "torch.minimum({}, {})",
    "maximum": "torch.maximum({}, {})",
    "where": "torch.where({}, {}, {})",
    "bit_and": "({} & {})",
    "bit_or": "({} | {})",
    "bit_xor": "({} ^ {})",
    "sqrt": "torch.sqrt({})",
    "floor": "torch.floor({})",
    "ceil": "torch.ceil({})",
}


def _read(
    tensor: Tensor, args: list[str], table: Callable[[Tensor], str], number: Callable[[int], str]
) -> str:
    """Read a table through one flat index, so that its shape is data too."""
    if tensor.numel() > INT32_MAX:
        return f"{table(tensor)}[{', '.join(args)}]"  # a flat index would leave int32
    if not args:
        return table(tensor.clone())  # as those that are padded, it stays when it is written to
    index = args[0]
    for size, arg in zip(tensor.shape[1:], args[1:], strict=True):
        index = f"({index}) * {number(size)} + {arg}"
    return f"{table(padded(tensor.reshape(-1)))}[{index}]"


def padded(tensor: Tensor) -> Tensor:
    """The table with its length rounded up to a power of 2.

    Inductor's C++ takes tables of fixed lengths alone (torch 2.13); rounded, these are few.
    """
    length = max(16, 1 << (len(tensor) - 1).bit_length())
    return torch.nn.functional.pad(tensor, (0, length - len(tensor)))


def _function(lines: list[str], result: str, n_numbers: int, n_tables: int) -> str:
    captured = [f"n{i}" for i in range(n_numbers)] + [f"t{i}" for i in range(n_tables)]
    body = "\n".join(f"        {line}" for line in lines)
    return (
        f"def bind(torch, {', '.join(captured)}):\n"
        f"    def mask_mod(b, h, q_idx, kv_idx):\n{body}\n        return {result}\n"
        f"    return mask_mod\n"
    )


@functools.cache
def _bind(source: str) -> Callable[..., Any]:
    """One code object for each structure, which is what torch.compile's caches go by."""
    filename = f"<flexsparse mask {hash(source):x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    namespace: dict[str, Any] = {}
    # the source is made above from operators and numbered names only; no text of a user's is in it
    exec(compile(source, filename, "exec"), namespace)
    bind: Callable[..., Any] = namespace["bind"]
    return bind
