"""What a model costs: parameters, bytes, and the arithmetic of one token.

Counted from the modules themselves, so one function serves dense, pruned, thresholded and routed
models of every architecture; a test holds it to the multiply-adds of a real forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic._errors import InputError
from moesaic.models.ffn import dense_ffn_width
from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import MoELayer, moe_layers
from moesaic.nn.shape import LayerShape, layer_shapes

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of a model.

    Attributes:
        total_parameters: A tied matrix counts once.
        bytes: Of the parameters, in the dtype they have in memory.
        active_ffn_fraction: Weights of the feed-forward networks that a token uses over those of
            the dense parent, mean over layers; those of routers are not among them.
        active_parameters: What one token uses: everything, embeddings and routers too, but the
            experts that are off and the weights that are zero or multiplied by zero. A layer that
            runs several times counts what it uses as often.
        router_parameters: All parameters of the routers, which every token uses.
        flops_per_token: Two per active weight of a matrix product, head and routers included,
            embedding look-up and attention scores not. These are the FLOPs of the chosen experts;
            a path that computes others too (see `moesaic.ops.select`) does more. Zeros of static
            pruning and of thresholds are taken as skipped, as a sparse kernel would; dense
            kernels multiply them all the same.
        attention_flops_per_token: Scores and weighted sum of one token over `context` positions.
        context: The context length that this is for.
    """

    total_parameters: int
    bytes: int
    active_ffn_fraction: float
    active_parameters: int
    router_parameters: int
    flops_per_token: int
    attention_flops_per_token: int
    context: int

    def to_plain(self) -> dict[str, Any]:
        """The `cost` section of the evaluation record."""
        return asdict(self)


def model_cost(
    model: PreTrainedModel,
    active_per_layer: Sequence[float] | None = None,
    *,
    context: int = 512,
    dense_width: int | None = None,
) -> Cost:
    """Count what a model costs.

    Args:
        model: Dense or converted.
        active_per_layer: Measured active fraction of every MoE layer, the always-on part included
            (`Activation.mean_per_layer`); none for a model whose tokens all use the same weights.
        context: Positions that a token attends to.
        dense_width: Neurons of the dense parent's network; that of the model's config if none.

    Raises:
        InputError: If the fractions do not fit the layers.
    """
    layers = moe_layers(model)
    shapes = layer_shapes(model, dense_width or dense_ffn_width(model.config))
    fractions = _fractions(layers, shapes, active_per_layer)
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    off = _off_weights(layers, shapes, fractions)
    off_parameters = sum(
        _off_parameters(layer, shape, weights)
        for layer, shape, weights in zip(layers, shapes, off, strict=True)
    )
    routers = [router for layer in layers for router in layer.routers()]
    return Cost(
        total_parameters=total,
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        active_ffn_fraction=float(np.mean(fractions)) if fractions else 1.0,
        active_parameters=round(total - off_parameters),
        router_parameters=sum(p.numel() for router in routers for p in router.parameters()),
        flops_per_token=round(2 * (_matrices(model) - sum(off))),
        attention_flops_per_token=_attention_flops(model.config, context),
        context=context,
    )


def matrix_flops(
    model: PreTrainedModel, active_per_layer: Sequence[float], dense_width: int | None = None
) -> int:
    """Count the FLOPs of one token as `model_cost` does, from shapes alone.

    No weight is read, so the model may be on the meta device.

    Args:
        model: Dense or converted.
        active_per_layer: Active fraction of every MoE layer, the always-on part included.
        dense_width: Neurons of the dense parent's network; that of the model's config if none.
    """
    shapes = layer_shapes(model, dense_width or dense_ffn_width(model.config))
    off = sum(_off_weights(moe_layers(model), shapes, active_per_layer))
    return round(2 * (_matrices(model) - off))


def _off_weights(
    layers: Sequence[MoELayer], shapes: Sequence[LayerShape], fractions: Sequence[float]
) -> list[float]:
    """Weights of matrices that a token does not use, layer by layer."""
    found = []
    for layer, shape, fraction in zip(layers, shapes, fractions, strict=True):
        part = layer.shared if layer.experts is None else layer.experts
        found.append(0.0 if part is None else shape.unused(fraction) * part.neuron_weights())
    return found


def _fractions(
    layers: list[MoELayer], shapes: list[LayerShape], given: Sequence[float] | None
) -> list[float]:
    """Check the measured fractions, or take the only possible ones."""
    shares = [1.0 if layer.shared is None else layer.shared.used_share() for layer in layers]
    if given is None:
        fractions = []
        for shape, share in zip(shapes, shares, strict=True):
            if shape.num_experts or share is None:
                raise InputError(
                    "the cost of a model whose tokens use different weights needs "
                    "active_per_layer, measured on text; evaluate its perplexity first"
                )
            fractions.append(shape.fraction(0, share))
        return fractions
    if len(given) != len(shapes):
        raise InputError(
            f"active_per_layer must hold one fraction for each of the {len(shapes)} MoE layers, "
            f"got {len(given)}; pass what the perplexity of this model measured"
        )
    for index, (value, shape, share) in enumerate(zip(given, shapes, shares, strict=True)):
        low = shape.fraction(0, 0.0 if share is None else share)
        most = shape.num_candidates * shape.iterations
        high = shape.fraction(most, 1.0 if share is None else share)
        if not low - _ROUNDING <= value <= high + _ROUNDING:
            raise InputError(
                f"active_per_layer[{index}] must be in [{low:.4g}, {high:.4g}], got {value:.4g}; "
                "pass what the perplexity of this model measured"
            )
    return list(given)


def _matrices(model: nn.Module) -> int:
    """Weights that a token multiplies when every expert is on; a tied head counts, as it runs."""
    total = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            total += module.weight.numel()
        elif isinstance(module, Experts):
            total += module.num_experts * module.own_weights() + module.common_weights()
    for layer in moe_layers(model):
        total += sum(router.num_multiplied() for router in layer.turns())
    return total


def _off_parameters(layer: MoELayer, shape: LayerShape, off_weights: float) -> float:
    """Parameters that a token does not use; whole experts go with their biases, weights do not."""
    if layer.experts is None:
        return off_weights
    num_off = off_weights / (shape.width * layer.experts.neuron_weights())
    return layer.experts.unused_weights(num_off) + num_off * _expert_biases(layer.experts)


def _expert_biases(experts: Experts) -> int:
    """Numbers in the biases of one expert."""
    weights = experts.weights()
    own = [bias for bias in (weights.up_bias, weights.down_bias) if bias is not None]
    return sum(bias[0].numel() for bias in own)


def _attention_flops(config: Any, context: int) -> int:
    """Two products of heads * head_dim * positions in every layer."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["any"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or context
    positions = sum(context if kind == "full_attention" else min(context, window) for kind in kinds)
    return int(4 * config.num_attention_heads * head_dim * positions)
