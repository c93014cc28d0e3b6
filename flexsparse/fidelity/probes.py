"""Probes of what a model can still do under a plan: find a needle, recall what was associated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexsparse.default_device import cpu_by_default
from flexsparse.errors import MaskError
from flexsparse.fidelity.perplexity import applied, check_length
from flexsparse.fidelity.replay import Replay
from flexsparse.plan import SparsePlan

NEEDLE = " The secret number of the lighthouse is {}."
QUESTION = " The secret number of the lighthouse is"
PASSWORDS = ("4817", "9062", "3571", "7248", "1936", "8405")


def needle_in_a_haystack(
    model: Any,
    tokenizer: Any,
    text: str,
    length: int,
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    plan: SparsePlan | None = None,
) -> Tensor:
    """float32[depths]: how likely a model is to repeat a number that stands deep in a text.

    The haystack is the text's beginning, `length` tokens with the question at its end. The result
    is the probability of each of the number's tokens, a geometric mean.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's.
        text: of `length` tokens or more.
        length: of the haystack, in tokens.
        depths: where the number stands, as a part of the haystack: 0 is its beginning.
        plan: put on the model for the probe, in place of any it has.

    Raises:
        MaskError: the text is too short, a depth is not in [0, 1], or the plan does not fit.

    Source: Kamradt, LLMTest_NeedleInAHaystack.
    """
    check_length(model, length)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def tokens(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False).input_ids
        return ids

    rows, answers = [], []
    for place, depth in enumerate(depths):
        if not 0 <= depth <= 1:
            raise MaskError(f"depth={depth}; it is a part of the text, from 0 to 1.")
        number = PASSWORDS[place % len(PASSWORDS)]
        needle, question = tokens(NEEDLE.format(number)), tokens(QUESTION)
        answer = tokens(QUESTION + " " + number)[len(question) :]
        room = length - len(begin) - len(needle) - len(question) - len(answer)
        # characters enough for any tokenizer; the whole text takes long
        hay = tokens(text[: 20 * length])[: max(room, 0)]
        if room < 1 or len(hay) < room:
            raise MaskError(
                f"The text has {len(hay):,} tokens and a haystack of {length:,} takes "
                f"{max(room, 1):,}. Give a longer text, or another length."
            )
        at = round(depth * room)
        rows.append([*begin, *hay[:at], *needle, *hay[at:], *question, *answer])
        answers.append(len(answer))
    with applied(plan, model):
        losses = [
            Replay(model, torch.tensor([row], device=model.device)).losses()[-n:].mean()
            for row, n in zip(rows, answers, strict=True)
        ]
    return torch.stack(losses).neg().exp().cpu()


@cpu_by_default()
def recall_sequences(
    count: int,
    length: int,
    pairs: int,
    keys: Tensor,
    values: Tensor,
    *,
    power: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: pairs of key and value, then each key once more.

    A row begins with `pairs` keys, each followed by its value. Each key comes again later, at a
    distance drawn from a power law (near ones are likelier), followed by its value again. All else
    is filled with keys that were not used.

    >>> recall_sequences(1, 8, 2, torch.arange(3), torch.arange(10, 12))[0]  # 0 11 2 10 2 10 0 11

    Args:
        count: rows.
        length: of a row, in tokens; 4 * pairs or more.
        pairs: keys with their values.
        keys: int64, tokens that are keys.
        values: int64, tokens that are values.
        power: of the distribution of distances.
        generator: of the random numbers.

    Returns:
        (ids int64[count, length], asked bool[count, length]): asked is True at keys that come
        again, after which the next token is the one to recall.

    Raises:
        MaskError: the row is too short for its pairs, or there are too few keys or values.

    Source: Zoology (arXiv 2312.04927), section 3.1 and its multiquery_ar task.
    """
    if pairs < 1 or length < 4 * pairs:
        raise MaskError(
            f"{pairs} pairs take rows of {4 * max(pairs, 1)} tokens or more, and length={length}."
        )
    if len(keys) <= pairs or len(values) < pairs:
        raise MaskError(
            f"{pairs} pairs take {pairs + 1} keys and {pairs} values or more; there are "
            f"{len(keys)} and {len(values)}."
        )
    room = (length - 2 * pairs) // 2
    distance = torch.arange(1, room + 1, dtype=torch.float64) ** (power - 1)
    ids = torch.empty(count, length, dtype=torch.int64)
    asked = torch.zeros(count, length, dtype=torch.bool)
    for row in range(count):
        order = torch.randperm(len(keys), generator=generator)
        key = keys[order[:pairs]]
        value = values[torch.randperm(len(values), generator=generator)[:pairs]]
        others = keys[order[pairs:]]
        ids[row] = others[torch.randint(len(others), (length,), generator=generator)]
        ids[row, 0 : 2 * pairs : 2], ids[row, 1 : 2 * pairs : 2] = key, value
        at = 2 * pairs + 2 * torch.multinomial(distance, pairs, generator=generator)
        ids[row, at], ids[row, at + 1] = key, value
        asked[row, at] = True
    return ids, asked


def associative_recall(
    model: Any, ids: Tensor, asked: Tensor, plan: SparsePlan | None = None
) -> float:
    """How likely a model is to recall the values asked for: a geometric mean of probabilities.

    Args:
        model: a causal language model of transformers.
        ids: int64[rows, length], as `recall_sequences` gives them.
        asked: boolean of the same shape; the token after each True is to be recalled.
        plan: put on the model for the probe, in place of any it has.
    """
    check_length(model, ids.shape[1])
    with applied(plan, model):
        losses = [
            Replay(model, row.to(model.device)).losses().cpu()[where[0, :-1]]
            for row, where in zip(ids[:, None], asked[:, None], strict=True)
        ]
    return float(torch.cat(losses).mean().neg().exp())
