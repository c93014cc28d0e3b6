"""Draw docs/pictures/*.png, the pictures of the README and the docs.

python docs/make_pictures.py          # needs matplotlib: pip install -e '.[viz]'
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from flexsparse import Mask, PerHead, per_head
from flexsparse.analysis.cells import SPLIT, Grid, all_cells, bound_cells, interval_reading, split
from flexsparse.drawing import draw
from flexsparse.drawing.colours import LIGHT, css
from flexsparse.drawing.figure import paint_panel
from flexsparse.drawing.frame import Frame, Sides
from flexsparse.drawing.legend import draw_key, state_keys
from flexsparse.drawing.page import MARGIN, Layout, Tile, page
from flexsparse.drawing.panels import Panel, panels
from flexsparse.drawing.paper import QUIET, Sheet, small_png
from flexsparse.drawing.planes import Lengths, planes
from flexsparse.drawing.words import percent
from flexsparse.fidelity import Point, draw_perplexity
from flexsparse.masks import (
    bigbird,
    block_diffusion,
    causal,
    dilated,
    local_stride,
    longformer,
    neighborhood,
    packed,
    same_document,
    shared_prefix,
    sink,
    sliding_tile,
    sparse_transformer_strided,
    tri_shape,
    vertical_slash,
    window,
)

PICTURES = Path(__file__).with_name("pictures")
REAL_MODEL = Path(__file__).parents[1] / "benchmarks" / "results" / "real_model.json"
TOKENS, BLOCK = 1024, 16
DOCUMENTS = torch.tensor([0, 700, 3200, 3900, 8000, 11500, 12100, 16384])


def mixed_heads() -> PerHead:
    """A mask for each of 32 heads, of four kinds, at 16,384 tokens."""
    ids = torch.repeat_interleave(torch.arange(len(DOCUMENTS) - 1), DOCUMENTS.diff())
    inside = causal & same_document(ids)
    far = causal & (window(1024) | dilated(16384, 512))
    return per_head(
        [causal] * 8
        + [(causal & (sink(64) | window(1024))).named("causal & (sink(64) | window(1024))")] * 16
        + [inside.named("causal & same_document(ids)")] * 4
        + [far.named("causal & (window(1024) | dilated(16384, 512))")] * 4
    )


def patterns() -> dict[str, tuple[str, Mask]]:
    """A dozen published patterns at 1,024 tokens, by the name of the system."""
    generator = torch.Generator().manual_seed(7)
    columns = torch.randperm(TOKENS, generator=generator)[:10]
    slashes = torch.cat([torch.arange(24), torch.randperm(900, generator=generator)[:6] + 40])
    random_blocks = torch.randint(0, 16, (16, 2), generator=generator)
    ends = torch.tensor([0, 180, 420, 520, 860, 1024])
    return {
        "StreamingLLM": ("causal & (sink(32) | window(128))", causal & (sink(32) | window(128))),
        "Longformer": ("longformer(128, 24)", longformer(128, 24)),
        "BigBird": ("bigbird(16, 64, 3, random)", bigbird(16, 64, 3, random_blocks)),
        "Sparse Transformer, strided": (
            "sparse_transformer_strided(64)",
            sparse_transformer_strided(64),
        ),
        "S2-Attention, one head": ("local_stride(4, 8, 16)", local_stride(4, 8, 16)),
        "MInference: vertical-slash": ("vertical_slash(v, s)", vertical_slash(columns, slashes)),
        "Tri-shape": ("tri_shape(1024, 64, 160, 128)", tri_shape(TOKENS, 64, 160, 128)),
        "Packed documents": ("packed(cu_seqlens)", packed(ends)),
        "Rollouts that branch": (
            "shared_prefix(cu_seqlens, prefix_of)",
            shared_prefix(ends, [0, 0, 1, 1, 0]),
        ),
        "Block diffusion": ("block_diffusion(512, 64)", block_diffusion(512, 64)),
        "NATTEN, 32 x 32 image": ("neighborhood((32, 32), 9)", neighborhood((32, 32), 9)),
        "Sliding Tile, 4 x 16 x 16 video": (
            "sliding_tile(...)",
            sliding_tile((4, 16, 16), (2, 8, 8), (2, 4, 4)),
        ),
    }


def gallery() -> bytes:
    """The page of published patterns."""
    layout = Layout.of(12)
    tiles = []
    for name, (text, mask) in patterns().items():
        (panel,) = panels(
            planes("draw", mask, Lengths(TOKENS, block_size=BLOCK)), layout.pools
        ).shown
        blocks, elements = percent(panel.block_density), percent(panel.element_density)
        counts = f"{blocks} of blocks, {elements} of elements"
        tiles.append(Tile(name, f"{text}\n{counts}", functools.partial(_paint, panel)))
    title = f"A dozen published patterns, {TOKENS:,} tokens in blocks of {BLOCK} × {BLOCK}"
    sheet, below = page(title, tiles, layout, panel.grid, foot=0.55)
    draw_key(sheet, state_keys(elements=False), MARGIN, below + 0.1)
    return small_png(sheet.figure)


def _paint(panel: Panel, frame: Frame, sides: Sides) -> None:
    paint_panel(frame, panel, sides)


def real_model() -> bytes:
    """Perplexity against density of the plans and uniform masks in docs/real-models.md."""
    measured = json.loads(REAL_MODEL.read_text())["heldout"]
    points = [
        Point(name, measured["density"][name], value, name.startswith("plan"))
        for name, value in measured["perplexity"].items()
        if name not in ("window(128)", "sink(4) | window(128)")  # far above the others
    ]
    title = "7 x 2,048 tokens of Python's manual that no search has seen"
    return small_png(draw_perplexity(points[1:], points[0], title))


def refinement() -> bytes:
    """What bounds prove of causal & (sink(300) | window(3000)) in cells of 16, 4 and 1 blocks."""
    mask = causal & (sink(300) | window(3000))
    grid = Grid(16384, 16384, 0, (128, 128), 1, (0,))
    reading = interval_reading(mask, grid)
    inches, gap, top = 3.0, 0.3, 0.95
    sheet = Sheet(3 * inches + 4 * gap, inches + top + 0.2)
    sheet.text(gap, 0.15, "causal & (sink(300) | window(3000)), 16,384 x 16,384", weight="bold")
    # cells that a panel before has decided keep their colours
    decided: list[tuple[float, float, float, str]] = []
    side = SPLIT**2
    cells = all_cells(grid, side)
    for place in range(3):
        always, ever = bound_cells(mask, reading, grid, cells, side)
        left, size = gap + place * (inches + gap), inches * side / grid.columns
        colours = [
            css(LIGHT.full if full else LIGHT.partial if some else LIGHT.empty)
            for full, some in zip(always.tolist(), ever.tolist(), strict=True)
        ]
        ends = zip(*(x.tolist() for x in cells[1:]), colours, strict=True)
        decided += [(row * size, column * size, size, colour) for row, column, colour in ends]
        for y, x, width, colour in decided:
            style = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.3}
            sheet.rectangle(left + x, top + y, width, width, **style)
        full, empty = int(always.sum()), int((~ever).sum())
        blocks = f"{side} x {side} blocks" if side > 1 else "one block"
        sheet.text(left, 0.45, f"{len(always):,} cells of {blocks}: {full} full, {empty} empty")
        rest = f"{len(always) - full - empty} are "
        rest += "split 4 x 4" if side > 1 else "partial: each keeps some pairs and hides some"
        sheet.text(left, 0.65, rest, color=QUIET)
        cells = [x[ever & ~always] for x in cells]
        if side > 1:
            side //= SPLIT
            cells = split(grid, cells, side)
    return small_png(sheet.figure)


def main() -> None:
    """Draw them."""
    PICTURES.mkdir(exist_ok=True)
    title = "32 heads, each with its own mask, at 16,384 tokens"
    mixed = small_png(draw(mixed_heads(), 16384, title=title))
    images = {
        "per_head.png": mixed,
        "patterns.png": gallery(),
        "perplexity.png": real_model(),
        "refinement.png": refinement(),
    }
    for name, image in images.items():
        (PICTURES / name).write_bytes(image)
        print(f"{PICTURES / name}: {len(image):,} bytes")


if __name__ == "__main__":
    main()
