"""Pictures: what they count, what they show, and what they refuse."""

import base64
import io
import itertools
import json
import re
import subprocess
import sys
import zlib
from html import unescape

import pytest
import torch
from hypothesis import given, settings
from oracles import dense, dense_classes, grids, masks
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flexsparse as fs
from flexsparse import MaskError, compile_mask, h, kv_idx, lookup, per_head, q_idx
from flexsparse.analysis.cells import Grid
from flexsparse.analysis.classify import classify
from flexsparse.analysis.rectangles import Rectangles
from flexsparse.analysis.validate import problem
from flexsparse.blocks import block_mask, write_kept_blocks
from flexsparse.drawing import Device, colours, compare, draw, html, paper, roofline, zoom
from flexsparse.drawing.canvas import MOST_BYTES, canvas
from flexsparse.drawing.density import kept_elements
from flexsparse.drawing.least_time import work
from flexsparse.drawing.panels import ELEMENTS_EVALUATED, Panel, counted, panels
from flexsparse.drawing.planes import Lengths, of_one_plane, planes
from flexsparse.drawing.pools import Pools
from flexsparse.drawing.terminal import pooled_states
from flexsparse.drawing.words import percent, scaled, tokens
from flexsparse.masks import block_sparse, causal, dilated, full, same_document, sink, window

STREAMING = causal & (sink(64) | window(256))
MILLION = 1 << 20
ENOUGH = 1 << 30  # elements


def shown(drawn, *lengths, pools=128, **more) -> tuple[Panel, ...]:
    return panels(planes("draw", drawn, Lengths(*lengths, **more)), pools).shown


def texts(figure) -> str:
    """All that is written on a figure."""
    parts = [text.get_text() for text in figure.texts]
    return "\n".join(parts + [text.get_text() for axes in figure.axes for text in axes.texts])


def polygons(figure):
    return [patch for patch in figure.axes[0].patches if hasattr(patch, "get_xy")]


