"""What of ours is measured: the one place that says how a user would get the fastest path.

Shapes: T tokens, K slots per token, D model width.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moesaic.nn.layer import MoELayer
from moesaic.ops.select import apply_experts
from moesaic.ops.weights import ExpertWeights

ExpertsCall = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(weights: ExpertWeights) -> ExpertsCall:
    """Prepare weights for inference; gives the function of h_TD, ids_TK and weights_TK."""

    def call(h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return apply_experts(h_TD, ids_TK, weights_TK, weights)

    return call


def our_layer(layer: MoELayer) -> Callable[[Tensor], Tensor]:
    """Prepare a layer for inference; gives the function of h_TD."""
    return layer.eval()


def why_no_engine() -> str:
    """Say why whole models cannot be run by the engine; empty if they can."""
    if importlib.util.find_spec("moesaic.inference") is None:
        return "this version of moesaic has no inference engine"
    return ""


def our_engine(model: PreTrainedModel) -> Any:
    """Prepare a model for inference; it has `generate` and `prefill`."""
    return importlib.import_module("moesaic.inference.engine").Engine(model)
