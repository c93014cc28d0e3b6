"""The notebooks run, the committed ones are those scripts with their outputs, and hold pictures."""

import base64
import json
import re
import runpy
from pathlib import Path

import pytest

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


def test_the_readme_example_runs(capsys):
    readme = (ROOT / "README.md").read_text()
    examples = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    assert len(examples) == 2
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    report = readme.split("```\nCompiledMask")[1].split("...\n```")[0]
    assert f"CompiledMask{report}" in capsys.readouterr().out
