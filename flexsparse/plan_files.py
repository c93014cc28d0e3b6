"""Plans from the files that other systems publish, each a function of the path of one."""

from __future__ import annotations

import inspect
import math
from os import PathLike
from pathlib import Path
from typing import Any

from flexsparse.errors import MaskError
from flexsparse.masks import a_shape, duo_attention, phi3_small
from flexsparse.plan import Head, SparsePlan
from flexsparse.plan_json import load_json, refuse

# what MInference gives a head that its file does not name
VERTICAL_AND_SLASH = ("vertical_and_slash", 1000, 6096)


def from_duo_attention(
    path: str | PathLike[str],
    group_size: int,
    *,
    threshold: float = 0.5,
    sparsity: float | None = None,
    sink_size: int | None = None,
    recent_size: int | None = None,
) -> SparsePlan:
    """DuoAttention's `full_attention_heads.tsv`: retrieval heads are causal, the others stream.

    Streaming heads are as in decoding: the first sink_size keys and recent_size before the query.

    Args:
        path: the file, or its folder; a row is a layer and a column a *kv* head, of 0 to 1.
        group_size: query heads of a kv head: num_attention_heads / num_key_value_heads.
        threshold: heads of at least this value are retrieval heads.
        sparsity: instead, the share of all heads that stream, those of the lowest values; of equal
            values the first (the released code draws lots).
        sink_size: first keys, in tokens; by default the config.json beside the file says, or 64.
        recent_size: latest keys, in tokens; by default the config.json says, or 256.

    Source: DuoAttention (arXiv 2410.10819), load_attn_pattern and sparsify_attention_heads.
    """
    path = Path(path)
    path = path / "full_attention_heads.tsv" if path.is_dir() else path
    rows = _numbers(path)
    beside = path.with_name("config.json")
    config = _object(beside) if beside.exists() else {}
    sizes = (
        config.get("sink_size", 64) if sink_size is None else sink_size,
        config.get("recent_size", 256) if recent_size is None else recent_size,
    )
    if sparsity is not None:
        rows = _streaming_share(rows, sparsity)
    return SparsePlan(
        [duo_attention(row, *sizes, group_size=group_size, threshold=threshold) for row in rows]
    )


def from_moa(path: str | PathLike[str]) -> SparsePlan:
    """MoA's alpha and beta of each head: a sink, and a window that grows with the length.

    The masks are those of the prefill, at every step: a sink of a block of 64, and the latest
    blocks, which with the sink are alpha + beta * keys tokens, 128 or more. The keys are those that
    there are; for MoA's spans, of a prompt and what follows, take plan.at(seq_len + max_new_token).

    Args:
        path: of `moa_alpha_beta.json`: {"alphas": [layer][head], "betas": [layer][head]}.

    Source: MoA (arXiv 2406.14909), moa_config_to_cache_config.
    """
    spans = _object(path)
    alphas, betas = (_table(path, spans, key) for key in ("alphas", "betas"))
    if [len(row) for row in alphas] != [len(row) for row in betas]:
        refuse(path, '"alphas" and "betas" must have the same layers and heads')
    return SparsePlan(
        [
            [
                f"block_streaming(1, span({_decimal(alpha - 64)}, {_decimal(beta)}, 64), 64)"
                for alpha, beta in zip(*rows, strict=True)
            ]
            for rows in zip(alphas, betas, strict=True)
        ]
    )


def from_minference(
    path: str | PathLike[str], n_heads: int, *, estimated: str | None = None
) -> SparsePlan:
    """MInference's best pattern of each head, as far as it is known before the text is.

    A "stream_llm" head is exact, an A-shape. The others pick their keys when they see the text,
    which no plan can: what they shall be instead must be said.

    Args:
        path: of the .json: a list with an object for each layer, {head: [type, size, size, score]}.
        n_heads: query heads of the model.
        estimated: what heads that pick keys at run time become: "a_shape", which spends the same
            two budgets on the first and the latest keys, or "model", as the model has them.

    Source: MInference (arXiv 2407.02490), its configs and minference_forward.
    """
    layers = load_json(path)
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        refuse(path, "it must be a list with an object for each layer")
    for i, layer in enumerate(layers):
        for head in layer.keys() - {str(h) for h in range(n_heads)}:
            refuse(path, f"head {head!r} of layer {i} does not exist; n_heads is {n_heads}")
    return SparsePlan(
        [
            [
                _minference_head(path, layer.get(str(h), VERTICAL_AND_SLASH), estimated)
                for h in range(n_heads)
            ]
            for layer in layers
        ]
    )


