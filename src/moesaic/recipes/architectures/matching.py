"""Equal cost: the width of experts at which a model costs what the dense one costs, by counting.

What is counted is what `moesaic.evaluation.cost` counts: two FLOPs for each weight of a matrix
product that a token takes part in, routers, attention and head included.

Shapes: F neurons of one expert.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from moesaic._errors import InputError
from moesaic.evaluation.cost import model_cost
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
    """

    mixture: MixtureConfig
    width: int
    active: float
    reference_flops: int
    flops: int

    @property
    def active_fraction(self) -> float:
        """Weights of the networks that a token uses over those of the dense network."""
        layer = self.mixture.layer(self.mixture.num_layers - 1)
        return (layer.shared_width + self.active * layer.width) / self.mixture.width


def match(protocol: ArchitectureProtocol, name: str, vocab_size: int) -> Matched:
    """Find the width of an architecture, and count.

    FLOPs are linear in the width, so two counts give it.

    Args:
        protocol: Of the architecture.
        name: Its name.
        vocab_size: Tokens of the tokenizer.

    Raises:
        InputError: If no width of at least one neuron is cheap enough, or a part does not fit.
    """
    architecture = protocol.architectures[name]
    block = protocol.data.block
    base = dense_model(protocol, vocab_size)
    reference = count_flops(base, 0.0, block)
    if not architecture.experts:
        mixture = _at(base, architecture, base.width)
        flops = count_flops(mixture, 0.0, block)
        return Matched(
            mixture=mixture, width=base.width, active=0.0, reference_flops=reference, flops=flops
        )
    active = architecture.active or slots_used(architecture.layer_config(0, 1), base.dim)
    one, two = (count_flops(_at(base, architecture, width), active, block) for width in (1, 2))
    width = round((reference - one) / (two - one)) + 1
    if width < 1:
        raise InputError(
            f"architecture {name} costs {one:,} FLOPs a token at one neuron an expert, the dense "
            f"model {reference:,}; lower active or shared, or raise model.width"
        )
    mixture = _at(base, architecture, width)
    flops = one + (width - 1) * (two - one)
    return Matched(
        mixture=mixture, width=width, active=active, reference_flops=reference, flops=flops
    )


def dense_model(protocol: ArchitectureProtocol, vocab_size: int) -> MixtureConfig:
    """The model whose cost is everybody's, with dense networks."""
    block = protocol.data.block
    return dataclasses.replace(protocol.model, vocab_size=vocab_size, positions=block)


def _at(base: MixtureConfig, architecture: Architecture, width: int) -> MixtureConfig:
    layers = tuple(architecture.layer_config(index, width) for index in range(base.num_layers))
    return dataclasses.replace(base, layers=layers, losses=architecture.losses)


def count_flops(config: MixtureConfig, active: float, context: int) -> int:
    """FLOPs of one token of a model.

    Args:
        config: The model.
        active: Routed experts that a token uses.
        context: Positions.
    """
    # The weights do not matter, and drawing them must not move the generator of the caller.
    with torch.random.fork_rng(devices=()):
        model = build_mixture(config)
    fractions = [shape.fraction(active) for shape in layer_shapes(model, config.width)]
    return model_cost(model, fractions, context=context).flops_per_token


@torch.no_grad()
def slots_used(layer: LayerConfig, dim: int) -> float:
    """Experts that every token uses, by asking a fresh router that always chooses as many."""
    state = RouterState(tokens_T=torch.zeros(1, dtype=torch.int64))
    with torch.random.fork_rng(devices=()):
        router = MoELayer(dim, layer).eval().router
        assert router is not None
        return float(router(torch.ones(1, dim), state).active_T())
