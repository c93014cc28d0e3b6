"""Patterns of video models: frames, bands at the distance of a frame, text beside them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexsparse import Index, Mask, MaskError, kv_idx, pattern, q_idx
from flexsparse.masks.arguments import at_least, booleans, flag, is_int, tensor_of
from flexsparse.masks.positions import causal


@pattern
def attention_tile(tokens_per_frame: int, reference_frames: Sequence[int] = ()) -> Mask:
    """Each frame sees itself and the reference frames, which see and are seen by all.

    attention_tile(2, [1]), 6 x 6:
        ####..
        ####..
        ######
        ######
        ..####
        ..####

    Args:
        tokens_per_frame: tokens of a frame.
        reference_frames: the numbers of the reference frames; none leaves each frame to itself.

    Source: Efficient-vDiT (arXiv 2502.06155); its search picks the number of references per layer.
    """
    at_least("attention_tile", 1, tokens_per_frame=tokens_per_frame)
    q_frame, kv_frame = q_idx // tokens_per_frame, kv_idx // tokens_per_frame
    kept = q_frame.equals(kv_frame)
    for first, last in _runs("attention_tile", "reference_frames", reference_frames):
        kept = kept | _between(kv_frame, first, last) | _between(q_frame, first, last)
    return kept


@pattern
def frame_causal(tokens_per_frame: int) -> Mask:
    """Each frame sees itself whole and every frame before it.

    frame_causal(2), 6 x 6:
        ##....
        ##....
        ####..
        ####..
        ######
        ######

    Args:
        tokens_per_frame: tokens of a frame.

    Source: block-causal attention of autoregressive video models, as CausVid (arXiv 2412.07772).
    """
    at_least("frame_causal", 1, tokens_per_frame=tokens_per_frame)
    return kv_idx // tokens_per_frame <= q_idx // tokens_per_frame


@pattern
def spatial_head(
    prompt_length: int = 226,
    token_per_frame: int = 1350,
    width: int = 2,
    attn_sink: bool = False,
    round_width: int = 128,
) -> Mask:
    """Tokens see a band about `width` frames to each side; the text before the video is dense.

    The band is abs(q_idx - kv_idx) < width * token_per_frame, rounded down to round_width.

    spatial_head(1, 2, 1, round_width=2), 7 x 7:                   #######
                                                                   ###....
    Args:                                                          ####...
        prompt_length: text tokens, in front of the video.         #.###..
        token_per_frame: tokens of a frame.                        #..###.
        width: frames to each side, its own included.              #...###
        attn_sink: whether all tokens also see the first frame.    #....##
        round_width: tokens the band is rounded down to.

    Source: Sparse VideoGen (arXiv 2502.01776), its spatial head.
    """
    at_least("spatial_head", 0, prompt_length=prompt_length)
    at_least(
        "spatial_head", 1, token_per_frame=token_per_frame, width=width, round_width=round_width
    )
    booleans("spatial_head", attn_sink=attn_sink)
    band = width * token_per_frame // round_width * round_width
    if band < 1:
        raise MaskError(
            f"spatial_head(width={width}, token_per_frame={token_per_frame}, "
            f"round_width={round_width}): the band rounds down to 0 tokens. Use a round_width of "
            f"at most {width * token_per_frame}."
        )
    first_columns = prompt_length + (token_per_frame if attn_sink else 0)
    return (abs(q_idx - kv_idx) < band) | (kv_idx < first_columns) | (q_idx < prompt_length)


@pattern
def temporal_head(
    prompt_length: int = 226, num_frames: int = 13, token_per_frame: int = 1350, width: int = 2
) -> Mask:
    """Tokens see those at nearly the same place in every frame; the text before them is dense.

    Nearly is a difference of places of less than width * token_per_frame // num_frames.

    temporal_head(1, 3, 3, 1), 10 x 10:                               ##########
                                                                      ##..#..#..
    Args:                                                             #.#..#..#.
        prompt_length: text tokens, in front of the video.            #..#..#..#
        num_frames: frames of the video.                              ##..#..#..
        token_per_frame: tokens of a frame.                           #.#..#..#.
        width: frames that as many tokens would fill.                 #..#..#..#
                                                                      ##..#..#..
    Source: Sparse VideoGen (arXiv 2502.01776), its temporal head.    #.#..#..#.
                                                                      #..#..#..#
    """
    at_least("temporal_head", 0, prompt_length=prompt_length)
    at_least(
        "temporal_head", 1, num_frames=num_frames, token_per_frame=token_per_frame, width=width
    )
    band = width * token_per_frame // num_frames
    if band < 1:
        raise MaskError(
            f"temporal_head(width={width}, token_per_frame={token_per_frame}, "
            f"num_frames={num_frames}): the band is 0 tokens wide. Use a width of at least "
            "num_frames / token_per_frame."
        )
    q_place, kv_place = ((x - prompt_length) % token_per_frame for x in (q_idx, kv_idx))
    near = abs(q_place - kv_place) < band
    # follows from `near`, and shows at once which blocks are far from it
    aligned = (q_idx - kv_idx + (band - 1)) % token_per_frame <= 2 * (band - 1)
    return (near & aligned) | (kv_idx < prompt_length) | (q_idx < prompt_length)


@pattern
def diagonal(width: int) -> Mask:
    """Tokens see `width` positions to each side of their own: abs(q_idx - kv_idx) <= width.

    diagonal(1), 5 x 5:                                                        ##...
                                                                               ###..
    Args:                                                                      .###.
        width: tokens to each side, 0 or more; 2 * width + 1 keys are seen.    ..###
                                                                               ...##
    Source: Sparse-vDiT (arXiv 2506.03065), its diagonal heads.
    """
    at_least("diagonal", 0, width=width)
    return abs(q_idx - kv_idx) <= width


@pattern
def multi_diagonal(period: int, width: int) -> Mask:
    """Tokens see bands `period` apart: q_idx - kv_idx is within `width` of a multiple of `period`.

    multi_diagonal(4, 1), 8 x 8:                                                ##.###.#
                                                                                ###.###.
    Args:                                                                       .###.###
        period: from one band to the next, in tokens: the tokens of a frame.    #.###.##
        width: tokens to each side of the middle of a band, 0 or more.          ##.###.#
                                                                                ###.###.
    Source: Sparse-vDiT (arXiv 2506.03065), its multi-diagonal heads.           .###.###
                                                                                #.###.##
    """
    at_least("multi_diagonal", 1, period=period)
    at_least("multi_diagonal", 0, width=width)
    return (q_idx - kv_idx + width) % period <= 2 * width


@pattern
def vertical_stripe(columns: Sequence[int] | Tensor) -> Mask:
    """Every query sees the same columns of keys.

    vertical_stripe([0, 3]), 4 x 5:                                                    #..#.
                                                                                       #..#.
    Args:                                                                              #..#.
        columns: the keys, as a few numbers, or boolean [kv_len], true at the keys.    #..#.

    Source: Sparse-vDiT (arXiv 2506.03065), its vertical-stripe heads.
    """
    if isinstance(columns, Tensor):
        tensor_of("vertical_stripe", "columns", columns, "boolean", {1: "[kv_len]"})
        return flag(columns, kv_idx)
    runs = _runs("vertical_stripe", "columns", columns)
    if not runs:
        raise MaskError("vertical_stripe got no columns; for a head that sees nothing write ~full.")
    stripes = [_between(kv_idx, first, last) for first, last in runs]
    kept = stripes[0]
    for stripe in stripes[1:]:
        kept = kept | stripe
    return kept


@pattern
def mminference_grid(
    stride: int,
    shift: int = 0,
    horizontal: bool = True,
    vertical: bool = True,
    slash: bool = False,
    n_local: int = 1024,
    vision_start: int = 0,
) -> Mask:
    """Causal, of which are kept a local band, every `stride`-th row and every `stride`-th column.

    The local band sees n_local + 1 keys, the query's own included: q_idx - kv_idx <= n_local.

    mminference_grid(3, 1, n_local=0), 8 x 8:                                      #.......
                                                                                   ##......
    Args:                                                                          .##.....
        stride: tokens from one row or column to the next: those of a frame.       .#.#....
        shift: the first of the rows and columns, 0 to stride - 1.                 #####...
        horizontal: keep the rows.                                                 .#..##..
        vertical: keep the columns.                                                .#..#.#.
        slash: keep the diagonals where (q_idx - kv_idx + shift) % stride == 0.    ########
        n_local: tokens before a query's own that it always sees.
        vision_start: position of the first vision token, from which stride and shift count.

    Source: MMInference (arXiv 2504.16083), the mask of its pattern search; vision tokens only.
    """
    at_least("mminference_grid", 1, stride=stride)
    at_least("mminference_grid", 0, shift=shift, n_local=n_local, vision_start=vision_start)
    booleans("mminference_grid", horizontal=horizontal, vertical=vertical, slash=slash)
    if shift >= stride:
        raise MaskError(
            f"mminference_grid(stride={stride}, shift={shift}): shift must be less than stride; "
            f"use shift={shift % stride}."
        )
    kept = q_idx - kv_idx <= n_local
    if horizontal:
        kept = kept | ((q_idx - vision_start) % stride).equals(shift)
    if vertical:
        kept = kept | ((kv_idx - vision_start) % stride).equals(shift)
    if slash:
        kept = kept | ((q_idx - kv_idx + shift) % stride).equals(0)
    return causal & kept


def _runs(name: str, argument: str, numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs (first, last) of consecutive numbers."""
    given = list(numbers) if isinstance(numbers, Sequence) else [numbers]
    if not all(is_int(n) and n >= 0 for n in given):
        raise MaskError(
            f"{name}({argument}={numbers!r}): {argument} must be a list of ints of 0 or more."
        )
    runs: list[tuple[int, int]] = []
    for n in sorted(set(given)):
        if runs and n == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return runs


def _between(index: Index, first: int, last: int) -> Mask:
    return index.equals(first) if first == last else (first <= index) & (index <= last)