def pixels(figure) -> torch.Tensor:
    """uint8[height, width, 3]."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(paper.png(figure))).convert("RGB")
    return torch.tensor(list(image.tobytes())).view(image.height, image.width, 3)


# what is counted


def test_pools_count_every_block_and_element_once():
    generator = torch.Generator().manual_seed(0)
    grid = Grid(1000, 700, 0, (16, 32), 1, (0,))  # 63 x 22 blocks, ragged both ways
    painted = torch.zeros(grid.rows, grid.columns, dtype=torch.int64)
    found = []
    for _ in range(60):
        row0, column0 = (int(torch.randint(n, (1,), generator=generator)) for n in painted.shape)
        row1, column1 = min(row0 + 5, grid.rows), min(column0 + 3, grid.columns)
        if not painted[row0:row1, column0:column1].any():
            painted[row0:row1, column0:column1] = 1
            found.append((0, row0, row1, column0, column1))
    rectangles = Rectangles(*torch.tensor(found).unbind(1))
    elements = painted.repeat_interleave(16, 0)[:1000].repeat_interleave(32, 1)[:, :700]
    for most in (1, 7, 20, 63, 200):
        pools = Pools.of(grid, most)
        assert max(pools.shape) <= most
        blocks = pools.blocks_of(rectangles)
        in_tokens = (pools.side[0] * 16, pools.side[1] * 32)
        for counts, whole, side in (
            (blocks, painted, pools.side),
            (pools.elements_of(rectangles, grid, blocks), elements, in_tokens),
            (pools.elements(grid), torch.ones_like(elements), in_tokens),
        ):
            brute = [
                [part.sum() for part in strip.split(side[1], 1)] for strip in whole.split(side[0])
            ]
            assert counts.tolist() == [[int(x) for x in row] for row in brute]


@settings(max_examples=150)
@given(masks, grids)
def test_elements_of_partial_blocks_are_counted_exactly(mask, grid):
    if grid.q_len * grid.kv_len > 65536 or problem(mask, grid, torch.device("cpu")):
        return
    grid = grid._replace(heads=grid.heads[:1])
    mask = of_one_plane(mask, grid.batch - 1, grid.heads[0])
    kept = dense(mask, grid._replace(batch=1))[0, 0]
    partial = classify(mask, grid._replace(batch=1)).partial
    _, row, _, column, _ = partial.units()
    counts = kept_elements(mask, grid, row, column, ENOUGH)
    q_block, kv_block = grid.block_size
    for r, c, count in zip(row.tolist(), column.tolist(), counts.tolist(), strict=True):
        block = kept[r * q_block : (r + 1) * q_block, c * kv_block : (c + 1) * kv_block]
        assert count == int(block.sum())


@pytest.mark.parametrize(
    ("mask", "elements"),
    [
        (causal, MILLION * (MILLION + 1) // 2),
        (causal & window(256), MILLION * 256 - 255 * 128),
        (STREAMING, MILLION * 320 - (255 * 128 + 64 * 256 + 32 * 63) - 0),
        (causal & (q_idx // 1000).equals(kv_idx // 1000), None),
    ],
    ids=str,
)
def test_a_million_tokens_are_counted_by_looking_at_few_blocks(mask, elements):
    (panel,) = shown(mask, MILLION)
    if elements is None:
        elements = 1048 * 1000 * 1001 // 2 + 576 * 577 // 2
    if mask is STREAMING:
        # rows below the window see all keys up to their own; later ones sink and window
        elements = sum(min(p + 1, 256) + max(0, min(64, p + 1 - 256)) for p in range(MILLION))
    assert int(panel.kept.sum()) == elements


def test_numbers_made_of_themselves_are_described_once():
    index = q_idx % 7 + kv_idx % 5
    for _ in range(40):
        index = index // 2 + index
    mask = causal & (index % 3).equals(1)
    (panel,) = shown(mask, 512)
    assert int(panel.kept.sum()) == int(dense(mask, panel.grid).sum())


def test_what_takes_too_long_to_count_is_said_and_not_guessed():
    torch.manual_seed(0)
    noise = lookup(torch.rand(4096, 4096) < 0.5, q_idx, kv_idx)
    (panel,) = shown(noise, 4096, pools=8)
    assert panel.kept is not None  # 1024 kinds of blocks
    limited = panels(planes("draw", noise, Lengths(4096)), 8)
    plane = planes("draw", noise, Lengths(4096))[0]
    assert counted(plane, 1 << 20).kept is None
    assert limited.shown[0].element_density == pytest.approx(0.5, abs=0.01)


def test_a_panel_says_what_each_pool_holds():
    kept = dense(STREAMING, grid := Grid(1000, 1000, 0, (128, 128), 1, (0,)))[0, 0]
    classes = dense_classes(kept, (128, 128))
    (panel,) = shown(STREAMING, 1000)
    assert torch.equal(panel.states, classes.long())
    assert panel.blocks == int((classes > 0).sum())
    assert panel.element_density == int(kept.sum()) / 1000**2
    assert torch.equal(panel.work, torch.stack([(classes == i).sum(1) for i in (1, 2)]))
    (pooled,) = shown(STREAMING, 1000, pools=4)
    assert pooled.pools.side == (2, 2)
    assert torch.equal(pooled.states > 0, classes.view(4, 2, 4, 2).amax((1, 3)) > 0)
    assert torch.equal(pooled.states == 2, classes.view(4, 2, 4, 2).amin((1, 3)) == 2)
    in_pools = [[part.sum() for part in rows.split(256, 1)] for rows in kept.split(256)]
    assert pooled.kept.tolist() == [[int(x) for x in row] for row in in_pools]
    assert grid.rows == 8


def test_the_terminal_shows_the_same_states():
    for mask in (STREAMING, causal & dilated(512, 3), full):
        grid = Grid(5000, 5000, 0, (128, 128), 1, (0,))
        (panel,) = shown(mask, 5000)
        terminal = pooled_states(classify(mask, grid), grid.rows, grid.columns)
        assert torch.equal(panel.states, terminal.long())


# whose masks they are


def test_heads_with_one_mask_share_a_panel():
    found = shown(per_head([causal, STREAMING, causal, causal, STREAMING]), 1024)
    assert [(panel.who, panel.name) for panel in found] == [
        ("heads 0, 2-3", "causal"),
        ("heads 1, 4", STREAMING.name),
    ]


def test_a_mask_that_reads_the_head_has_a_panel_for_each_distinct_one():
    sizes = torch.tensor([100, 300, 100, 300])
    mask = causal & (q_idx - kv_idx < lookup(sizes, h))
    found = shown(mask, 1024, n_heads=4)
    assert [panel.who for panel in found] == ["heads 0, 2", "heads 1, 3"]
    assert [int(p.kept.sum()) for p in found] == [
        sum(min(n, p + 1) for p in range(1024)) for n in (100, 300)
    ]


def test_batch_rows_are_told_apart():
    lengths = torch.tensor([500, 1024, 500])
    mask = causal & (kv_idx < lookup(lengths, fs.b))
    compiled = compile_mask(mask, 1024, 1024, batch=3)
    found = shown(compiled)
    assert [panel.who for panel in found] == [
        "batch rows 0, 2, all heads",
        "batch row 1, all heads",
    ]
    assert [panel.blocks for panel in found] == [8 * 9 // 2 - 4 * 5 // 2 + 4 - 4, 36]


def test_a_compiled_mask_is_drawn_from_its_own_blocks():
    # heads of one structure run as one launch, and are drawn apart
    heads = per_head([causal] * 2 + [causal & window(n) for n in (100, 300, 100)])
    compiled = compile_mask(heads, 1000, 2000, block_size=(64, 128))
    for mine, fresh in zip(
        shown(compiled), shown(heads, 1000, 2000, block_size=(64, 128)), strict=True
    ):
        assert (mine.who, mine.grid) == (fresh.who, fresh.grid)
        assert torch.equal(mine.states, fresh.states)
        assert torch.equal(mine.kept, fresh.kept)


# torch's BlockMasks


@pytest.mark.parametrize("block_size", [128, 64, (32, 128)])
def test_any_block_mask_of_torch_is_drawn(block_size):
    offsets = torch.tensor([100, 200, 100])

    def mask_mod(b, h, q, kv):
        return (q >= kv) & (q - kv < offsets[h] + 300 * b)

    theirs = create_block_mask(mask_mod, 2, 3, 600, 900, device="cpu", BLOCK_SIZE=block_size)
    found = shown(theirs)
    assert [panel.who for panel in found] == [
        "batch row 0, heads 0, 2",
        "batch row 0, head 1",
        "batch row 1, heads 0, 2",
        "batch row 1, head 1",
    ]
    for panel in found:
        b, head = panel.owners[0]
        q, kv = torch.arange(600)[:, None], torch.arange(900)
        kept = mask_mod(b, head, q, kv)
        classes = dense_classes(kept, panel.grid.block_size)
        assert torch.equal(panel.states, classes.long())
        assert int(panel.kept.sum()) == int(kept.sum())


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("widen", [True, False])
def test_our_lists_are_drawn_compact_or_whole(compact, widen):
    classes = classify(STREAMING, grid := Grid(2000, 2000, 0, (128, 128), 1, (0,)))
    kept = write_kept_blocks(classes, torch.device("cpu"), compact=compact)
    (panel,) = shown(block_mask(grid, kept, STREAMING, widen=widen))
    (mine,) = shown(STREAMING, 2000)
    assert torch.equal(panel.states, mine.states)
    assert torch.equal(panel.kept, mine.kept)


def test_the_block_mask_of_a_compiled_mask_looks_like_it():
    attend = compile_mask(per_head([causal, STREAMING, causal]), 1000, 1000, device="cpu")
    ours, whole = shown(attend), shown(attend.block_mask)
    assert [panel.who for panel in whole] == ["heads 0, 2", "head 1"]
    for mine, theirs in zip(ours, whole, strict=True):
        assert torch.equal(mine.states, theirs.states)
        assert torch.equal(mine.kept, theirs.kept)
    assert "BlockMask" in html(attend.block_mask)


def test_lists_in_any_order_without_full_blocks_are_drawn():
    def mask_mod(b, h, q, kv):
        return q >= kv

    theirs = create_block_mask(mask_mod, None, None, 512, 512, device="cpu")
    counts = theirs.kv_num_blocks + theirs.full_kv_num_blocks
    backwards = torch.arange(3, -1, -1, dtype=torch.int32) - (3 - torch.arange(4)[:, None])
    shuffled = BlockMask.from_kv_blocks(
        counts, backwards.clamp(min=0).int()[None, None], BLOCK_SIZE=128, mask_mod=mask_mod
    )
    (panel,) = shown(shuffled)
    assert torch.equal(panel.states, torch.ones(4, 4).tril().long())
    assert int(panel.kept.sum()) == 512 * 513 // 2


def test_a_slice_of_a_block_mask_is_drawn_without_its_elements():
    theirs = create_block_mask(lambda b, h, q, kv: q >= kv, 1, 1, 1024, 1024, device="cpu")
    part = theirs[:, :, torch.tensor([2, 3])]
    (panel,) = shown(part)
    assert panel.states.tolist() == [[2, 2, 1, 0, 0, 0, 0, 0], [2, 2, 2, 1, 0, 0, 0, 0]]
    assert panel.element_density is None
    assert "not counted" in texts(draw(part))
    with pytest.raises(MaskError, match="elements of this block are unknown"):
        zoom(part, 0, 2)


def test_lists_that_point_outside_are_an_error():
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    wrong = torch.full((1, 1, 2, 2), 7, dtype=torch.int32)
    lists = [counts, wrong, None, None, None, None, None, None]
    with pytest.raises(MaskError, match="lists the key block 7, and its keys have 2 blocks"):
        draw(BlockMask((256, 256), *lists, (128, 128), causal))


def test_a_block_listed_as_partial_and_as_full_is_an_error():
    counts, first = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2).int()
    lists = [counts, first, counts, first, None, None, None, None]
    with pytest.raises(MaskError, match=r"lists the block \(0, 0\) both as partial and as full"):
        draw(BlockMask((256, 256), *lists, (128, 128), causal))


# what is seen


def test_a_sink_of_one_block_of_8192_is_seen_at_every_height():
    figure = draw(STREAMING, MILLION)
    image = pixels(figure)
    x0, _, y1, y0 = figure.axes[0].images[0].get_extent()  # in inches
    left, top, bottom = (round(inches * paper.DPI) for inches in (x0, y0, y1))
    strip = image[top + 3 : bottom - 3, left + 1].float()
    empty = torch.tensor(colours.LIGHT.empty).float()
    assert ((strip - empty).abs().sum(1) > 60).all()
    inside = image[top + 200 : bottom - 3, left + 10 : left + 40].float()
    assert ((inside - empty).abs().sum(2) < 10).all()


def lightness(colour):
    """CIE L* of sRGB."""
    linear = (torch.tensor(colour) / 255).double()
    linear = torch.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    y = float(linear @ torch.tensor([0.2126, 0.7152, 0.0722]).double())
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


@pytest.mark.parametrize("palette", [colours.LIGHT, colours.DARK])
def test_the_three_states_are_told_apart_in_grey(palette):
    steps = [lightness(x) for x in (palette.empty, palette.sparse, palette.dense, palette.full)]
    assert steps == sorted(steps, reverse=palette is colours.LIGHT)
    gaps = [abs(a - b) for a, b in itertools.pairwise(steps)]
    assert min(gaps[0], gaps[2]) > 12


# Machado, Oliveira and Fernandes 2009, severity 1.0: protanopia, deuteranopia, tritanopia
BLINDNESS = {
    "protanopia": """0.152286 1.052583 -0.204868
                     0.114503 0.786281 0.099216
                     -0.003882 -0.048116 1.051998""",
    "deuteranopia": """0.367322 0.860646 -0.227968
                       0.280085 0.672501 0.047413
                       -0.011820 0.042940 0.968881""",
    "tritanopia": """1.255528 -0.076749 -0.178779
                     -0.078411 0.930809 0.147602
                     0.004733 0.691367 0.303900""",
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_are_told_apart_by_colour_blind_readers(kind):
    matrix = torch.tensor([float(x) for x in BLINDNESS[kind].split()]).view(3, 3)
    seen = [
        [(matrix @ torch.tensor(colour).float()).clamp(0, 255) for colour in some]
        for some in (
            colours.LIGHT,
            colours.DARK,
            (colours.LIGHT.empty, colours.ONLY_A, colours.ONLY_B, colours.BOTH, colours.EACH),
        )
    ]
    for some in seen:
        distances = torch.cdist(torch.stack(some), torch.stack(some))
        assert distances[~torch.eye(len(some), dtype=torch.bool)].min() > 45


def test_a_picture_says_who_computes_what():
    figure = draw(per_head([causal] * 2 + [STREAMING] * 6), 4096)
    written = texts(figure)
    for part in ("causal", "heads 0-1", "heads 2-7", "51.6 % of blocks, 50.0 % of elements"):
        assert part in written
    # 2 heads of 528 blocks and 6 of 122, of 1,024 each
    assert f"{percent((2 * 528 + 6 * 122) / 8 / 1024)} of all blocks are computed" in written
    for part in ("query 0", "key 0", "4K", "block 0", "32", "Blocks computed for each head"):
        assert part in written
    heights = {}
    for bar in polygons(figure):
        x, y = bar.get_xy()[:, 0].min(), bar.get_xy()[:, 1]
        if len(bar.get_xy()) == 5 and bar.get_fill() and y.max() > 5:  # below the panels
            heights[x] = heights.get(x, 0) + y.max() - y.min()
    tallest = max(heights.values())
    assert [n / tallest for n in heights.values()] == pytest.approx([1] * 2 + [122 / 528] * 6)


def test_bars_beside_the_cells_are_the_work_of_each_row():
    (panel,) = shown(STREAMING, 4096)
    figure = draw(STREAMING, 4096)
    ends = [x.get_xy()[:, 0].max() for x in polygons(figure) if len(x.get_xy()) > 5]
    left, right, _, _ = figure.axes[0].images[0].get_extent()
    scale = (right - left) * (0.2 - 0.035) / int(panel.work.sum(0).max())
    first = left + (right - left) * 1.035
    assert ends[0] == pytest.approx(first + scale * int(panel.work.sum(0).max()))
    assert ends[1] == pytest.approx(first + scale * int(panel.work[1].max()))


def test_up_to_64_tokens_the_elements_are_drawn():
    words = ["The", "cat", "sat", "on", "the", "mat", "and", "slept"]
    figure = draw(causal & window(3), 8, labels=words)
    assert all(word in texts(figure) for word in words)
    image = figure.axes[0].images[0].get_array()
    kept = (torch.tensor(image) == torch.tensor(colours.LIGHT.full)).all(2)
    assert torch.equal(kept, dense(causal & window(3), Grid(8, 8, 0, (128, 128), 1, (0,)))[0, 0])
    assert "32.8 % of the elements are kept" in texts(figure)
    assert draw(full, 64).axes[0].images[0].get_array().shape == (64, 64, 3)
    assert draw(full, 65).axes[0].images[0].get_array().shape == (1, 1, 3)


def test_many_distinct_masks_are_cut_off_and_that_is_said():
    figure = draw(per_head([causal & window(n) for n in range(1, 41)]), 256)
    assert "8 more distinct masks are left out" in texts(figure)
    assert "Of the masks shown, " in texts(figure)
    assert len(figure.axes[0].images) == 32 + 3


@pytest.mark.parametrize(
    "figure",
    [
        lambda: draw(causal, 100_000, 128),
        lambda: draw(STREAMING, 1, 1_000_001),
        lambda: draw(causal, 300, title="a title that goes on " * 10),
        lambda: draw(causal, 64, labels=[f"token {i}" for i in range(64)]),
    ],
    ids=["positions before 0", "a late query", "a long title", "64 labels"],
)
def test_texts_stand_on_the_page_and_not_on_each_other(figure):
    figure = figure()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= figure.bbox.width
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))


# compare and zoom


def test_compare_colours_what_only_one_side_keeps():
    a, b = causal & window(512), STREAMING
    grid = Grid(4096, 4096, 0, (128, 128), 1, (0,))
    one, two = (dense(x, grid)[0, 0] for x in (a, b))
    figure = compare(a, b, 4096)
    only = [x.sum() / 4096**2 for x in (one & ~two, one & two, two & ~one)]
    said = "only a {}, both {}, only b {}".format(*(percent(float(x)) for x in only))
    assert said in texts(figure)
    parts = [dense_classes(x, (128, 128)) > 0 for x in (one & ~two, two & ~one, one & two)]
    image = torch.tensor(figure.axes[0].images[0].get_array())
    for where, colour in (
        (parts[0] & ~parts[1], colours.ONLY_A),
        (parts[1] & ~parts[0], colours.ONLY_B),
        (parts[0] & parts[1], colours.EACH),
        (parts[2] & ~parts[0] & ~parts[1], colours.BOTH),
        (~parts[0] & ~parts[1] & ~parts[2], colours.LIGHT.empty),
    ):
        assert where.any()
        assert (image[where] == torch.tensor(colour)).all()


def test_compare_pairs_heads_and_says_when_nothing_differs():
    figure = compare(per_head([causal, STREAMING]), per_head([causal, causal]), 1024)
    assert "head 0" in texts(figure)
    assert "head 1" in texts(figure)
    assert "keep the same elements" not in texts(figure)
    assert "a and b keep the same elements" in texts(compare(STREAMING, STREAMING | ~full, 1024))
    assert "a and b keep the same elements" in texts(compare(causal, ~~causal, 16))


def test_compare_of_a_block_mask_is_by_blocks():
    window_300 = causal & window(300)
    theirs = create_block_mask(window_300, None, None, 2048, 2048, device="cpu")
    figure = compare(theirs, STREAMING)
    grid = Grid(2048, 2048, 0, (128, 128), 1, (0,))
    kept = [dense(x, grid)[0, 0] for x in (window_300, STREAMING)]
    one, two = (dense_classes(x, (128, 128)) > 0 for x in kept)
    parts = [float(x.double().mean()) for x in (one & ~two, one & two, two & ~one)]
    assert "only a {}, both {}, only b {}".format(*map(percent, parts)) in texts(figure)
    assert "parts of all blocks" in texts(figure)


def test_zoom_shows_the_elements_of_a_block():
    attend = compile_mask(per_head([causal] * 2 + [causal & window(300)] * 2), 4096, 4096)
    figure = zoom(attend, 17, 15, h=3)
    block = dense(causal & window(300), Grid(4096, 4096, 0, (128, 128), 1, (0,)))[0, 0]
    block = block[17 * 128 : 18 * 128, 15 * 128 : 16 * 128]
    part = percent(float(block.double().mean()))
    assert f"head 3, q block 17, kv block 15: partial, {part} kept" in texts(figure)
    image = torch.tensor(figure.axes[0].images[1].get_array())
    assert torch.equal((image == torch.tensor(colours.LIGHT.full)).all(2), block)
    assert "query 2,176" in texts(figure)
    assert "full" in texts(zoom(attend, 17, 15, h=0)).splitlines()[0]
    assert "empty" in texts(zoom(causal, 3, 5, q_len=2048)).splitlines()[0]


# the least time


def test_roofline_counts_what_launches_compute_and_move():
    attend = compile_mask(per_head([causal] * 2 + [STREAMING] * 6), 4096, 4096)
    launches = work(attend, batch=2, n_heads=None, n_kv_heads=4, head_dim=64)
    assert [x.name.split(":")[0] for x in launches] == ["heads 0-1", "heads 2-7", "all heads"]
    blocks = [(2, 528), (6, 122), (8, 1024)]
    assert [x.flops for x in launches] == [4 * 64 * 2 * n * m * 128**2 for n, m in blocks]
    # q and out of each head, k and v of each kv head, 2 bytes each, 2 batch rows
    heads = [(2, 1), (6, 3), (8, 4)]
    assert [x.bytes for x in launches] == [2 * 2 * 64 * 4096 * (2 * q + 2 * kv) for q, kv in heads]
    h200 = Device("H200", 989e12, 4.8e12)
    assert launches[0].seconds(h200) == launches[0].flops / 989e12
    assert launches[0].bound(h200) == "compute"
    written = texts(roofline(attend, "H200", batch=2, n_kv_heads=4, head_dim=64))
    assert scaled(launches[0].seconds(h200), "s") in written
    assert "not measured" in written


def test_a_decoding_step_moves_only_the_keys_it_sees():
    attend = compile_mask(per_head([STREAMING] * 4), 4096, 4096).row(4000)
    launch, dense_attention = work(attend, 1, None, None, 128)
    assert launch.bytes == 2 * 128 * 4 * (2 * 1 + 2 * (128 + 3 * 128))  # sink; 3,745 to 4,000
    assert launch.bound(Device("any", 989e12, 4.8e12)) == "memory"
    assert dense_attention.flops == 4 * 128 * 4 * 4096


# notebooks


def decoded(text, rows, columns):
    """int[rows, columns] of a grid of the canvas, -1 where EMPTY, read as canvas.js reads it."""
    raw = zlib.decompress(base64.b64decode(text))
    words = memoryview(raw[: len(raw) // 2 * 2]).cast("H").tolist()
    counts, total = [], 0
    for step in words[:rows]:
        total = (total + step) & 0xFFFF
        counts.append(total)
    n = sum(counts)
    gaps, widths = words[rows : rows + n], words[rows + n : rows + 2 * n]
    values = list(raw[2 * rows + 4 * n :])
    grid = torch.full((rows, columns), -1)
    first, before = 0, 0
    for row, count in enumerate(counts):
        column = 0
        for place in range(count):
            i, above = first + place, before + place
            if row and place < counts[row - 1]:
                gaps[i] = (gaps[i] + gaps[above]) & 0xFFFF
                widths[i] = (widths[i] + widths[above]) & 0xFFFF
                values[i] = (values[i] + values[above]) & 0xFF
            column += gaps[i]
            grid[row, column : column + widths[i]] = values[i]
            column += widths[i]
        before, first = first, first + count
    return grid


def canvas_of(drawn, *lengths, **more):
    found = planes("html", drawn, Lengths(*lengths, **more))
    page = canvas([counted(plane, ELEMENTS_EVALUATED) for plane in found])
    return page, json.loads(unescape(re.search('data-grid="([^"]*)"', page).group(1)))


@pytest.mark.parametrize("mask", [causal, STREAMING, full, causal & dilated(512, 3), ~full])
@pytest.mark.parametrize("lengths", [(1000, 1000), (300, 2000), (2000, 129)])
def test_the_canvas_holds_every_block(mask, lengths):
    _, spec = canvas_of(mask, *lengths, q_offset=0)
    kept = dense(mask, grid := Grid(*lengths, 0, (128, 128), 1, (0,)))[0, 0]
    values = decoded(spec["panels"][0]["runs"], grid.rows, grid.columns)
    classes = dense_classes(kept, (128, 128))
    assert torch.equal(values < 0, classes == 0)
    assert torch.equal(values == 254, classes == 2)
    for row, column in (classes == 1).nonzero().tolist():
        block = kept[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128]
        assert int(values[row, column]) == round(float(block.double().mean()) * 100)


def test_the_canvas_of_8192_blocks_takes_less_than_150_kb():
    heads = [causal] * 8 + [STREAMING] * 16 + [causal & dilated(512, 3)] * 8
    page, spec = canvas_of(per_head(heads), MILLION)
    assert spec["cells"] == [8192, 8192]
    assert len(page.encode()) < 150_000
    assert "http" not in page


def test_a_grid_too_large_for_the_canvas_is_pooled_and_that_is_said():
    torch.manual_seed(0)
    table = torch.rand(1024, 1024) < 0.3
    page, spec = canvas_of(block_sparse(table, 128), 1024 * 128)
    assert spec["side"] != [1, 1]
    assert len(page.encode()) < 150_000
    assert sum(len(x["runs"]) for x in spec["panels"]) <= MOST_BYTES
    high, wide = spec["side"]
    assert f"Each cell pools {high} × {wide} blocks" in page
    values = decoded(spec["panels"][0]["runs"], *spec["cells"])
    pooled = table.view(1024 // high, high, 1024 // wide, wide).float().mean((1, 3))
    assert torch.equal(values < 0, pooled == 0)
    assert torch.equal(values == 254, pooled == 1)
    computed = (values >= 0) & (values < 254)
    assert torch.equal(values[computed], (pooled[computed] * 100).round().long())


def test_html_has_a_table_a_picture_and_a_canvas():
    attend = compile_mask(per_head([causal] * 2 + [STREAMING] * 6), 4096, 4096, device="cpu")
    page = html(attend)
    for part in ("<table>", "0-1", "2-7", "sdpa", "528", "51.6 %", "data:image/png;base64,"):
        assert part in page
    assert page.count("<canvas") == 2
    png = base64.b64decode(re.search('base64,([^"]*)', page).group(1))
    assert png.startswith(b"\x89PNG")
    assert len(png) < 100_000


def test_a_mask_without_lengths_shows_its_text_and_its_elements():
    page = html(causal & window(4))
    assert "causal &amp; window(4)" in page
    assert "(kv_idx &lt;= q_idx) &amp; (q_idx - kv_idx &lt; 4)" in page
    assert "Shown at 64 × 64 tokens" in page
    spec = json.loads(unescape(re.search('data-grid="([^"]*)"', page).group(1)))
    kept = dense(causal & window(4), Grid(64, 64, 0, (64, 64), 1, (0,)))[0, 0]
    assert torch.equal(decoded(spec["panels"][0]["runs"], 64, 64) == 254, kept)
    assert "Shown at 1,024 × 1,024 tokens" in html(STREAMING)  # 64 would show causal alone
    assert "Shown at 300 × 300 tokens" in html(same_document(torch.arange(300) // 90))


def test_html_of_what_cannot_be_drawn_says_why():
    page = html(kv_idx < h)
    assert "kv_idx &lt; h" in page
    assert "No picture: The mask reads h" in page


def test_names_cannot_break_out_of_the_page():
    page = html(causal.named('"><script>alert(1)</script>') & window(3))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_per_head_shows_each_distinct_mask():
    page = html(per_head([causal, STREAMING, causal]))
    assert page.count("<canvas") == 2
    assert "heads 0, 2" in page


def test_without_matplotlib_draw_names_the_install_and_html_still_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    paper._figure_class.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'flexsparse\[viz\]'"):
        draw(causal, 256)
    page = html(causal & window(300))
    assert "data:image" not in page
    assert "<canvas" in page
    assert "<table>" in page


def test_a_notebook_shows_the_figure_itself():
    assert draw(causal, 256)._repr_png_().startswith(b"\x89PNG")


# what is refused


TWO_HEADS = per_head([causal] * 2)


def compiled(mask=causal, n=64):
    return compile_mask(mask, n, n, device="cpu")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw(causal), "draw: a Mask has no length. Give q_len"),
        (lambda: draw("causal", 64), "draw takes a Mask, per_head.*not str"),
        (lambda: draw([causal], 64), "Wrap the list in per_head"),
        (lambda: draw(compiled(), 64), "a CompiledMask has its lengths; leave out q_len"),
        (lambda: draw(causal, 0), "draw: q_len=0; it must be an int of 1 or more"),
        (lambda: draw(causal, 64, block_size=0), "draw: block_size=0"),
        (lambda: draw(causal, 64, block_size=1.5), "draw: block_size=1.5"),
        (lambda: draw(kv_idx < h, 64), "draw: The mask reads h.*give n_heads=..."),
        (lambda: draw(lookup(torch.arange(9), kv_idx).equals(1), 64), "read out of range"),
        (lambda: draw(causal, 8, labels=["a"]), "labels has 1 tokens and the mask 8 keys"),
        (lambda: draw(causal, 4, labels="four"), "give a list of 4 strings"),
        (lambda: draw(causal, 65, labels=["a"] * 65), "up to 64 tokens"),
        (lambda: compare(compiled(), compiled(n=65)), "different lengths"),
        (lambda: compare(TWO_HEADS, per_head([causal] * 3), 64), "a has no head 2"),
        (lambda: compare(causal, causal), "compare: a Mask has no length"),
        (lambda: zoom(causal, 9, 0, q_len=300), "zoom: q_block=9; there are 3 blocks, 0 to 2"),
        (lambda: zoom(causal, 0, True, q_len=300), "kv_block=True"),
        (lambda: zoom(compiled(TWO_HEADS), 0, 0, h=2), "there is no .*head 2"),
        (lambda: roofline(causal), "roofline takes a CompiledMask, not Mask"),
        (lambda: roofline(compiled(), "TPU"), "the peaks of A100, .* are known"),
        (lambda: roofline(compiled(TWO_HEADS), n_kv_heads=3), "must divide the 2 query heads"),
        (lambda: roofline(compiled(), head_dim=0), "head_dim=0"),
    ],
)
def test_bad_input_is_a_sentence(call, message):
    with pytest.raises(MaskError, match=message):
        call()


def test_numbers_are_rounded_as_a_reader_expects():
    assert [percent(x) for x in (0, 1e-6, 0.00051, 0.37, 0.9999, 1, None)] == [
        "0 %", "under 0.01 %", "0.05 %", "37.0 %", "99.9 %", "100 %", "not computed",
    ]  # fmt: skip
    assert [tokens(n) for n in (0, 511, 512, 4096, 98304, MILLION, 1000)] == [
        "0", "511", "512", "4K", "96K", "1M", "1,000",
    ]  # fmt: skip
    assert [scaled(x, "s") for x in (0, 1.5e-7, 0.0123, 35)] == ["0 s", "150 ns", "12.3 ms", "35 s"]


def test_32_heads_at_a_million_tokens_take_under_300_mb():
    code = """
import torch
import matplotlib.figure, matplotlib.backends.backend_agg, PIL.Image
import flexsparse as fs
from flexsparse.drawing import draw
from flexsparse.masks import causal, dilated, same_document, sink, window
n = 1 << 20
documents = causal & same_document(torch.arange(n) // 5000)
heads = [causal] * 4 + [causal & (sink(64) | window(256 * i)) for i in range(1, 21)]
heads += [documents] * 4 + [causal & dilated(512, 3)] * 4
def kilobytes(name):
    return int(next(x for x in open("/proc/self/status") if x.startswith(name)).split()[1])
before = kilobytes("VmRSS")
draw(fs.per_head(heads), n).savefig("/dev/null", format="png")
print(kilobytes("VmHWM") - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300_000


def test_masks_show_themselves():
    streaming = causal & (sink(4) | window(64))
    heads = per_head([causal, streaming])
    attend = compile_mask(heads, 300, 300)
    for shown in (streaming, heads, attend):
        page = shown._repr_html_()
        assert "<canvas" in page or "<img" in page
        assert "window(64)" in page.replace("&amp;", "&")
    assert attend.plot(title="mine")._repr_png_() == draw(attend, title="mine")._repr_png_()
