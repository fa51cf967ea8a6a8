"""Equal cost: the width of experts at which a model costs what the dense one costs, by counting.

What is counted is what `moesaic.evaluation.cost` counts: two FLOPs for each weight of a matrix
product that a token takes part in, routers, attention and head included.

Shapes: F neurons of one expert, T tokens, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from moesaic._errors import InputError
from moesaic.evaluation.cost import matrix_flops
from moesaic.models.mixture import MixtureConfig, build_mixture
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.routers._base import RouterState
from moesaic.nn.shape import layer_shapes
from moesaic.recipes.architectures.protocol import Architecture, ArchitectureProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """An architecture at the width that the protocol's cost gives it.

    Attributes:
        mixture: The model as data, tokens of the vocabulary and positions included.
        width: F, or the neurons of the dense network.
        active: Routed experts that a token is meant to use on average.
        reference_flops: Of the dense model, per token.
        flops: Of this one at `active`; off the reference by the rounding of F alone.
        active_fraction: Weights of the networks that a token uses at `active` over those of the
            dense network, in the last layer.
    """

    mixture: MixtureConfig
    width: int
    active: float
    reference_flops: int
    flops: int
    active_fraction: float


class Counted(NamedTuple):
    """What one token of a model costs: FLOPs, and the active fraction of its last network."""

    flops: int
    active_fraction: float


def match(protocol: ArchitectureProtocol, name: str, vocab_size: int) -> Matched:
    """Find the width at which an architecture costs what the dense model costs, by counting.

    Args:
        protocol: Of the architecture.
        name: Its name.
        vocab_size: Tokens of the tokenizer.

    Raises:
        InputError: If no width of at least one neuron is cheap enough, or a part does not fit.
    """
    architecture = protocol.architectures[name]
    base = dense_model(protocol, vocab_size)
    reference = count(base, 0.0).flops
    if architecture.experts:
        active = architecture.active or slots_used(architecture.layer_config(0, 1), base.dim)
        width = nearest_width(
            lambda width: count(_at(base, architecture, width), active).flops, reference
        )
    else:
        active, width = 0.0, base.width
    mixture = _at(base, architecture, max(1, width))
    counted = count(mixture, active)
    if width < 1:
        raise InputError(
            f"architecture {name} costs {counted.flops:,} FLOPs a token at one neuron an expert, "
            f"the dense model {reference:,}; lower active or shared, or raise model.width"
        )
    return Matched(
        mixture=mixture,
        width=width,
        active=active,
        reference_flops=reference,
        flops=counted.flops,
        active_fraction=counted.active_fraction,
    )


def nearest_width(cost: Callable[[int], int], wanted: int) -> int:
    """Find the width whose cost is nearest to what is wanted.

    Args:
        cost: Of a width of at least 1; it grows with the width, in a line or faster.
        wanted: What it should be.

    Returns:
        The width; 0 if one neuron costs more than is wanted by over half of what a second adds.
    """
    cost = cache(cost)
    if cost(1) >= wanted:
        return int(2 * (cost(1) - wanted) <= cost(2) - cost(1))
    low, high = 1, 2 + (wanted - cost(1)) // (cost(2) - cost(1))
    while cost(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        # Where a line through both would meet it: few counts, even where the cost is no line.
        between = low + (wanted - cost(low)) * (high - low) // (cost(high) - cost(low))
        between = min(max(between, low + 1), high - 1)
        low, high = (between, high) if cost(between) < wanted else (low, between)
    return min((low, high), key=lambda width: abs(cost(width) - wanted))


def dense_model(protocol: ArchitectureProtocol, vocab_size: int) -> MixtureConfig:
    """The model whose cost is everybody's, with dense networks."""
    block = protocol.data.block
    return dataclasses.replace(protocol.model, vocab_size=vocab_size, positions=block)


def _at(base: MixtureConfig, architecture: Architecture, width: int) -> MixtureConfig:
    layers = tuple(architecture.layer_config(index, width) for index in range(base.num_layers))
    return dataclasses.replace(base, layers=layers, losses=architecture.losses)


def count(config: MixtureConfig, active: float) -> Counted:
    """Count what one token of a model costs.

    Args:
        config: The model.
        active: Routed experts that a token uses, over all iterations.
    """
    # Shapes are counted, so no weight is drawn.
    with torch.device("meta"):
        model = build_mixture(config)
    fractions = [shape.fraction(active) for shape in layer_shapes(model, config.width)]
    return Counted(matrix_flops(model, fractions), fractions[-1])


@torch.no_grad()
def slots_used(config: LayerConfig, dim: int) -> float:
    """Experts that every token uses, over all iterations, by asking fresh routers.

    Args:
        config: A layer whose routers always choose as many.
        dim: D.
    """
    state = RouterState(tokens_T=torch.zeros(1, dtype=torch.int64))
    # Drawing routers must not move the generator of the caller.
    with torch.random.fork_rng(devices=()):
        layer = MoELayer(dim, config).eval()
        h_TD = torch.ones(1, dim)
        return sum(float(router(h_TD, state).active_T()) for router in layer.turns())
