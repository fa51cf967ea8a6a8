"""What of ours is measured: the one place that says how a user would get the fastest path.

Shapes: T tokens, K slots per token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from moesaic.inference.decoder import pack_router
from moesaic.inference.engine import Engine
from moesaic.nn.layer import MoELayer
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold
from moesaic.ops.cpu import library
from moesaic.ops.cpu.packed import Format, PackedExperts, format_of, layer_cpu
from moesaic.ops.select import apply_experts
from moesaic.ops.weights import ExpertWeights

ExpertsCall = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(weights: ExpertWeights) -> ExpertsCall:
    """Prepare weights for inference; gives the function of h_TD, ids_TK and weights_TK."""
    if not library.why_not():
        weights = weights._replace(packed=PackedExperts(weights, format_of(weights.up.dtype)))

    def call(h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return apply_experts(h_TD, ids_TK, weights_TK, weights)

    return call


def our_layer(layer: MoELayer) -> Callable[[Tensor], Tensor]:
    """Prepare a layer for inference; gives the function of h_TD."""
    layer.eval()
    if library.why_not():
        return layer
    assert isinstance(layer.router, SigmoidThreshold)
    assert layer.experts is not None
    weights = layer.experts.weights()
    router = pack_router(layer.router)
    packed = PackedExperts(weights, format_of(weights.up.dtype))
    return lambda h_TD: layer_cpu(h_TD, router, packed)


def why_no_engine() -> str:
    """Say why whole models cannot be run by the engine; empty if they can."""
    return library.why_not()


def our_engine(model: PreTrainedModel, length: int, weight_format: Format | None = None) -> Engine:
    """Prepare a model for inference; its dtype says how weights are stored if nothing else does."""
    return Engine(model, length=length, weight_format=weight_format)
