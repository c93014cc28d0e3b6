"""roofline: the least time that each launch of a compiled mask takes, from peak rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from flexsparse.analysis.classify import BlockClasses
from flexsparse.compiler import CompiledMask
from flexsparse.default_device import cpu_by_default
from flexsparse.drawing.colours import LIGHT, css
from flexsparse.drawing.devices import Device, device_of
from flexsparse.drawing.page import lengths_text
from flexsparse.drawing.paper import INK, LINE, QUIET, Sheet, wrapped
from flexsparse.drawing.pools import Pools
from flexsparse.drawing.words import scaled
from flexsparse.errors import MaskError
from flexsparse.heads import numbered
from flexsparse.text import shown

ELEMENT_SIZE = 2  # bytes, of a bfloat16
PRODUCTS = 2  # q k' and p v
PLOT, BARS, NUMBERS, ROW = 2.9, 2.4, 2.7, 0.46  # inches
DECADES = 30  # at least so much of the slope is shown


class Work(NamedTuple):
    """What one launch does in a forward pass.

    name: the heads and their mask
    flops: of the matrix products in all computed blocks
    bytes: q, k, v and out, each across the device's memory once; keys that no query sees are not
    """

    name: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """The least time on a device: that of its products or of its bytes, the longer one."""
        return max(self.flops / device.flops, self.bytes / device.memory)

    def bound(self, device: Device) -> str:
        """What takes that time."""
        by_flops = self.flops / device.flops >= self.bytes / device.memory
        return "compute" if by_flops else "memory"


@cpu_by_default()
def roofline(
    attend: CompiledMask,
    device: str | Device = "H200",
    *,
    batch: int = 1,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    head_dim: int = 128,
) -> Any:
    """A picture of the least time of each launch of a forward pass in bfloat16.

    A prediction from the data sheet and from counts of blocks; nothing is measured, and no kernel
    reaches it. Dense attention stands beside it.

    >>> roofline(attend, "H100", n_kv_heads=8)

    Args:
        attend: a compiled mask.
        device: A100, H100, H200, B200, L40S or MI300X, or a Device.
        batch: batch rows.
        n_heads: query heads; needed only if the mask is for any number of heads.
        n_kv_heads: kv heads; n_heads by default.
        head_dim: of q, k and v.

    Returns:
        A matplotlib Figure.

    Raises:
        MaskError: an argument is wrong; the text says what to change.
        ImportError: matplotlib is not installed.
    """
    peak = device_of(device)
    launches = work(attend, batch, n_heads, n_kv_heads, head_dim)
    return _picture(launches, peak, attend)


def work(
    attend: CompiledMask,
    batch: int,
    n_heads: int | None,
    n_kv_heads: int | None,
    head_dim: int,
) -> list[Work]:
    """The work of each launch, and at last that of dense attention of all heads."""
    if not isinstance(attend, CompiledMask):
        raise MaskError(
            f"roofline takes a CompiledMask, not {type(attend).__name__}. Compile the mask first: "
            "compile_mask(mask, q_len, kv_len)."
        )
    heads = attend.n_heads or n_heads or 1
    kv_heads = n_kv_heads or heads
    for name, n in (("batch", batch), ("n_heads", heads), ("head_dim", head_dim)):
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise MaskError(f"roofline: {name}={n!r}; it must be an int of 1 or more.")
    if n_heads not in (None, heads):
        raise MaskError(f"roofline: n_heads={n_heads}, and the mask is for {heads} heads.")
    if not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads:
        raise MaskError(f"roofline: n_kv_heads={n_kv_heads!r} must divide the {heads} query heads.")

    def bytes_of(queries: int, of_heads: int, keys: int, of_kv_heads: int) -> float:
        rows = 2 * queries * of_heads + 2 * keys * of_kv_heads  # q and out; k and v
        return float(batch * rows * head_dim * ELEMENT_SIZE)

    flops_of_pair = 2 * PRODUCTS * head_dim * batch
    found = []
    for launch in attend.launches:
        grid = launch.grid
        own = launch.heads if attend.n_heads else range(heads)
        pairs = _pairs(launch.classes) / grid.planes
        of_kv = len({h * kv_heads // heads for h in own})
        who = numbered("head", launch.heads) if attend.n_heads else "all heads"
        found.append(
            Work(
                f"{who}: {shown(launch.mask)}",
                flops_of_pair * pairs * len(own),
                bytes_of(grid.q_len, len(own), _keys_seen(launch.classes), of_kv),
            )
        )
    pairs = attend.q_len * attend.kv_len
    dense = bytes_of(attend.q_len, heads, attend.kv_len, kv_heads)
    return [*found, Work("all heads: dense attention", flops_of_pair * pairs * heads, dense)]


def _pairs(classes: BlockClasses) -> int:
    """Pairs of a query and a key in computed blocks."""
    grid = classes.grid
    whole = Pools.of(grid, 1)
    parts = (classes.partial, classes.full)
    return sum(int(whole.elements_of(x, grid, whole.blocks_of(x))) for x in parts)


def _keys_seen(classes: BlockClasses) -> int:
    """Keys in the blocks that any query computes."""
    grid = classes.grid
    change = torch.zeros(grid.columns + 1, dtype=torch.int64)
    for part in (classes.partial, classes.full):
        one = torch.ones_like(part.column0)
        change.index_add_(0, part.column0, one).index_add_(0, part.column1, -one)
    seen = (change.cumsum(0)[:-1] > 0).nonzero().flatten()
    return int(((seen + 1) * grid.block_size[1]).clamp(max=grid.kv_len).sum()) - int(
        (seen * grid.block_size[1]).sum()
    )


def _picture(launches: Sequence[Work], device: Device, attend: CompiledMask) -> Any:
    height = max(PLOT, len(launches) * ROW)
    x = 0.9 + PLOT + 0.5
    sheet = Sheet(x + BARS + NUMBERS, 0.75 + height + 0.85)
    title = f"The least time of each launch on {device.name}, from its data sheet; not measured"
    sheet.text(0.2, 0.16, title, size=11, weight="bold")
    colours = [css(LIGHT.full)] * (len(launches) - 1) + [QUIET]
    _roof(sheet.plot(0.9, 0.75, PLOT, PLOT, frameon=False), launches, device, colours)
    _times(sheet, x, 0.75, launches, device, colours)
    grid = attend.launches[0].grid
    total = sum(launch.seconds(device) for launch in launches[:-1])
    lines = [
        f"All launches: {scaled(total, 's')}; dense attention: "
        f"{scaled(launches[-1].seconds(device), 's')}.",
        f"{lengths_text(grid, with_blocks=True)}; forward, bfloat16. Peaks: "
        f"{scaled(device.flops, 'FLOP/s')}, {scaled(device.memory, 'B/s')}.",
    ]
    sheet.text(0.2, 0.75 + height + 0.43, "\n".join(lines), size=7.5, color=QUIET)
    return sheet.figure


def _roof(axes: Any, launches: Sequence[Work], device: Device, colours: Sequence[str]) -> None:
    """FLOP/s that can be reached against FLOPs for each byte, the launches under the roof."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    ridge = device.flops / device.memory
    places = [max(x.flops, 1) / x.bytes for x in launches]
    low, high = min(ridge / DECADES, *places) / 2, max(ridge * 3, *places) * 2
    roof = [low * device.memory, device.flops, device.flops]
    axes.plot([low, ridge, high], roof, color=INK, linewidth=1.2)
    named: list[tuple[float, str]] = []
    for i, (x, colour) in enumerate(zip(places, colours, strict=True)):
        axes.plot(x, min(x * device.memory, device.flops), "o", color=colour, zorder=3)
        near = next((k for k, (other, _) in enumerate(named) if 0.4 < x / other < 2.5), None)
        if near is None:
            named.append((x, _called(i, len(launches))))
        else:
            named[near] = (named[near][0], f"{named[near][1]}, {_called(i, len(launches))}")
    for x, text in named:
        at = (x, min(x * device.memory, device.flops))
        axes.annotate(text, at, (6, -10), textcoords="offset points", size=7)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(roof[0], device.flops * 2))
    axes.grid(True, color=LINE, linewidth=0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: scaled(y, "FLOP/s")))
    axes.set_xlabel("FLOPs for each byte of memory traffic", size=7.5, color=QUIET)


def _times(
    sheet: Sheet,
    x: float,
    y: float,
    launches: Sequence[Work],
    device: Device,
    colours: Sequence[str],
) -> None:
    """A bar of time for each launch, with its numbers."""
    longest = max(work.seconds(device) for work in launches)
    for i, (launch, colour) in enumerate(zip(launches, colours, strict=True)):
        top = y + i * ROW
        name = wrapped(f"{_called(i, len(launches))}  {launch.name}", BARS + NUMBERS, 8, 1)
        sheet.text(x, top, name, size=8)
        seconds = launch.seconds(device)
        sheet.rectangle(x, top + 0.17, BARS * seconds / longest, 0.13, facecolor=colour)
        numbers = (
            f"{scaled(seconds, 's')}, {launch.bound(device)}-bound: "
            f"{scaled(launch.flops, 'FLOP')}, {scaled(launch.bytes, 'B')}"
        )
        at = x + BARS * seconds / longest + 0.06
        sheet.text(at, top + 0.175, numbers, size=7, color=QUIET)


def _called(place: int, count: int) -> str:
    """How a launch is called on the page; the last is dense attention."""
    return "dense" if place == count - 1 else str(place + 1)
