"""A launch: heads that run together, their mask and its blocks, and what can run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import BlockClasses
from flexsparse.analysis.hints import kernel_options
from flexsparse.analysis.needed import needed
from flexsparse.analysis.validate import needs_int64
from flexsparse.blocks import CompactBlockMask, block_mask, write_kept_blocks
from flexsparse.cost import Cost, cost
from flexsparse.default_device import cpu_by_default
from flexsparse.dropout import Dropout
from flexsparse.errors import ExecutorError
from flexsparse.executors import blockwise, flash, flex, gather, sdpa, streaming
from flexsparse.expr import Mask
from flexsparse.lower import Lowering, lowering
from flexsparse.packed.packing import PackedTokens
from flexsparse.tabulated import tabulated
from flexsparse.tensors import MaskMod, Opaque, ScoreMod
from flexsparse.walks import written_out

# measured: a kernel takes a minute to compile at about as many, and Inductor recurses
MOST_WRITTEN_OUT, DEEPEST = 2_048, 512  # operators of a mask
LARGE_GRID = 1 << 22  # blocks; lists of 16 MB
MODES = torch._C._TorchDispatchModeKey
EXECUTORS = ("sdpa", "flash", "streaming", "gather", "flex", "blockwise", "reference")


def refuse_unknown(executor: str | None) -> None:
    """Raise ExecutorError unless it names an executor, or is None."""
    if executor is not None and executor not in EXECUTORS:
        raise ExecutorError(f"There is no executor {executor!r}; there are {', '.join(EXECUTORS)}.")


class Lists(NamedTuple):
    """What kernels read of a launch.

    block_mask: the lists of its blocks
    lowering: the code of the block_mask's mask_mod, at any position
    hints: what is proved of the lists, for torch's Triton kernels
    """

    block_mask: CompactBlockMask
    lowering: Lowering
    hints: dict[str, bool]


@dataclass(frozen=True, eq=False)
class Launch:
    """What one executor runs.

    heads: the query heads it computes
    mask: their mask; it reads h where the heads differ
    grid: where the mask is looked at; one plane where the heads share their blocks
    device: where it runs
    find_classes: gives the class of every block of the grid
    streams: (sink, window) of each head, or of all, where the mask is `causal & (sink | window)`
    band: the mask as FlashAttention knows it, if it does
    tokens: the packed sequences that the grid holds, each of which `streams` is in; None if it is
        one sequence
    """

    heads: tuple[int, ...]
    mask: Mask
    grid: Grid
    device: torch.device
    find_classes: Callable[[], BlockClasses]
    streams: tuple[tuple[int, int], ...] | None = None
    band: flash.Band | None = None
    tokens: PackedTokens | None = None
    # of some of the heads; of () where all heads share their blocks
    _lists: dict[tuple[int, ...], Lists] = field(default_factory=dict, init=False)
    _numbers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    @functools.cached_property
    @cpu_by_default()
    def classes(self) -> BlockClasses:
        """The class of every block."""
        return self.find_classes()

    @property
    def has_planes(self) -> bool:
        """Whether each head has blocks of its own."""
        return len(self.grid.heads) > 1

    @property
    def usual_executor(self) -> str:
        """What runs a forward pass in half precision, without a score_mod and without the LSE."""
        if self._never["sdpa"] is None:
            return "sdpa"
        if self.device.type == "cuda":
            if self.band is not None and flash.missing() is None:
                return "flash"
            if self.streams is not None and streaming.missing() is None:
                return "streaming"
        if self._not_gathered() is None:
            return "gather"
        return "blockwise" if self._never["flex"] or flex.missing(self.device) else "flex"

    def cost(self, head_dim: int, element_size: int) -> Cost:
        """What a forward pass of one batch row costs; element_size is in bytes."""
        return cost(self.classes, len(self.heads), head_dim, element_size)

    def executors(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        score_mod: ScoreMod | None = None,
        dropout: Dropout | None = None,
        return_lse: bool = False,
    ) -> Iterator[tuple[str, str | None]]:
        """Each executor, the preferred one first, with why it cannot run these inputs, or None."""
        never, transformed = self._never, _transformed(q, k, v)
        no_streams = never["streaming"]
        if score_mod is not None or dropout is not None:
            no_streams = no_streams or "the streaming kernels take neither score_mod nor dropout"
        asked: dict[str, Any] = {
            "score_mod": score_mod,
            "dropout": dropout,
            "return_lse": return_lse,
        }
        yield "sdpa", never["sdpa"] or sdpa.unsupported_extras(**asked)
        yield "flash", never["flash"] or transformed or flash.unsupported(q, k, v, **asked)
        # of sinks and windows only the kind of tensor is looked at: those of any heads will do
        yield (
            "streaming",
            no_streams
            or transformed
            or streaming.unsupported(
                q, k, v, *self.sinks_and_windows(range(q.shape[1])), self.positions
            ),
        )
        yield "gather", self._not_gathered(**asked)
        yield "flex", transformed or never["flex"] or flex.unsupported(q, k, v, **asked)
        yield "blockwise", transformed or blockwise.unsupported(q, k, v, self.grid.block_size)
        yield "reference", None

    @functools.cached_property
    def _never(self) -> dict[str, str | None]:
        """Why executors cannot run this mask, whatever the inputs, or None; asked once."""
        return {
            "sdpa": sdpa.unsupported(self.mask, self.grid),
            "flash": None if self.band else "the mask is not one band that ends at the last key",
            "streaming": None if self.streams else "the mask is not causal & (sink(s) | window(w))",
            "gather": gather.unsupported(self.grid, self.device),
            "flex": self._not_elementwise(),
        }

    def _not_gathered(self, **asked: Any) -> str | None:
        """Why keys cannot be gathered, or None if they can."""
        return (
            self._never["gather"]
            or gather.unsupported_extras(**asked)
            or gather.too_many(self.keys_seen)
        )

    def _not_elementwise(self) -> str | None:
        """Why kernels cannot compile the mask, or None if they can."""
        size, depth = written_out(self.mask)
        if size > MOST_WRITTEN_OUT or depth > DEEPEST:
            return (
                "kernels compute a term anew wherever it is used, and of a mask of more than "
                f"{MOST_WRITTEN_OUT:,} operators, or {DEEPEST} in a row, none is compiled in "
                "minutes; read a table (fs.lookup) in place of many terms"
            )
        for operator in (x.payload for x in self.mask.steps if isinstance(x.payload, Opaque)):
            if not operator.is_elementwise:
                return f"kernels compute one element at a time, and {operator.name} does not"
            if operator.dtype in (torch.float16, torch.bfloat16):
                return (
                    f"kernels compute {operator.name} in float32, and the mask in "
                    f"{operator.dtype}; cast what it takes with .float()"
                )
        return None

    def prepare(self) -> None:
        """Write the lists that the usual executor reads."""
        if self.usual_executor in ("gather", "flex", "blockwise"):
            self.block_mask(self.heads)

    def row(self, row: int, block_size: tuple[int, int]) -> Launch:
        """The launch of one query, of a launch whose blocks are one query high.

        Its lists are taken from those of this launch; block_size is what they are said to be of.
        """
        grid = self.grid
        its_grid = grid._replace(q_len=1, q_offset=grid.q_offset + row, block_size=block_size)
        launch = replace(
            self,
            grid=its_grid,
            find_classes=lambda: self.classes.of_row(row, its_grid),
            band=flash.band(self.mask, its_grid, None),
            # one query is no sequence of its pack
            streams=self.streams if self.tokens is None else None,
            tokens=None,
        )
        launch._numbers.update(self._numbers)
        for heads, lists in self._lists.items():
            mask_mod = lists.lowering.at(its_grid.q_offset)
            of_row = lists.block_mask.row(row, its_grid, mask_mod)
            launch._lists[heads] = lists._replace(block_mask=of_row)
        launch.prepare()
        return launch

    def is_prepared(self, heads: Sequence[int]) -> bool:
        """Whether the lists of these heads are written."""
        return not self.has_planes or tuple(heads) in self._lists

    def block_mask(self, heads: Sequence[int]) -> BlockMask:
        """The blocks of some of its heads."""
        return self.lists(heads).block_mask

    def lists(self, heads: Sequence[int]) -> Lists:
        """The lists of some of its heads in the layout the device's kernels read, written once."""
        key = tuple(heads) if self.has_planes else ()
        if key not in self._lists:
            self._lists[key] = self._write_lists(key)
        return self._lists[key]

    def mask_mod(self, heads: Sequence[int]) -> MaskMod:
        """The whole mask, exact for every element, of some of its heads counted from 0."""
        lowered = self._lowering(self.mask, tuple(heads) if self.has_planes else self.grid.heads)
        return lowered.at(self.grid.q_offset)

    def sinks_and_windows(self, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`streams` of some heads as int32 tensors [heads], sinks and windows."""
        assert self.streams is not None
        key = tuple(heads)
        if key not in self._numbers:
            # one pair is that of all heads, and so the default
            of_head = dict(zip(self.heads, self.streams, strict=len(self.streams) > 1))
            numbers = [of_head.get(head, self.streams[0]) for head in key]
            pairs = torch.tensor(numbers, dtype=torch.int32, device=self.device)
            self._numbers[key] = (pairs[:, 0].contiguous(), pairs[:, 1].contiguous())
        return self._numbers[key]

    @property
    def positions(self) -> streaming.Positions:
        """Where sequences begin and queries stand, as the streaming kernels take it."""
        if self.tokens is not None:
            return self.tokens.positions
        return streaming.Positions(q_offset=self.grid.q_offset)

    @functools.cached_property
    @cpu_by_default()
    def keys_seen(self) -> gather.Keys:
        """The keys that the one query sees, of a launch of one query and one plane."""
        return gather.keys_seen(self.mask, self.grid, self.block_mask(self.heads))

    @cpu_by_default()
    def _write_lists(self, heads: tuple[int, ...]) -> Lists:
        classes = self.classes
        if heads and heads != classes.grid.heads:
            classes = classes.of_heads(heads)
        grid = classes.grid
        mask = needed(self.mask, classes)
        on_cpu = self.device.type == "cpu"
        lowered = self._lowering(tabulated(mask, grid) if on_cpu else mask, grid.heads)
        # On CPU torch wants lists as wide as the grid, and has no backward that would read q lists.
        # Overlapping views are that wide and take no memory, but each width costs a kernel: they
        # are for grids whose lists would be large.
        compact = not on_cpu or grid.planes * grid.rows * grid.columns > LARGE_GRID
        kept = write_kept_blocks(classes, self.device, compact=compact, q_lists=not on_cpu)
        lists = block_mask(grid, kept, lowered.at(grid.q_offset), widen=on_cpu)
        # hints are read off the lists, and on meta there are no numbers to read
        has_hints = not on_cpu and self.device.type != "meta"
        hints = kernel_options(self.mask, classes, kept) if has_hints else {}
        return Lists(lists, lowered, hints)

    def _lowering(self, mask: Mask, heads: tuple[int, ...]) -> Lowering:
        # a kernel counts its heads from 0
        renumbered = None if heads == tuple(range(len(heads))) else heads
        wide = needs_int64(mask, self.grid._replace(heads=heads))
        return lowering(mask, self.device, renumbered, wide)


def _transformed(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why kernels would lose what torch makes of an input or a call, as a sentence, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's operators alone; torch.export takes kernels"
    if torch._C._len_torch_dispatch_stack():
        for mode, its_name in ((MODES.FAKE, "FakeTensorMode"), (MODES.PROXY, "make_fx")):
            if torch._C._get_dispatch_mode(mode) is not None:
                return f"{its_name} is on, which hides the numbers in lists of blocks"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if has_own_operators(x):
            return (
                f"{name} is a {type(x).__name__}, and kernels take plain tensors, such as "
                "to_local() gives of a DTensor"
            )
    carries = "an input carries a tangent, and only dense attention passes it on"
    # of torch.func, what is at work; each wraps tensors at a level of its own
    for function in functorch.get_interpreter_stack() or ():
        kind, level = function.key(), function.level()
        if kind == functorch.TransformType.Functionalize:
            return "torch.func.functionalize is at work, which takes no functions with gradients"
        if any(level in _levels(x) for x in (q, k, v)):
            if kind == functorch.TransformType.Vmap:
                return (
                    "torch.func.vmap is mapped over it, and a batch is the first dimension of q, "
                    "k and v"
                )
            if kind == functorch.TransformType.Jvp:
                return carries
    # the level is -1 where there are no tangents at all
    if forward_ad._current_level >= 0:
        for x in (q, k, v):
            if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
                return carries
    return None


def has_own_operators(x: Tensor) -> bool:
    """Whether it is of a class, such as DTensor, that says itself what operators do with it."""
    return type(x) is not Tensor and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _levels(x: Tensor) -> Iterator[int]:
    """Where torch.func wrapped a tensor, from the innermost function outwards."""
    while functorch.is_functorch_wrapped_tensor(x):
        yield functorch.maybe_get_level(x)
        x = functorch.get_unwrapped(x)
