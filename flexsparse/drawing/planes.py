"""What there is to draw: the distinct masks of all heads and batch rows, each with its blocks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import classify
from flexsparse.analysis.validate import problem
from flexsparse.arguments import block_sizes
from flexsparse.compiler import CompiledMask
from flexsparse.drawing.block_lists import grid_of, place_of, planes_of, rectangles_of
from flexsparse.drawing.plane import Blocks, Owner, Plane
from flexsparse.errors import MaskError
from flexsparse.expr import Index, Mask
from flexsparse.heads import PerHead
from flexsparse.questions.cases import cases, missing_argument
from flexsparse.tensors import Table
from flexsparse.text import shown
from flexsparse.tracing import from_mask_mod
from flexsparse.tree import Expr
from flexsparse.walks import rewritten


class Lengths(NamedTuple):
    """Where a Mask or PerHead is looked at; all None for what already has its lengths."""

    q_len: int | None = None
    kv_len: int | None = None
    batch: int | None = None
    n_heads: int | None = None
    q_offset: int | None = None
    block_size: int | tuple[int, int] | None = None

    @classmethod
    def of(cls, compiled: CompiledMask) -> Lengths:
        """Those of a compiled mask."""
        x = compiled
        return cls(x.q_len, x.kv_len, x.batch, x.n_heads, x.q_offset, x.block_size)


def planes(verb: str, drawn: Any, at: Lengths) -> list[Plane]:
    """Each distinct mask of what is drawn, in the order of the first head that has it.

    Args:
        verb: the function that the user called, for errors.
        drawn: a Mask, PerHead, CompiledMask or torch BlockMask.
        at: the lengths of a Mask or PerHead.
    """
    if isinstance(drawn, (CompiledMask, BlockMask)):
        given = [name for name, value in at._asdict().items() if value is not None]
        if given:
            raise MaskError(
                f"{verb}: a {type(drawn).__name__} has its lengths; leave out {', '.join(given)}."
            )
        return _of_block_mask(drawn) if isinstance(drawn, BlockMask) else _of_compiled(verb, drawn)
    if not isinstance(drawn, (Mask, PerHead)):
        hint = " Wrap the list in per_head." if isinstance(drawn, (list, tuple)) else ""
        raise MaskError(
            f"{verb} takes a Mask, per_head([...]), a CompiledMask or a BlockMask, not "
            f"{type(drawn).__name__}.{hint or ' Wrap a mask_mod function with from_mask_mod.'}"
        )
    if at.q_len is None:
        raise MaskError(f"{verb}: a Mask has no length. Give q_len (and kv_len, if it differs).")
    if at.kv_len is None:
        at = at._replace(kv_len=at.q_len)
    return _of_masks(verb, drawn, at)


def _of_masks(
    verb: str, masks: Mask | PerHead, at: Lengths, compiled: CompiledMask | None = None
) -> list[Plane]:
    size = 128 if at.block_size is None else at.block_size
    looked_at = cases(
        verb,
        masks,
        at.q_len,  # type: ignore[arg-type]
        at.kv_len,  # type: ignore[arg-type]
        batch=at.batch,
        n_heads=at.n_heads,
        q_offset=at.q_offset,
        block_size=block_sizes(f"{verb}: block_size", size),
    )
    names: dict[Mask, str] = {}
    owners: dict[Mask, list[Owner]] = {}
    for case in looked_at:
        reason = missing_argument(case) or problem(case.mask, case.grid, case.mask.device)
        if reason is not None:
            raise MaskError(f"{verb}: {reason}")
        for b in range(case.grid.batch) if "b" in case.mask.variables else (None,):
            for h in case.heads or (None,):
                mask = of_one_plane(case.mask, b or 0, h or 0)
                names.setdefault(mask, shown(case.mask))
                owners.setdefault(mask, []).append((b, h))
    grid = looked_at[0].grid._replace(batch=1, heads=(0,))
    return [
        Plane(
            names[mask],
            tuple(pairs),
            grid,
            mask,
            functools.partial(classified, mask, grid)
            if compiled is None
            else functools.partial(_compiled, compiled, *pairs[0]),
        )
        for mask, pairs in owners.items()
    ]


def _of_compiled(verb: str, compiled: CompiledMask) -> list[Plane]:
    masks = compiled.masks if compiled.n_heads else compiled.masks.distinct[0]
    return _of_masks(verb, masks, Lengths.of(compiled), compiled)


def classified(mask: Mask, grid: Grid) -> Blocks:
    """The blocks of a mask that reads neither b nor h."""
    classes = classify(mask, grid)
    return Blocks(classes.partial, classes.full)


def _compiled(compiled: CompiledMask, b: int | None, h: int | None) -> Blocks:
    """The blocks of one batch row and head of a compiled mask."""
    b, h = b or 0, h or 0
    classes = next(launch.classes for launch in compiled.launches if h in launch.heads)
    grid = classes.grid
    if grid.planes == 1:
        return Blocks(classes.partial, classes.full)
    place = grid.heads.index(h) if len(grid.heads) > 1 else 0
    plane = min(b, grid.batch - 1) * len(grid.heads) + place
    return Blocks(classes.partial.of_plane(plane), classes.full.of_plane(plane))


def of_one_plane(mask: Mask, b: int, h: int) -> Mask:
    """A mask as one head in one batch row has it: equal for heads whose masks are equal."""
    if not mask.variables & {"b", "h"}:
        return mask
    return rewritten(mask.at(b=b, h=h), _read)


def _read(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """A node whose table, if it has one, is read now where indices are constant."""
    constants = [arg.payload if arg.op == "const" else None for arg in args]
    if not isinstance(node.payload, Table) or all(n is None for n in constants):
        return node.over(args)
    entries = node.payload.tensor[tuple(slice(None) if n is None else n for n in constants)]
    left = tuple(arg for arg, n in zip(args, constants, strict=True) if n is None)
    if isinstance(node, Index) and not left:
        return Index("const", payload=int(entries))
    return type(node)("lookup", left, Table(entries))


def _of_block_mask(block_mask: BlockMask) -> list[Plane]:
    batch, heads = planes_of(block_mask)
    grid = grid_of(block_mask)
    whole = _traced(block_mask, grid._replace(batch=batch, heads=tuple(range(heads))))
    found: list[_Found] = []
    for b in range(batch):
        for h in range(heads):
            owner = (b if batch > 1 else None, h if heads > 1 else None)
            place = place_of(block_mask, b, h)
            mask = None if whole is None else of_one_plane(whole, b, h)
            same = next((x for x in found if place in x.places and x.mask == mask), None)
            if same is None:
                blocks = Blocks(*rectangles_of(block_mask, b, h))
                same = next((x for x in found if x.mask == mask and _alike(x.blocks, blocks)), None)
                if same is None:
                    same = _Found(mask, blocks, set(), [])
                    found.append(same)
            same.places.add(place)
            same.owners.append(owner)
    return [
        Plane("BlockMask", tuple(x.owners), grid, x.mask, functools.partial(_itself, x.blocks))
        for x in found
    ]


class _Found(NamedTuple):
    """A distinct plane of a BlockMask, where its lists lie in memory, and who has it."""

    mask: Mask | None
    blocks: Blocks
    places: set[tuple[int, ...]]
    owners: list[Owner]


def _itself(blocks: Blocks) -> Blocks:
    return blocks


def _traced(block_mask: BlockMask, grid: Grid) -> Mask | None:
    """The mask_mod as an expression; None if it cannot be called, as that of a slice."""
    try:
        mask = from_mask_mod(block_mask.mask_mod, device=block_mask.kv_indices.device)
    except MaskError:
        return None
    return mask if problem(mask, grid, block_mask.kv_indices.device) is None else None


def _alike(a: Blocks, b: Blocks) -> bool:
    pairs = [*zip(a.partial, b.partial, strict=True), *zip(a.full, b.full, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)