def _minference_head(path: str | PathLike[str], record: Any, estimated: str | None) -> Head:
    if not isinstance(record, list | tuple) or len(record) < 3 or not isinstance(record[0], str):
        refuse(path, f"a head is {record!r} and must be [type, size, size, score]")
    # flex types give [share of the attention, most keys]
    first, latest = (size[-1] if isinstance(size, list) and size else size for size in record[1:3])
    if record[0] == "stream_llm" or estimated == "a_shape":
        return a_shape(first, latest)
    if estimated == "model":
        return None
    raise MaskError(
        f"from_minference(estimated={estimated!r}): {str(path)!r} has heads of type {record[0]!r}, "
        'which pick their keys at run time. Say what they become: estimated="a_shape" spends their '
        'budgets on the first and the latest keys, estimated="model" leaves them as they are.'
    )


def from_phi3_small(path: str | PathLike[str]) -> SparsePlan:
    """Phi-3-small's pattern, from the blocksparse_ arguments in the config.json of its model.

    Args:
        path: of the config.json, or its folder.

    Source: Phi-3-small (arXiv 2404.14219), its configuration.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    config = _object(path)
    names = [*inspect.signature(phi3_small).parameters][1:]
    missing = [name for name in ("num_hidden_layers", *names) if name not in config]
    if missing:
        refuse(path, f"it has no {missing[0]}, as the config of a Phi-3-small has")
    n_layers = config["num_hidden_layers"]
    if not isinstance(n_layers, int):
        refuse(path, f"num_hidden_layers is {n_layers!r} and must be an int")
    arguments = {name: config[name] for name in names}
    return SparsePlan([phi3_small(i, **arguments) for i in range(n_layers)])


def _numbers(path: Path) -> list[list[float]]:
    """The rows of a table of numbers of 0 to 1, separated by tabs."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        refuse(path, str(error))
    rows = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = [float(cell) for cell in line.split("\t")]
        except ValueError:
            row = [math.nan]
        if any(map(math.isnan, row)):
            refuse(path, f"line {i + 1} must be numbers separated by tabs")
        rows.append([min(max(value, 0.0), 1.0) for value in row])
        if len(rows[-1]) != len(rows[0]):
            refuse(path, f"line {i + 1} has {len(rows[-1])} numbers and line 1 {len(rows[0])}")
    if not rows:
        refuse(path, "it is empty")
    return rows


def _streaming_share(rows: list[list[float]], sparsity: float) -> list[list[float]]:
    """0 for the heads of the lowest values, as many as lie below the quantile, and 1 for others."""
    flat = [value for row in rows for value in row]
    n = len(flat) if sparsity >= 1 else math.ceil(max(sparsity, 0) * (len(flat) - 1))
    lowest = set(sorted(range(len(flat)), key=flat.__getitem__)[:n])
    width = len(rows[0])
    return [
        [float(layer * width + head not in lowest) for head in range(width)]
        for layer in range(len(rows))
    ]


def _object(path: str | PathLike[str]) -> dict[str, Any]:
    found = load_json(path)
    if not isinstance(found, dict):
        refuse(path, f"it is {type(found).__name__} and must be an object")
    return found


def _table(path: str | PathLike[str], found: dict[str, Any], key: str) -> list[list[float]]:
    rows = found.get(key)
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and row and all(isinstance(x, int | float) for x in row)
        for row in rows
    ):
        refuse(path, f'"{key}" must be a list of numbers for each layer')
    return rows


def _decimal(value: float) -> str:
    return f"{value:.9f}".rstrip("0").rstrip(".")
