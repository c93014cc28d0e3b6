"""Patterns of images and video: tokens on a grid of one, two or three axes.

Axes are named slowest first, (height, width) or (time, height, width), and tokens are in row-major
order: the last axis runs fastest. A pattern that takes `tile` can also read them tile by tile, and
any other order is a table: mask.at(q_idx=lookup(place, q_idx), kv_idx=lookup(place, kv_idx)).

A grid says nothing about tokens past its last one. Compile for prod(shape) tokens, or say yourself
what the others see: neighborhood(shape, 13) | (q_idx >= n) | (kv_idx >= n) for text after n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from flexsparse import Index, Mask, MaskError, kv_idx, maximum, minimum, pattern, q_idx
from flexsparse.masks.arguments import at_least, is_int, sizes

Axes = int | Sequence[int]


@pattern
def neighborhood(
    shape: Axes,
    kernel_size: Axes,
    stride: Axes = 1,
    dilation: Axes = 1,
    is_causal: bool | Sequence[bool] = False,
    tile: Axes | None = None,
) -> Mask:
    """Each token sees the `kernel_size` tokens nearest to it along each axis, itself included.

    At a border the window is shifted, not cut, so every token sees equally many; a causal axis
    looks back only, and there it is cut. An even size leans to the left.

    neighborhood(6, 3), 6 x 6:
        ###...
        ###...
        .###..
        ..###.
        ...###
        ...###

    Args:
        shape: tokens along each axis: 6, (height, width) or (time, height, width).
        kernel_size: tokens seen along each axis; kernel_size * dilation <= shape.
        stride: neighbours that share one window, 1 to kernel_size; kernel_size gives blocks (Swin).
        dilation: tokens from one key to the next.
        is_causal: whether an axis looks back only. These four take one value or one for each axis.
        tile: None for row-major tokens, or the shape of a tile where they are stored tile by tile.

    Source: NATTEN's na1d, na2d and na3d (arXiv 2204.07143, 2504.16922).
    """
    axes = sizes("neighborhood", "shape", shape)
    kernel, strides, dilations = (
        sizes("neighborhood", argument, value, len(axes))
        for argument, value in (
            ("kernel_size", kernel_size),
            ("stride", stride),
            ("dilation", dilation),
        )
    )
    causal_axes = tuple(is_causal) if isinstance(is_causal, Sequence) else (is_causal,) * len(axes)
    if len(causal_axes) != len(axes) or not all(isinstance(c, bool) for c in causal_axes):
        raise MaskError(
            f"neighborhood(is_causal={is_causal!r}): is_causal must be a bool, or one for each of "
            f"{len(axes)} axes."
        )
    for n, size, step, gap in zip(axes, kernel, strides, dilations, strict=True):
        if step > size:
            raise MaskError(
                f"neighborhood(stride={stride!r}): a stride of {step} leaves out tokens between "
                f"windows of {size}; use a stride of at most kernel_size."
            )
        if size * gap > n:
            raise MaskError(
                f"neighborhood(kernel_size={kernel_size!r}, dilation={dilation!r}): {size} tokens "
                f"{gap} apart do not fit in an axis of {n}; kernel_size * dilation may be at most "
                "that."
            )
    q_places, kv_places = _places("neighborhood", q_idx, kv_idx, axes, tile)
    kept = [
        _near(*axis)
        for axis in zip(
            q_places, kv_places, axes, kernel, strides, dilations, causal_axes, strict=True
        )
    ]
    return _all(kept)


def _near(
    q: Index, kv: Index, n: Index | int, size: int, stride: int, dilation: int, is_causal: bool
) -> Mask:
    """NATTEN's rule along one axis of n tokens."""
    if dilation > 1:
        # tokens that are a multiple of `dilation` apart form an axis of their own
        group = (q % dilation).equals(kv % dilation)
        members = (n - 1 - q % dilation) // dilation + 1
        return group & _near(q // dilation, kv // dilation, members, size, stride, 1, is_causal)
    if is_causal:
        leader = q if stride == 1 else minimum(q // stride * stride + (stride - 1), n - 1)
        return (kv <= q) & (leader - kv < size)
    leader = q if stride == 1 else minimum(q // stride * stride + stride // 2, n - 1)
    return _shifted_window(leader, kv, n, size)


def _shifted_window(center: Index, kv: Index, n: Index | int, size: int) -> Mask:
    """`size` keys round a centre, moved back inside where they would stick out of 0 to n."""
    if n == size:
        return kv < n
    first = maximum(minimum(center - size // 2, n - size), 0)
    return (first <= kv) & (kv < first + size)


@pattern
def sliding_tile(canvas: Axes, kernel: Axes, tile: Axes, text_len: int = 0) -> Mask:
    """Each tile of a video sees the tiles in a window round its own: no block is half kept.

    Tokens are stored tile by tile, and text follows them: text sees all and is seen by all. The
    window counts keys, and at a border it is shifted, not cut.

    sliding_tile((2, 6), (2, 2), (1, 2), 1), 13 x 13:                                ##....##....#
                                                                                     ##....##....#
    Args:                                                                            ..##....##..#
        canvas: tokens along each axis: (height, width) or (time, height, width).    ..##....##..#
        kernel: tokens of the window along each axis, a multiple of `tile`.          ....##....###
        tile: tokens of a tile along each axis; it divides the canvas.               ....##....###
        text_len: text tokens after the video.                                       ##....##....#
                                                                                     ##....##....#
    Source: Sliding Tile Attention (arXiv 2502.04507).                               ..##....##..#
                                                                                     ..##....##..#
                                                                                     ....##....###
                                                                                     ....##....###
                                                                                     #############
    """
    axes = sizes("sliding_tile", "canvas", canvas)
    kernels = sizes("sliding_tile", "kernel", kernel, len(axes))
    tiles = sizes("sliding_tile", "tile", tile, len(axes))
    at_least("sliding_tile", 0, text_len=text_len)
    for argument, lengths in (("canvas", axes), ("kernel", kernels)):
        if any(n % t for n, t in zip(lengths, tiles, strict=True)):
            raise MaskError(
                f"sliding_tile({argument}={lengths}, tile={tiles}): each axis of {argument} must "
                "be a multiple of the tile's. Pad the video, or choose another tile."
            )
    if any(k > n for k, n in zip(kernels, axes, strict=True)):
        raise MaskError(
            f"sliding_tile(canvas={axes}, kernel={kernels}): the kernel does not fit the canvas; "
            "use at most the canvas along each axis."
        )
    video, in_tile = prod(axes), prod(tiles)
    n_tiles = [n // t for n, t in zip(axes, tiles, strict=True)]
    window_tiles = [k // t for k, t in zip(kernels, tiles, strict=True)]
    q_tile, kv_tile = _row_major(q_idx // in_tile, n_tiles), _row_major(kv_idx // in_tile, n_tiles)
    near = _all(
        [
            _shifted_window(*axis)
            for axis in zip(q_tile, kv_tile, n_tiles, window_tiles, strict=True)
        ]
    )
    if not text_len:
        return near
    is_video = (q_idx < video) & (kv_idx < video)
    return (is_video & near) | (~is_video & (kv_idx < video + text_len))


@pattern
def axial(shape: Axes, axis: int) -> Mask:
    """Tokens see each other along one axis: those that agree in all the other coordinates.

    axial(shape, 0) | axial(shape, 1) is the criss-cross of an image; axis 0 of a video is attention
    through time.

    axial((2, 3), 0), 6 x 6:                                                        #..#..
                                                                                    .#..#.
    Args:                                                                           ..#..#
        shape: tokens along each axis: (height, width) or (time, height, width).    #..#..
        axis: the axis to look along, counted from 0.                               .#..#.
                                                                                    ..#..#
    Source: Axial Attention (arXiv 1912.12180).
    """
    axes = sizes("axial", "shape", shape)
    if not is_int(axis) or not 0 <= axis < len(axes):
        raise MaskError(f"axial(axis={axis!r}): axis must be an int of 0 to {len(axes) - 1}.")
    before, after = prod(axes[axis:]), prod(axes[axis + 1 :])
    kept = []
    if axis > 0:
        kept.append((q_idx // before).equals(kv_idx // before))
    if after > 1 or axis == 0:
        kept.append((q_idx % after).equals(kv_idx % after))
    return _all(kept)


def _all(masks: Sequence[Mask]) -> Mask:
    kept = masks[0]
    for mask in masks[1:]:
        kept = kept & mask
    return kept


def _row_major(index: Index, shape: Sequence[int]) -> list[Index]:
    """The coordinates of a token; those past the end of the grid are past its first axis."""
    places = []
    for axis, n in enumerate(shape):
        after = prod(shape[axis + 1 :])
        place = index // after if after > 1 else index
        places.append(place % n if axis else place)
    return places


def _places(
    name: str, q: Index, kv: Index, shape: tuple[int, ...], tile: Axes | None
) -> tuple[list[Index], list[Index]]:
    """The coordinates of a query and of a key, row-major or tile by tile."""
    if tile is None:
        return _row_major(q, shape), _row_major(kv, shape)
    tiles = sizes(name, "tile", tile, len(shape))
    if any(n % t for n, t in zip(shape, tiles, strict=True)):
        raise MaskError(
            f"{name}(shape={shape}, tile={tiles}): each axis must be a multiple of the tile's. "
            "Pad the grid, or choose another tile."
        )
    n_tiles = [n // t for n, t in zip(shape, tiles, strict=True)]

    def places(index: Index) -> list[Index]:
        outer = _row_major(index // prod(tiles), n_tiles)
        inner = _row_major(index % prod(tiles), tiles)
        return [o * t + i for o, t, i in zip(outer, tiles, inner, strict=True)]

    return places(q), places(kv)
