import importlib.util
import re
from pathlib import Path

import flexsparse.masks as library

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
