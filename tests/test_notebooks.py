import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs_and_draws(path, capsys):
    runpy.run_path(str(path))
    printed = capsys.readouterr().out
    assert "of all blocks" in printed  # a report
    assert "█ full" in printed  # a picture of blocks
    assert "█ kept" in printed  # a picture of elements


def test_the_readme_example_runs(capsys):
    readme = (ROOT / "README.md").read_text()
    examples = [part.split("```")[0] for part in readme.split("```python\n")[1:]]
    assert len(examples) == 2
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    report = readme.split("```\nCompiledMask")[1].split("...\n```")[0]
    assert f"CompiledMask{report}" in capsys.readouterr().out
