"""The notebook view in a real browser: what it paints, what it says, and how it moves."""

import io
import re

import browser
import pytest
import torch
from oracles import dense, dense_classes

from flexsparse import Mask, compile_mask, per_head
from flexsparse.analysis.cells import Grid
from flexsparse.drawing import html
from flexsparse.drawing.colours import DARK, LIGHT
from flexsparse.masks import block_sparse, causal, sink, window

STREAMING = causal & (sink(64) | window(256))
HEADS = per_head([causal] * 3 + [STREAMING] * 5)
LENGTH = 4096
GRID = Grid(LENGTH, LENGTH, 0, (128, 128), 1, (0,))
READY = "document.querySelector('.flexsparse')?.dataset.ready !== undefined"
PAGE = (
    "<!doctype html><html style='color-scheme: light dark'><meta charset=utf-8>"
    "<body>{}</body></html>"
)


@pytest.fixture(scope="module")
def chromium():
    path = browser.executable()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
    window = browser.Browser(path)
    yield window
    window.close()


@pytest.fixture(scope="module")
def page():
    return html(compile_mask(HEADS, LENGTH, LENGTH, device="cpu"))


@pytest.fixture
def view(chromium, page):
    """The notebook view of eight heads, as loaded."""
    show(chromium, page)
    return chromium


