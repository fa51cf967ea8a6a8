"""Meeting a requested active fraction: dual ascent on the sparsity coefficient, then a threshold.

Shapes: T tokens, E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic.models.ffn import dense_ffn_width
from moesaic.nn.layer import moe_layers, record_routing
from moesaic.nn.operating_point import threshold_routers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold
from moesaic.nn.routing import Routing
from moesaic.nn.shape import LayerShape, layer_shapes

# Scores looked at to place the threshold: bounds its memory to 64 MB.
_MAX_SCORES = 1 << 24


class BudgetControl:
    """The multiplier of the constraint "mean active fraction is at most the target".

    A proportional term answers the last measurement, an integral one remembers; the coefficient
    never falls below zero.

    Args:
        target: Active fraction to reach.
        coef: First coefficient.
        rate: Gain of the integral term; the proportional one is ten times it.
    """

    def __init__(self, target: float, coef: float, rate: float) -> None:
        self.target = target
        self.rate = rate
        self.integral = coef

    def update(self, active: float) -> float:
        """Take in the measured fraction of a step; return the coefficient of the next."""
        excess = active - self.target
        self.integral = max(0.0, self.integral + self.rate * excess)
        return max(0.0, self.integral + 10 * self.rate * excess)


def active_fraction(
    routings: Sequence[Routing], shapes: Sequence[LayerShape], mask_T: Tensor | None = None
) -> list[float]:
    """Mean active fraction of each layer with a router, what is always on included.

    Experts that leave out what is small count with what they are expected to use.

    Args:
        routings: Of every iteration of these layers, in one pass over the text or several.
        shapes: Of these layers.
        mask_T: Tokens that count, [T]; all if none.
    """
    order = [index for index, shape in enumerate(shapes) for _ in range(shape.iterations)]
    num_passes = len(routings) // max(1, len(order))
    experts_on = [0.0] * len(shapes)
    for index, routing in zip(order * num_passes, routings, strict=True):
        tokens = routing.ids_TK.shape[0] if mask_T is None else int(mask_T.sum())
        experts_on[index] += float(routing.counts_E(mask_T).sum()) / max(1, tokens)
    return [
        shape.expected_fraction(count / max(1, num_passes))
        for shape, count in zip(shapes, experts_on, strict=True)
    ]


def sigmoid_routers(model: nn.Module) -> list[SigmoidThreshold]:
    """Routers of all layers, which a budget can act on.

    Raises:
        InputError: If a layer has another router, or none.
    """
    routers = threshold_routers(model)
    for index, layer in enumerate(moe_layers(model)):
        if layer.router not in routers:
            kind = layer.config.router if layer.router is not None else "no router"
            raise InputError(
                f"a budget needs sigmoid routers in every layer, layer {index} has {kind}; set "
                "active to 0"
            )
    return routers


@torch.no_grad()
def settle_threshold(model: PreTrainedModel, ids_NS: Tensor, active: float) -> float:
    """Move the threshold of all layers to where the mean active fraction is what was asked for.

    Gates equal to the last that is on stay on too: a budget missed is seen in every report, a
    network with all gates off is not a model.

    Args:
        model: A DSMoE whose layers have equally many equally wide experts.
        ids_NS: Text to measure on, [N, S]; not the held-out text.
        active: Active fraction of the networks to meet, what is always on included.

    Returns:
        The threshold, which is also written into the config.

    Raises:
        InputError: If a layer has no sigmoid router.
    """
    routers = sigmoid_routers(model)
    share = _experts_share(model, active)
    scores: list[Tensor] = []
    was_training = model.training
    model.eval()
    # A router's decisions change what later layers see, so place the threshold twice.
    for _ in range(2):
        scores.clear()
        for ids_BS in ids_NS.split(2):
            with record_routing(model) as routings:
                model(input_ids=ids_BS, use_cache=False, logits_to_keep=1)
            scores.extend(routing.scores_TE.flatten() for routing in routings)
        all_scores = torch.cat(scores)
        if all_scores.numel() > _MAX_SCORES:
            all_scores = all_scores[:: math.ceil(all_scores.numel() / _MAX_SCORES)]
        threshold = _threshold(all_scores.sigmoid(), share)
        for router in routers:
            router.threshold = threshold
    for layer in model.config.moesaic["layers"]:
        layer["router_options"]["threshold"] = threshold
    model.train(was_training)
    return threshold


def _experts_share(model: PreTrainedModel, active: float) -> float:
    """Share of the experts that an active fraction of the networks leaves room for."""
    shapes = layer_shapes(model, dense_ffn_width(model.config))
    return sum(shape.experts_on(active) for shape in shapes) / len(shapes)


def _threshold(gates: Tensor, active: float) -> float:
    """The largest number that at least a fraction `active` of gates exceeds; it is below one."""
    num_off = round((1 - active) * gates.numel())
    last_on = gates.kthvalue(min(num_off + 1, gates.numel())).values
    return float(last_on.nextafter(torch.zeros_like(last_on)))
