import importlib.util
import re
from pathlib import Path

import pytest
import torch

import flexsparse
import flexsparse.masks as library
from flexsparse import Mask

SCRIPT = Path(__file__).parents[1] / "docs" / "make_systems.py"


def script():
    spec = importlib.util.spec_from_file_location("make_systems", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_systems_is_up_to_date():
    made = script()
    assert made.PAGE.read_text() == made.page(), "run python docs/make_systems.py"


def test_the_page_names_only_patterns_that_exist():
    expressions = {"lookup", "equals"}
    for system in script().SYSTEMS:
        code = " ".join(re.findall(r"`([^`]*)`", system.here + system.note))
        named = set(re.findall(r"(\w+)\(", code)) | set(re.findall(r"`(\w+)`", system.here))
        assert named <= {*library.__all__, *expressions}, system.name


def test_what_is_not_a_mask_has_a_reason():
    made = script()
    assert all(system.note for system in made.SYSTEMS if system.kind == made.NOT)
    assert all(system.here for system in made.SYSTEMS if system.kind != made.NOT)


def test_every_pattern_says_where_it_is_from():
    # these are common to all; every other pattern names a paper or a system
    common = {"full", "causal", "padding"}
    assert [n for n in library.__all__ if n not in common and not script().source(n)] == []


PLACES = torch.arange(64)
TABLE = torch.eye(64, dtype=torch.bool)
EXAMPLES = {
    **dict.fromkeys(
        ["size", "block_size", "tile", "rows", "columns", "w", "rate", "left", "right"], 4
    ),
    **dict.fromkeys(["start", "seq_len", "context_len"], 16),
    **dict.fromkeys(["bits", "pages", "blocks"], PLACES < 9),
    **dict.fromkeys(["ids", "image", "ends", "rank_u", "rank_tau", "vertical", "slash"], PLACES),
    **dict.fromkeys(["original", "q_cluster", "kv_cluster"], PLACES[None]),
    "dropped": PLACES[None] + 9,
    "end": 20,
    "attn_mask": TABLE,
    "table": TABLE,
}


def expressions():
    """The rows' expressions that are more than a name, each with its system."""
    for system in script().SYSTEMS:
        for code in re.findall(r"`([^`]*)`", system.here):
            if re.search(r"\W", code) and code != "score_mod=":
                yield pytest.param(system.name, code, id=f"{system.name}: {code}")


@pytest.mark.parametrize(("system", "code"), list(expressions()))
def test_every_expression_of_the_page_is_a_mask(system, code):
    examples = dict(EXAMPLES)
    if system.startswith("Flamingo"):
        examples |= {"start": PLACES, "end": PLACES + 9}
    if system == "Sparse VideoGen 2":
        examples["table"] = TABLE[None]
    mask = eval(code, {**vars(flexsparse), **vars(library), **examples})
    assert isinstance(mask, Mask)
    assert mask(torch.tensor(0), torch.tensor(0), PLACES[:40, None], PLACES[:44]).any()