def show(chromium, page, scheme="light", frame=PAGE):
    chromium.send(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    chromium.load(frame.format(page))
    chromium.wait_for(READY)


def box(view, panel):
    """left, top, width, height of a canvas in the window."""
    script = f"document.querySelectorAll('canvas')[{panel}].getBoundingClientRect()"
    return view.run(f"(r => [r.x, r.y, r.width, r.height])({script})")


def at(view, panel, row, column, cells=32):
    """Where the middle of a cell of the whole grid lies in the window."""
    left, top, width, height = box(view, panel)
    return left + (column + 0.5) / cells * width, top + (row + 0.5) / cells * height


def hover(view, panel, row, column, cells=32):
    x, y = at(view, panel, row, column, cells)
    view.mouse("mouseMoved", x, y)
    return view.run("document.querySelector('.flexsparse-hover').textContent").splitlines()


def shown(view):
    """First and last of the queries and the keys that are in view."""
    view.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    text = view.run("document.querySelector('.flexsparse-shown').textContent")
    return [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", text)]


def painted(view, panel, rows, columns):
    """int[rows, columns, 3]: the colours in the middle of cells, as the canvas has them."""
    script = f"""(canvas => {{
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const colours = [];
        for (let r = 0; r < {rows}; r++) for (let c = 0; c < {columns}; c++) {{
            const y = Math.floor((r + 0.5) / {rows} * canvas.height);
            const x = Math.floor((c + 0.5) / {columns} * canvas.width);
            colours.push(...data.slice(4 * (y * canvas.width + x), 4 * (y * canvas.width + x) + 3));
        }}
        return colours;
    }})(document.querySelectorAll("canvas")[{panel}])"""
    return torch.tensor(view.run(script)).view(rows, columns, 3)


def states(image, colours):
    """int[rows, columns]: 0 EMPTY, 2 FULL, 1 any other colour."""
    empty, full = ((image == torch.tensor(x)).all(2) for x in (colours.empty, colours.full))
    return torch.where(empty, 0, torch.where(full, 2, 1))


def truth(mask: Mask, row, column):
    """The dense block of a mask."""
    block = dense(mask, GRID)[0, 0]
    return block[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]


@pytest.mark.parametrize(("panel", "mask"), list(enumerate([causal, STREAMING])))
def test_every_block_is_painted_as_the_dense_mask_has_it(view, panel, mask):
    classes = dense_classes(dense(mask, GRID)[0, 0], (128, 128))
    assert torch.equal(states(painted(view, panel, 32, 32), LIGHT), classes.long())


@pytest.mark.parametrize(
    ("panel", "mask", "row", "column"),
    [
        (0, causal, 17, 4),
        (0, causal, 4, 17),
        (0, causal, 9, 9),
        (1, STREAMING, 17, 0),
        (1, STREAMING, 17, 15),
        (1, STREAMING, 17, 16),
        (1, STREAMING, 17, 17),
        (1, STREAMING, 17, 5),
        (1, STREAMING, 31, 31),
    ],
)
def test_hover_names_the_heads_the_block_and_what_it_is(view, panel, mask, row, column):
    block = truth(mask, row, column)
    part = float(block.double().mean())
    state = "full" if part == 1 else f"partial, {round(part * 100)} %" if part else "empty"
    heads = "heads 0-2" if panel == 0 else "heads 3-7"
    q, kv = row * 128, column * 128
    assert hover(view, panel, row, column) == [
        f"{heads}, q block {row}, kv block {column}: {state}",
        f"queries {q:,}-{q + 127:,}, keys {kv:,}-{kv + 127:,}",
    ]


def test_hover_vanishes_with_the_pointer(view):
    hover(view, 0, 3, 3)
    visible = "getComputedStyle(document.querySelector('.flexsparse-hover')).display"
    assert view.run(visible) == "block"
    view.mouse("mouseMoved", 2, 2)
    view.wait_for(f"{visible} === 'none'")


def test_the_wheel_zooms_around_the_pointer_and_a_double_click_shows_all(view):
    assert shown(view) == [0, 4095, 0, 4095]
    before = hover(view, 1, 20, 19)
    x, y = at(view, 1, 20, 19)
    for _ in range(4):
        view.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    view.wait_for("!document.querySelector('.flexsparse-shown').textContent.includes('4,095')")
    first_q, last_q, first_kv, last_kv = shown(view)
    assert last_q - first_q < 4096 / 3
    assert first_q <= 20 * 128 <= last_q
    assert first_kv <= 19 * 128 <= last_kv
    view.mouse("mouseMoved", x + 1, y)
    assert (
        view.run("document.querySelector('.flexsparse-hover').textContent").splitlines() == before
    )
    # all panels show the same part, each of its own mask
    assert not torch.equal(painted(view, 0, 9, 9), painted(view, 1, 9, 9))
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            view.mouse(kind, x, y, button="left", clickCount=count)
    assert shown(view) == [0, 4095, 0, 4095]


def test_dragging_moves_what_is_seen(view):
    x, y = at(view, 0, 16, 16)
    for _ in range(5):
        view.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    view.wait_for("!document.querySelector('.flexsparse-shown').textContent.includes('4,095')")
    before = shown(view)
    view.mouse("mousePressed", x, y, button="left", clickCount=1)
    view.mouse("mouseMoved", x + 60, y, button="left", buttons=1)
    view.mouse("mouseReleased", x + 60, y, button="left", clickCount=1)
    after = shown(view)
    assert after[2] < before[2]  # pulling the picture right shows keys further left
    assert after[0] == before[0]


def test_zooming_out_of_the_whole_leaves_the_page_to_scroll(view):
    script = """(canvas => canvas.dispatchEvent(new WheelEvent("wheel",
        {deltaY: SIGN * 100, cancelable: true, clientX: 50, clientY: 50})))"""
    on_canvas = f"{script}(document.querySelector('canvas'))"
    assert view.run(on_canvas.replace("SIGN", "1")) is True
    assert view.run(on_canvas.replace("SIGN", "-1")) is False  # it zoomed, and kept the page still


def test_the_picture_gives_way_to_the_canvas(view):
    assert view.run("document.querySelector('.flexsparse img').offsetHeight") == 0
    assert view.run("document.querySelector('canvas').offsetHeight") > 100


def test_where_scripts_and_styles_are_stripped_the_picture_stays(chromium, page):
    bare = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    chromium.load(PAGE.format(bare))
    chromium.wait_for("document.querySelector('img')?.complete")
    assert chromium.run("document.querySelector('img').naturalWidth") > 400
    assert chromium.run("document.querySelector('img').offsetHeight") > 100
    assert chromium.run("document.querySelector('canvas').offsetHeight") == 0
    assert chromium.run("document.querySelector('table').offsetHeight") > 20


def test_what_the_window_shows_is_not_blank(view):
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(view.screenshot())).convert("RGB")
    left, top, width, height = (round(x) for x in box(view, 0))
    part = image.crop((left, top, left + width, top + height))
    counts = {colour: n for n, colour in part.getcolors(1 << 20)}
    assert counts[LIGHT.full] / (width * height) == pytest.approx(496 / 1024, abs=0.02)
    assert counts[LIGHT.empty] / (width * height) == pytest.approx(496 / 1024, abs=0.02)


def contrast(view, element):
    """WCAG contrast of the text of an element to the ground of the page."""

    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    text = view.run(f"getComputedStyle(document.querySelector('{element}')).color")
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(view.screenshot())).convert("RGB")
    ground = str(image.getpixel((990, 5)))
    a, b = sorted((luminance(text), luminance(ground)))
    return (b + 0.05) / (a + 0.05)


