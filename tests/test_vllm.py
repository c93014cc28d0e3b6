"""The example of vLLM, where vLLM is installed: it needs an environment of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "vllm_serving.py"

# found, not imported: vLLM changes settings of torch
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm"),
]


@pytest.mark.parametrize("page", [16, 64])
def test_vllm_answers_as_under_dense_masks(page):
    command = [sys.executable, EXAMPLE, "--page", str(page), "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"12 new ones: (\d+) .* (\d+) from the cache; (\d+) without", done.stdout)
    assert [pair[:2] for pair in counts] == 5 * [("12", "12")]
    assert sum(int(without) for *_, without in counts) < 20  # the plan matters
    assert "layer 1, heads 0-3: 100% of the pages" in done.stdout
