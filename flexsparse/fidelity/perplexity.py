"""Perplexity of a model under a plan, on a text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flexsparse.errors import MaskError
from flexsparse.fidelity.replay import Replay
from flexsparse.plan import SparsePlan
from flexsparse.progress import Progress


def sequences(tokenizer: Any, text: str, length: int, count: int | None = None) -> Tensor:
    """A text cut into sequences of tokens, int64[count, length].

    Each begins with the tokenizer's token for the beginning of a text, if it has one: models look
    at it all the time, and are lost without.

    Args:
        tokenizer: of transformers.
        text: long enough for `count` sequences.
        length: of a sequence, in tokens.
        count: how many; all that the text gives by default. What is left over is not used.

    Raises:
        MaskError: the text is too short.
    """
    if length < 2:
        raise MaskError(f"length={length}; a sequence has 2 tokens or more, to predict one.")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(begin)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = len(ids) // body
    if found < (count or 1):
        raise MaskError(
            f"The text has {len(ids):,} tokens, and {count or 1} sequence(s) of {length:,} take "
            f"{(count or 1) * body:,}. Give a longer text, a shorter length or fewer sequences."
        )
    parts = torch.tensor(ids[: body * (count or found)], device="cpu").view(-1, body)
    return torch.cat([parts.new_tensor(begin * len(parts)).view(len(parts), -1), parts], 1)


def token_losses(
    model: Any, ids: Tensor, plan: SparsePlan | None = None, *, every: int = 1
) -> Tensor:
    """float32[sequences, predictions]: -log of the probability of each token but the first.

    Args:
        model: a causal language model of transformers.
        ids: int64[sequences, length], as `sequences` gives them.
        plan: put on the model while it runs, in place of any it has; by default it runs as it is.
        every: only every `every`-th token, which saves most of a large vocabulary's time.

    Raises:
        MaskError: the plan is for another model, or the model reads fewer tokens.
    """
    check_length(model, ids.shape[1])
    with applied(plan, model), Progress("Reading", len(ids)) as progress:
        rows = []
        for row in ids[:, None]:
            rows.append(Replay(model, row.to(model.device), every=every).losses().cpu())
            progress.tick()
    return torch.stack(rows)


def perplexity(model: Any, ids: Tensor, plan: SparsePlan | None = None) -> float:
    """The exponential of the mean of `token_losses`."""
    return float(token_losses(model, ids, plan).double().mean().exp())


def check_length(model: Any, length: int) -> None:
    """Raise a MaskError if a model reads fewer tokens than `length`."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise MaskError(f"The model reads at most {limit:,} tokens, and length is {length:,}.")


@contextlib.contextmanager
def applied(plan: SparsePlan | None, model: Any) -> Iterator[None]:
    """While it lasts, the model has the plan and is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        if plan is not None:
            plan.apply(model)
        yield
    finally:
        if plan is not None:
            plan.remove(model)
        model.train(training)
