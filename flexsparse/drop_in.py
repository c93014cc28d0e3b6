"""create_block_mask: torch's signature and torch's result, without an [Q_LEN, KV_LEN] tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask

from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import BlockClasses, classify
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.analysis.validate import needs_int64, problem
from flexsparse.arguments import (
    INT32_MAX,
    MOST_HEADS,
    block_sizes,
    check_size,
    check_values,
    usable_device,
)
from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.default_device import cpu_by_default
from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.lower import lower
from flexsparse.tracing import from_mask_mod
from flexsparse.uncompiled import uncompiled

FULL_LISTS = ("full_kv_num_blocks", "full_kv_indices", "full_q_num_blocks", "full_q_indices")
LISTS = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices", *FULL_LISTS)


@uncompiled
def create_block_mask(
    mask_mod: Callable[..., Tensor],
    B: int | None,  # noqa: N803
    H: int | None,  # noqa: N803
    Q_LEN: int,  # noqa: N803
    KV_LEN: int,  # noqa: N803
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,  # noqa: N803
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
    **newer: Any,
) -> BlockMask:
    """The BlockMask that torch's create_block_mask makes, entry for entry, in milliseconds.

    One difference, on purpose: a mask that reads h with H=None (or b with B=None) is an error here,
    where torch takes the blocks of head 0 for all heads.

    Make it anew after a write to a tensor that the function captures: the blocks do not follow,
    here as in torch, and the mask_mod, which does in torch, need not.

    Args:
        mask_mod: a mask_mod function, or a Mask.
        B: batch rows; None where the mask is the same for all.
        H: query heads; None where the mask is the same for all.
        Q_LEN: queries, in tokens.
        KV_LEN: keys, in tokens.
        device: of the lists; the accelerator by default, or else the CPU.
        BLOCK_SIZE: tokens of a block, or (of queries, of keys).
        _compile: accepted and ignored; nothing here needs compiling.
        separate_full_blocks: whether full blocks have lists of their own.
        compute_dq_write_order: as in torch, for its deterministic FLASH backward.
        dq_kv_order: as in torch.
        newer: other arguments of the installed torch, at their default.
    """
    _known_by_torch(newer, compute_dq_write_order)
    check_values()
    check_size("B", B, INT32_MAX, optional=True)
    check_size("H", H, MOST_HEADS, optional=True)
    check_size("Q_LEN", Q_LEN, INT32_MAX)
    check_size("KV_LEN", KV_LEN, INT32_MAX)
    blocks = block_sizes("BLOCK_SIZE", BLOCK_SIZE)
    if not isinstance(dq_kv_order, bool):
        raise MaskError(f"dq_kv_order={dq_kv_order!r}; it must be a bool.")
    if device is None:
        device = torch.accelerator.current_accelerator() or "cpu"
    place = usable_device(device)
    mask = from_mask_mod(mask_mod, device=place)
    for variable, name, n, what in (
        ("h", "H", H, "query heads"),
        ("b", "B", B, "batch rows"),
    ):
        if n is None and variable in mask.variables:
            raise MaskError(
                f"The mask reads {variable} and {name}=None: its blocks differ between {what}. "
                f"Give {name}=the number of {what}. (torch would use those of number 0 for all.)"
            )
    planes = (B or 1, H or 1)
    grid = Grid(Q_LEN, KV_LEN, 0, blocks, planes[0], tuple(range(planes[1]))).read_by(mask)
    with cpu_by_default():
        reason = problem(mask, grid, place)
        if reason is not None:
            raise MaskError(reason)
        classes = classify(mask, grid)
        if not separate_full_blocks:
            classes = _all_partial(classes)
        kept = write_kept_blocks(classes, place)
    result = block_mask(grid, kept, _element_mask_mod(mask, mask_mod, grid, place))
    _spread(result, planes)
    if not separate_full_blocks:
        for name in FULL_LISTS:
            setattr(result, name, None)
    if compute_dq_write_order:
        _write_dq_order(result, dq_kv_order)
    return result


def _known_by_torch(newer: dict[str, Any], compute_dq_write_order: bool) -> None:
    known = inspect.signature(torch_flex.create_block_mask).parameters
    for name, value in newer.items():
        if name not in known:
            raise MaskError(
                f"create_block_mask got {name}={value!r}; torch {torch.__version__} knows no such "
                f"argument. It has {', '.join(known)}."
            )
        if value != known[name].default:
            raise MaskError(
                f"create_block_mask got {name}={value!r}, an argument of torch {torch.__version__} "
                "that flexsparse does not know. Leave it out, or use torch's create_block_mask."
            )
    if compute_dq_write_order and "compute_dq_write_order" not in known:
        raise MaskError(
            f"compute_dq_write_order=True needs a newer torch than {torch.__version__}."
        )


def _all_partial(classes: BlockClasses) -> BlockClasses:
    """The same blocks, where the mask_mod is to be applied to full ones too."""
    every = Rectangles.joined([classes.partial, classes.full])
    return classes._replace(partial=every, full=every.where(slice(0)))


def _spread(result: BlockMask, planes: tuple[int, int]) -> None:
    """Give the lists all batch rows and heads; those that share lists share their memory."""
    rows, columns = result.kv_num_blocks.shape[2], result.q_num_blocks.shape[2]  # type: ignore[union-attr]
    for name in LISTS:
        lists = getattr(result, name)
        if name.endswith("indices"):
            # a compact list is never of width 1, and that of a single block is
            lists = lists[..., : rows if "q_" in name else columns]
        setattr(result, name, lists.expand(*planes, *lists.shape[2:]))


def _element_mask_mod(
    mask: Mask, mask_mod: Callable[..., Tensor], grid: Grid, device: torch.device
) -> Callable[..., Tensor]:
    """The mask_mod of the BlockMask: lowered, so that another window size is no other kernel.

    The function itself where the mask holds what that function would compute anew each time.
    """
    computed = any(table.is_copy for table in mask.tables)
    if not isinstance(mask_mod, Mask) and (computed or mask.opaque_operators):
        return mask_mod
    return lower(mask, device, wide=needs_int64(mask, grid))


def _write_dq_order(result: BlockMask, dq_kv_order: bool) -> None:
    """What torch's create_block_mask adds for compute_dq_write_order=True."""
    compute: Any = torch_flex._compute_dq_write_order_from_block_mask
    result.dq_write_order, result.dq_write_order_full = compute(result, dq_kv_order=dq_kv_order)
    result.dq_kv_order = None
    result.dq_kv_order_spt = dq_kv_order
