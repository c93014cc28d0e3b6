"""How far a model's predictions under a plan are from those of the dense model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexsparse.fidelity.replay import Replay

MOST_LIKELY = 64  # tokens whose probabilities are compared one by one


class Divergence:
    """The mean KL divergence of a model's predictions from those it made when this was built.

    The most likely 64 tokens of each prediction are compared one by one and the rest as one, which
    can only make the divergence smaller. It says the same as the rise of the loss with far less
    noise, because it does not depend on which token the text happens to go on with.

    Args:
        replay: a run of the model as it shall be compared with: dense.
    """

    def __init__(self, replay: Replay) -> None:
        self._places, self._log_p = [], []
        for _, logits in replay.logits():
            log_p, places = logits.log_softmax(-1).topk(min(MOST_LIKELY, logits.shape[-1]))
            self._places.append(places)
            self._log_p.append(_with_rest(log_p))

    def of(self, replay: Replay, start: int | None = None) -> float:
        """The divergence of a run on the same sequence, its layers from `start` on run again."""
        total, count = 0.0, 0
        for part, (_, logits) in enumerate(replay.logits(start)):
            log_p = self._log_p[part]
            log_q = _with_rest(logits.log_softmax(-1).gather(-1, self._places[part]))
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += len(logits)
        return total / count


def _with_rest(log_p: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together, float32[rows, tokens + 1]."""
    rest = 1 - log_p.double().exp().sum(-1, keepdim=True)
    least: Any = torch.finfo(torch.float32).tiny
    return torch.cat([log_p, rest.clamp(min=least).log().float()], -1)
