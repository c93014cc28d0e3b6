"""What may import what, and what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flexsparse
from flexsparse import masks

ROOT = Path(__file__).parent.parent
CODE = sorted((ROOT / "flexsparse").rglob("*.py"))
# each module may import those of earlier rows, and of its own row where it says so
ORDER = [
    {"errors", "arguments", "default_device", "uncompiled"},
    {"tensors", "bits", "rectangles"},
    {"walks"},
    {"tree"},
    {"expr"},
    {"text", "heads", "pyramid", "naming", "sequences", "unify"},
    {"parser", "normal_form"},
    {"interval"},
    {"whole"},
    {"cells"},
    {"settle", "reached"},
    {"classify", "tracing"},
    {"validate", "blocks", "cost", "needed", "hints"},
    {"lower", "tabulated"},
    {"executors", "dropout"},
    {"packing"},
    {"launch"},
    {"modifiers"},
    {"grouping", "dispatch"},
    {"report", "inputs", "progress"},
    {"compiler"},
    {"drop_in", "cases", "gaps", "checks", "difference", "explanation"},
    {"drawing", "cu_seqlens"},
    {"varlen"},
    {"compat", "plan", "plan_json", "plan_files", "integrations"},
    {"benchmark", "fidelity", "search"},
    {"__init__", "commands"},
    {"__main__"},
]
# folders whose modules have places of their own in this order
STAGES = ("analysis", "packed", "questions")
# the pattern library is written in the compiler's public names, so these come after both
AFTER_MASKS = (
    "compat",
    "plan",
    "plan_json",
    "plan_files",
    "integrations",
    "fidelity",
    "benchmark",
    "search",
    "commands",
)


def imports(path: Path) -> set[str]:
    """Modules of flexsparse that a file imports when it is itself imported."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flexsparse":
            parts = (node.module or "").split(".")[1:]
            if not parts or parts[-1] in STAGES:
                found |= {alias.name for alias in node.names}
            else:
                found.add(parts[1] if parts[0] in STAGES else parts[0])
    return found


def module_of(path: Path) -> str:
    """The name by which ORDER knows a file."""
    parts = path.relative_to(ROOT / "flexsparse").with_suffix("").parts
    return parts[1] if parts[0] in STAGES else parts[0]


def rank(module: str) -> int:
    return next(i for i, row in enumerate(ORDER) if module in row)


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = module_of(path)
    for imported in imports(path) - set(flexsparse.__all__) - {"masks", "__version__"}:
        assert imported == module or rank(imported) <= rank(module), f"{module} imports {imported}"


def test_the_compiler_knows_no_pattern_by_name():
    for path in set(CODE) - {ROOT / "flexsparse/__init__.py"}:
        module = module_of(path)
        assert module in AFTER_MASKS or "masks" not in imports(path), path


@pytest.mark.parametrize("path", sorted((ROOT / "masks").glob("*.py")), ids=lambda p: p.name)
def test_patterns_are_written_in_public_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexsparse"):
            if node.module == "flexsparse":
                assert {alias.name for alias in node.names} <= set(flexsparse.__all__)
            else:
                assert node.module.startswith("flexsparse.masks")


@pytest.mark.parametrize("module", [flexsparse, masks])
def test_public_names_exist(module):
    assert sorted(module.__all__) == module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


def test_importing_needs_torch_alone():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'numpy', 'matplotlib', 'transformers', 'attn_gym', 'tqdm'}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import flexsparse
m = flexsparse.masks
print(flexsparse.compile_mask(m.causal & m.window(4), 300, 300))
assert 'triton' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CompiledMask" in done.stdout