JUPYTER_DARK = (
    "<!doctype html><meta charset=utf-8><body style='background: #111; color: #ddd'>{}</body>"
)


@pytest.mark.parametrize(
    ("scheme", "frame", "palette"),
    [("light", PAGE, LIGHT), ("dark", PAGE, DARK), ("light", JUPYTER_DARK, DARK)],
    ids=["light", "dark", "a dark notebook in a light browser"],
)
def test_it_is_readable_on_light_and_dark_pages(chromium, page, scheme, frame, palette):
    show(chromium, page, scheme, frame)
    classes = dense_classes(dense(STREAMING, GRID)[0, 0], (128, 128))
    assert torch.equal(states(painted(chromium, 1, 32, 32), palette), classes.long())
    for element in (".flexsparse td", ".flexsparse figcaption", ".flexsparse-shown"):
        assert contrast(chromium, element) > 7


def test_a_page_that_turns_dark_is_painted_again(view):
    view.send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    view.wait_for("document.querySelector('.flexsparse').dataset.dark === 'true'")
    assert tuple(painted(view, 0, 1, 4)[0, 3].tolist()) == DARK.empty


def test_two_views_on_one_page_are_both_alive(chromium, page):
    other = html(causal & window(4))
    show(chromium, page + other)
    chromium.wait_for("document.querySelectorAll('.flexsparse[data-ready]').length === 2")
    kept = dense(causal & window(4), Grid(64, 64, 0, (64, 64), 1, (0,)))[0, 0]
    assert torch.equal(states(painted(chromium, 2, 64, 64), LIGHT), kept.long() * 2)


def test_up_to_64_tokens_hover_names_query_and_key(chromium):
    show(chromium, html(compile_mask(causal & window(3), 6, 8, device="cpu")))
    for row, column, state in ((0, 0, "kept"), (0, 3, "masked"), (5, 4, "masked"), (5, 5, "kept")):
        left, top, width, height = box(chromium, 0)
        x, y = left + (column + 0.5) / 8 * width, top + (row + 0.5) / 6 * height
        chromium.mouse("mouseMoved", x, y)
        text = chromium.run("document.querySelector('.flexsparse-hover').textContent")
        # the last of 6 queries stands at the last of 8 keys
        assert text == f"all heads, query {row + 2}, key {column}: {state}"


def test_one_query_is_not_called_queries(chromium):
    show(chromium, html(compile_mask(causal & window(300), 400, 400, device="cpu").row(350)))
    text = chromium.run("document.querySelector('.flexsparse-shown').textContent")
    assert text == "Shown: query 350, keys 0-399"


def test_a_million_tokens_show_a_sink_of_one_block_and_zoom_to_it(chromium):
    show(chromium, html(compile_mask(STREAMING, 1 << 20, 1 << 20, device="cpu")))
    script = """(canvas => {
        const data = canvas.getContext("2d").getImageData(0, 0, 1, canvas.height).data;
        return [...Array(canvas.height).keys()].map(y => [...data.slice(4 * y, 4 * y + 3)].join());
    })(document.querySelector("canvas"))"""
    colours = set(chromium.run(script))
    assert ",".join(map(str, LIGHT.empty)) not in colours
    x, y = at(chromium, 0, 0, 0, cells=400)
    for _ in range(40):
        chromium.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    chromium.wait_for(
        "!document.querySelector('.flexsparse-shown').textContent.includes('1,048,575')"
    )
    assert shown(chromium)[1] < 8 * 128
    chromium.mouse("mouseMoved", x + 1, y)
    text = chromium.run("document.querySelector('.flexsparse-hover').textContent")
    assert text.startswith("all heads, q block 0, kv block 0: partial, 50 %\n")


def test_a_pooled_grid_names_ranges_of_blocks(chromium):
    torch.manual_seed(0)
    table = torch.rand(1024, 1024) < 0.3
    show(chromium, html(compile_mask(block_sparse(table, 16), 16384, 16384, block_size=16)))
    assert "Each cell pools" in chromium.run("document.body.textContent")
    x, y = at(chromium, 0, 0, 0, cells=1024)
    chromium.mouse("mouseMoved", x, y)
    text = chromium.run("document.querySelector('.flexsparse-hover').textContent")
    assert re.match(r"all heads, q blocks 0-\d+, kv blocks 0-\d+: partial, \d+ %", text)
