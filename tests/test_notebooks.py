"""The notebooks run, the committed ones are those scripts with their outputs, and hold pictures."""

import base64
import json
import re
import runpy
from pathlib import Path

import pytest

import flexsparse as fs
from flexsparse.analysis import classify, settle
from flexsparse.masks import causal, sink, window

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
PNG = b"\x89PNG\r\n\x1a\n"


def cells(script):
    """The cells of a percent script, as (kind, text)."""
    found = []
    for part in re.split(r"^# %%", script.read_text(), flags=re.MULTILINE)[1:]:
        kind, text = (
            ("markdown", part.split("\n", 1)[1])
            if part.startswith(" [markdown]")
            else ("code", part.split("\n", 1)[1])
        )
        if kind == "markdown":
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        found.append((kind, text.strip()))
    return found


def pictures(notebook):
    """The PNGs among the outputs of a notebook."""
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return [
        base64.b64decode(o["data"]["image/png"])
        for o in outputs
        if "image/png" in o.get("data", {})
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_notebook_runs(script, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runpy.run_path(str(script))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_committed_notebook_is_the_script_with_its_pictures(script):
    """Made again by `make notebooks`."""
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    stored = [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]
    assert stored == cells(script)
    found = pictures(notebook)
    assert found
    assert all(png.startswith(PNG) and len(png) > 2_000 for png in found)
    assert not [
        o
        for cell in notebook["cells"]
        for o in cell.get("outputs", [])
        if o["output_type"] == "error"
    ]
    assert script.with_suffix(".ipynb").stat().st_size < 2_000_000


def test_there_are_six_notebooks():
    assert [path.name[0] for path in SCRIPTS] == list("123456")


@pytest.mark.parametrize(("page", "n_examples"), [("README.md", 2), ("docs/how-it-works.md", 2)])
def test_the_examples_of_a_page_print_what_it_says(page, n_examples, capsys):
    text = (ROOT / page).read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == n_examples
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, page, "exec"), namespace)
    printed = capsys.readouterr().out
    outputs = re.findall(r"```\n([^`]+?)(?:\.\.\.\n)?```\n", text)
    assert outputs
    for output in outputs:
        assert output in printed


def test_how_it_works_counts_what_is_bounded_and_looked_at(monkeypatch):
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    counts = dict.fromkeys(["bound_cells", "bound_blocks", "_look"], 0)

    def count(module, name):
        function = getattr(module, name)

        def counting(mask, *args):
            cells = next(x for x in args if isinstance(x, list))
            counts[name] += len(cells[0])
            return function(mask, *args)

        monkeypatch.setattr(module, name, counting)

    count(classify, "bound_cells")
    count(classify, "bound_blocks")
    count(settle, "_look")
    fs.compile_mask(causal & (sink(300) | window(3000)), 16384, 16384)
    bounded = counts["bound_cells"] + counts["bound_blocks"]
    assert (
        f"Of 16,384 blocks here, {bounded:,} cells are bounded and {counts['_look'] or 'no'} "
        "blocks are looked at"
    ) in page
