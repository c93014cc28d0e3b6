"""Fidelity: what a plan costs a model in quality, and what it computes."""

from flexsparse.fidelity.density import blocks, full_layers, own_mask, plan_blocks, plan_density
from flexsparse.fidelity.divergence import Divergence
from flexsparse.fidelity.figure import Point, draw_perplexity
from flexsparse.fidelity.heads import HeadFidelity, LayerInputs, head_fidelity, layer_inputs
from flexsparse.fidelity.perplexity import check_length, perplexity, sequences, token_losses
from flexsparse.fidelity.probes import (
    associative_recall,
    needle_in_a_haystack,
    recall_sequences,
)
from flexsparse.fidelity.replay import Replay

__all__ = [
    "Divergence",
    "HeadFidelity",
    "LayerInputs",
    "Point",
    "Replay",
    "associative_recall",
    "blocks",
    "check_length",
    "draw_perplexity",
    "full_layers",
    "head_fidelity",
    "layer_inputs",
    "needle_in_a_haystack",
    "own_mask",
    "perplexity",
    "plan_blocks",
    "plan_density",
    "recall_sequences",
    "sequences",
    "token_losses",
]
