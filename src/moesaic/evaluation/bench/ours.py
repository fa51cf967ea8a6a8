"""What of ours is measured: the one place that says how a user would get the fastest path.

Shapes: T tokens, K slots per token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

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
