"""Plans as JSON: layers and heads by their numbers, equal ones together, masks as text.

    {
      "flexsparse_plan": 1,
      "n_layers": 18,
      "n_heads": 4,
      "layers": {
        "5": {"0-2": "causal & (sink(4) | window(256))"},
        "11, 17": {"0-3": "causal & window(512)"}
      }
    }

Layers and heads that are not named stay as the model has them.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flexsparse.errors import MaskError
from flexsparse.heads import ranges

VERSION = 1
LARGEST = 1 << 16  # layers or heads; more is a mistake, and would only fill the memory

Entry = TypeVar("Entry", bound=Hashable)


def write(path: str | PathLike[str], layers: Sequence[tuple[str | None, ...] | None]) -> None:
    """Write the text of each head's mask, or None, for each layer."""
    named = {
        ranges(of_layer): {ranges(hs): text for text, hs in grouped(layer).items() if text}
        for layer, of_layer in grouped(layers).items()
        if layer
    }
    plan = {
        "flexsparse_plan": VERSION,
        "n_layers": len(layers),
        "n_heads": next((len(layer) for layer in layers if layer), None),
        "layers": named,
    }
    Path(path).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")


def read(path: str | PathLike[str]) -> list[list[str | None] | None]:
    """The texts that `write` wrote."""
    plan = load_json(path)
    if not isinstance(plan, dict) or plan.get("flexsparse_plan") != VERSION:
        found = plan.get("flexsparse_plan") if isinstance(plan, dict) else type(plan).__name__
        refuse(path, f'"flexsparse_plan" is {found!r} and must be {VERSION}')
    named = plan.get("layers")
    if not isinstance(named, dict):
        refuse(path, f'"layers" is {type(named).__name__} and must be an object')
    n_layers = _count(path, plan, "n_layers")
    n_heads = _count(path, plan, "n_heads") if named else 0
    layers: list[list[str | None] | None] = [None for _ in range(n_layers)]
    for i, heads in _each(path, named, n_layers, "layer"):
        if not isinstance(heads, dict):
            refuse(path, f"layer {i} is {type(heads).__name__} and must be an object")
        layer: list[str | None] = [None for _ in range(n_heads)]
        layers[i] = layer
        for h, text in _each(path, heads, n_heads, f"layer {i}, head"):
            if not isinstance(text, str | None):
                refuse(path, f"layer {i}, head {h} is {text!r} and must be the text of a mask")
            layer[h] = text
    return layers


def load_json(path: str | PathLike[str]) -> Any:
    """What a JSON file holds, or one sentence on why it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        refuse(path, error.strerror or str(error))
    except (ValueError, RecursionError) as error:
        refuse(path, f"it is no JSON: {error}")


def refuse(path: str | PathLike[str], reason: str) -> NoReturn:
    """Raise the error of a file that holds no plan."""
    raise MaskError(f"Cannot read a plan from {str(path)!r}: {reason}.")


def grouped(entries: Iterable[Entry]) -> dict[Entry, list[int]]:
    """The places of each distinct entry, in the order in which they first occur."""
    places: dict[Entry, list[int]] = {}
    for i, entry in enumerate(entries):
        places.setdefault(entry, []).append(i)
    return places


def _count(path: str | PathLike[str], plan: dict[str, Any], key: str) -> int:
    n = plan.get(key)
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= LARGEST:
        refuse(path, f'"{key}" is {n!r} and must be an int of 1 to {LARGEST}')
    return n


def _each(
    path: str | PathLike[str], named: dict[str, Any], count: int, what: str
) -> Iterator[tuple[int, Any]]:
    """Each number that the keys name, once, with the key's value."""
    seen: set[int] = set()
    for key, value in named.items():
        for part in key.split(","):
            ends = [end.strip() for end in part.split("-")]
            if len(ends) > 2 or not all(end.isdecimal() for end in ends):
                refuse(path, f"{what} {key!r} must be numbers such as '0-3, 7'")
            first, last = int(ends[0]), int(ends[-1])
            if not first <= last < count:
                refuse(path, f"{what} {key!r} does not exist; there are 0 to {count - 1}")
            for number in range(first, last + 1):
                if number in seen:
                    refuse(path, f"{what} {number} stands there twice")
                seen.add(number)
                yield number, value
