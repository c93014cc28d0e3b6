"""Launches -> output: which executor runs which heads of q, k and v, and how they come together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse.errors import ExecutorError, MaskError
from flexsparse.executors import blockwise, flash, flex, gather, reference, sdpa, streaming
from flexsparse.launch import Launch, refuse_unknown
from flexsparse.modifiers import Modifiers, no_score_mod

DENSE = 'executor="reference" can, and computes every pair of query and key.'


def attend(
    launches: Sequence[Launch],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modifiers: Modifiers,
    executor: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Run each launch on the executor asked for, or on the first that can.

    Under autocast, inputs and out are of its dtype, as they are in torch's own attention.

    sdpa runs full and causal heads, flash bands, streaming sinks with windows, gather one query on
    CPU, flex any mask.
    blockwise is plain PyTorch: slower than flex, it runs everywhere and has gradients, dropout and
    the LSE also on CPU. reference is dense, and runs only when it is asked for.

    Returns:
        out [B, n_heads, q_len, Dv], and the LSE [B, n_heads, q_len] or None.
    """
    modifiers = modifiers.checked()
    refuse_unknown(executor)
    if not q.shape[0]:
        return _of_no_rows(q, k, v)
    if is_cast_by_autocast(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(q.device.type, enabled=False):
            return attend(launches, q, k, v, modifiers, executor)
    if modifiers.score_mod is None or torch.compiler.is_compiling():
        return _run_all(launches, q, k, v, modifiers, executor)
    try:
        return _run_all(launches, q, k, v, modifiers, executor)
    except Exception as error:
        # only now, because to try a score_mod takes as long as a small call
        reason = no_score_mod(modifiers.score_mod, q)
        if reason is None:
            raise
        raise MaskError(reason) from error


def is_cast_by_autocast(x: Tensor) -> bool:
    """Whether autocast is on and casts such a tensor, as it does before torch's own attention."""
    # it leaves float64 as it is, and knows nothing of some devices
    if x.dtype == torch.float64 or not x.is_floating_point() or x.is_meta:
        return False
    # a device takes as long to say its type as all else here
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def _run_all(
    launches: Sequence[Launch],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modifiers: Modifiers,
    executor: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Run the launches, each in parts, and put their heads in order."""
    every_head = tuple(range(q.shape[1]))
    if len(launches) == 1:
        return _run(launches[0], every_head, q, k, v, modifiers, executor)
    parts = [
        (launch, *part) for launch in launches for part in _parts(launch, q.shape[1], k.shape[1])
    ]
    taken = zip(
        _of_parts(q, [heads for _, heads, _ in parts]),
        _of_parts(k, [kv_heads for _, _, kv_heads in parts]),
        _of_parts(v, [kv_heads for _, _, kv_heads in parts]),
        strict=True,
    )
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    order: list[int] = []
    for (launch, heads, _), qkv in zip(parts, taken, strict=True):
        out, lse = _run(launch, heads, *qkv, modifiers.of_heads(heads, q.device), executor)
        outs.append(out)
        if modifiers.return_lse:
            assert lse is not None
            lses.append(lse)
        order.extend(heads)
    return _in_head_order(outs, order), _in_head_order(lses, order) if lses else None


def _of_no_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of a batch of 0, which no kernel is made for, with its gradients."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT
    return scores @ v, scores.sum(-1).float()


def _parts(
    launch: Launch, n_heads: int, n_kv_heads: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The heads in parts that grouped-query attention can run: (heads, kv heads) each.

    A part reads each of its kv heads equally often, so that k and v are not repeated.
    """
    group_size = n_heads // n_kv_heads
    of_kv: dict[int, list[int]] = {}
    for head in launch.heads:
        of_kv.setdefault(head // group_size, []).append(head)
    by_count: dict[int, list[int]] = {}
    for kv_head, its_heads in of_kv.items():
        by_count.setdefault(len(its_heads), []).append(kv_head)
    parts = [
        (tuple(head for kv in kv_heads for head in of_kv[kv]), tuple(kv_heads))
        for kv_heads in by_count.values()
    ]
    # lists cannot be written inside another compiler's graph; there k and v are repeated instead
    if torch.compiler.is_compiling() and not all(launch.is_prepared(heads) for heads, _ in parts):
        return [(launch.heads, tuple(head // group_size for head in launch.heads))]
    return parts


def _run(
    launch: Launch,
    heads: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modifiers: Modifiers,
    executor: str | None,
) -> tuple[Tensor, Tensor | None]:
    """Run some heads of a launch: q holds these heads alone, k and v what they read."""
    scale, score_mod, dropout, return_lse = modifiers
    name = _choose(launch, q, k, v, modifiers, executor)
    if name in ("sdpa", "flash", "gather") and scale is not None and scale <= 0:
        # torch's kernels hide a key by a score of -inf, or take the largest, before they scale
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if name == "sdpa":
        return sdpa.run(q, k, v, launch.mask, launch.grid, scale=scale)
    if name == "flash":
        assert launch.band is not None
        return flash.run(q, k, v, launch.band, scale=scale)
    if name == "streaming":
        assert launch.streams is not None
        return streaming.run(
            q,
            k,
            v,
            *launch.sinks_and_windows(heads),
            launch.positions,
            scale=scale,
            max_sink=max(sink for sink, _ in launch.streams),
        )
    if name == "gather":
        return gather.run(q, k, v, launch.keys_seen, scale=scale)
    options: dict[str, Any] = {"scale": scale, "score_mod": score_mod, "dropout": dropout}
    if name == "reference":
        return reference.run(q, k, v, launch.mask_mod(heads), **options)
    block_mask, _, hints = launch.lists(heads)
    if name == "flex":
        options["kernel_options"] = hints
        return flex.run(q, k, v, block_mask, return_lse=return_lse, **options)
    return blockwise.run(q, k, v, block_mask, return_lse=return_lse, **options)


def _choose(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, modifiers: Modifiers, executor: str | None
) -> str:
    found = launch.executors(
        q,
        k,
        v,
        score_mod=modifiers.score_mod,
        dropout=modifiers.dropout,
        return_lse=modifiers.return_lse,
    )
    reasons = {}
    for name, reason in found:
        if reason is None and (name == executor if executor else name != "reference"):
            return name
        reasons[name] = reason
    if executor is None:
        raise ExecutorError(
            f"No executor that skips blocks can run this call: {reasons['blockwise']}. {DENSE}"
        )
    chosen = next(name for name, reason in reasons.items() if reason is None)
    fix = f"Drop executor= to let flexsparse choose (it would choose {chosen})."
    raise ExecutorError(
        f"executor={executor!r} cannot run this call: {reasons[executor]}. "
        f"{DENSE if chosen == 'reference' else fix}"
    )


def _of_parts(x: Tensor, parts: Sequence[Sequence[int]]) -> Iterable[Tensor]:
    """The heads of each part, of x; copies are made when their turn comes."""
    if [head for heads in parts for head in heads] == list(range(x.shape[1])):
        # its backward is one cat, where each of many views makes a gradient as large as x
        return torch.split(x, [len(heads) for heads in parts], 1)
    return (_take_heads(x, heads) for heads in parts)


def _take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """x[:, heads]: a view where the heads are consecutive, else a copy."""
    first, n = heads[0], len(heads)
    if tuple(heads) == tuple(range(first, first + n)):
        return x if n == x.shape[1] else x.narrow(1, first, n)
    return x[:, list(heads)]


def _in_head_order(results: Sequence[Tensor], heads: Sequence[int]) -> Tensor:
    """Concatenate the results of the parts and put head i back at place i."""
    joined = torch.cat(list(results), 1)
    if list(heads) == sorted(heads):
        return joined
    places = torch.tensor(heads, device=joined.device).argsort()
    return joined.index_select(1, places)
