"""The hints for torch's Triton kernels, against what they promise."""

import pytest
import torch
from hypothesis import given
from oracles import dense, grids, masks

from flexsparse import Mask, kv_idx, q_idx
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import classify
from flexsparse.analysis.hints import kernel_options
from flexsparse.blocks import write_kept_blocks
from flexsparse.masks import causal, full, prefix, same_document, sink, window

SAFE, CONTIGUOUS = "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS"


def hints(mask, grid):
    classes = classify(mask, grid)
    kept = write_kept_blocks(classes, torch.device("cpu"))
    return kernel_options(mask, classes, kept), kept


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (full, {SAFE, CONTIGUOUS}),
        (causal, {SAFE, CONTIGUOUS}),
        (causal & window(300), set()),  # the first block of a row lies at the window's far end
        (causal & (sink(1) | window(300)), {SAFE}),
        (causal & window(128), {CONTIGUOUS}),
        (prefix(200), {SAFE, CONTIGUOUS}),
        (causal & same_document(torch.arange(640) // 256), {SAFE, CONTIGUOUS}),
        (causal & (q_idx >= 1), {CONTIGUOUS}),  # row 0 has no key
        (q_idx // 256 > kv_idx // 256, {CONTIGUOUS}),  # the first rows of blocks are empty
    ],
    ids=lambda x: str(x) if isinstance(x, Mask) else "-".join(sorted(x)),
)
def test_what_is_proved_of_well_known_masks(mask, expected):
    found, _ = hints(mask, Grid(640, 640, 0, (128, 128), 1, (0,)))
    assert set(found) == expected


def test_decoding_gets_no_promise_about_rows():
    found, _ = hints(causal, Grid(64, 640, 576, (64, 64), 1, (0,)))
    assert SAFE not in found


@given(masks, grids)
def test_a_hint_is_never_wrong(mask, grid):
    found, kept = hints(mask, grid)
    if SAFE in found:
        pairs = dense(mask, grid)
        for plane in range(grid.planes):
            b, head = divmod(plane, len(grid.heads))
            for row in range(grid.rows):
                lists = kept.kv if kept.kv.counts[b, head, row] else kept.full_kv
                key = int(lists.indices[b, head, row, 0]) * grid.block_size[1]
                q0 = row * grid.block_size[0]
                assert pairs[b, head, q0 : q0 + grid.block_size[0], key].all()
    if CONTIGUOUS in found:
        for lists in kept:
            for counts, indices in zip(
                lists.counts.flatten(0, 2), lists.indices.flatten(0, 2), strict=True
            ):
                blocks = indices[:counts]
                assert blocks.diff().eq(1).all()
