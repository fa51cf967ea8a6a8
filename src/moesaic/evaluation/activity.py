"""How much of its feed-forward networks a model uses: per layer, per expert, per domain, per token.

Active neurons are those of the experts a token uses plus the shared ones; the fraction is of the
width of the dense parent's network, so that a cut model, a pruned one and their parent compare.
The parameters of routers are no neurons: they count in active parameters and FLOPs
(`moesaic.evaluation.cost`), not here.

Shapes: T tokens, E experts of one layer, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesaic.nn.layer import MoELayer, moe_layers
from moesaic.nn.routing import Routing


def dense_ffn_width(config: Any) -> int:
    """Neurons of one feed-forward network of the dense model that a config describes or stems from.

    Args:
        config: A transformers config; a converted model keeps the fields of its parent.
    """
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        width = getattr(config, name, None)
        if width is not None:
            return int(width)
    # GPT-2 leaves its width out where it is the usual one.
    return 4 * int(config.hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What of a layer can be on.

    Attributes:
        num_experts: E.
        width: Neurons of one expert.
        shared_width: Neurons that are always on.
        dense_width: Neurons of the dense parent's network.
    """

    num_experts: int
    width: int
    shared_width: int
    dense_width: int

    def fraction(self, active_experts: float) -> float:
        """Active neurons over dense ones when so many experts are on."""
        return (self.shared_width + active_experts * self.width) / self.dense_width

    def active_experts(self, fraction: float) -> float:
        """Experts that are on at an active fraction; the inverse of `fraction`."""
        if not self.num_experts:
            return 0.0
        return (fraction * self.dense_width - self.shared_width) / self.width


def layer_shapes(model: nn.Module, dense_width: int) -> list[LayerShape]:
    """Shape of every MoE layer of a model, first to last; none for a dense model."""
    return [_shape(layer, dense_width) for layer in moe_layers(model)]


def _shape(layer: MoELayer, dense_width: int) -> LayerShape:
    config = layer.config
    return LayerShape(
        num_experts=config.num_experts,
        width=config.width,
        shared_width=config.shared_width,
        dense_width=dense_width,
    )


def token_fractions(model: nn.Module, routings: Sequence[Routing], dense_width: int) -> Tensor:
    """Active fraction of each token, the mean over layers, [T] float64.

    Args:
        model: A model with at least one routed layer.
        routings: What `record_routing` collected in one forward of it.
        dense_width: Neurons of the dense parent's network.
    """
    remaining = iter(routings)
    total_T: Tensor | float = 0.0
    shapes = layer_shapes(model, dense_width)
    for shape in shapes:
        if shape.num_experts:
            active_T = next(remaining).active_T().double()
            total_T = total_T + (shape.shared_width + active_T * shape.width) / shape.dense_width
        else:
            total_T = total_T + shape.fraction(0)
    assert isinstance(total_T, Tensor)
    return total_T / len(shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """How often each expert was on while text was read.

    Attributes:
        shapes: One per MoE layer.
        tokens: Tokens read, by domain.
        counts: Tokens for which each expert was on, by domain: per layer an [E] int64.
    """

    shapes: tuple[LayerShape, ...]
    tokens: Mapping[str, int]
    counts: Mapping[str, tuple[NDArray[np.int64], ...]]

    def experts_per_layer(self) -> list[list[float]]:
        """Share of all tokens for which each expert was on, by layer."""
        total = sum(self.tokens.values())
        return [
            (np.sum([layers[i] for layers in self.counts.values()], axis=0) / total).tolist()
            for i in range(len(self.shapes))
        ]

    def mean_per_layer(self, domain: str | None = None) -> list[float]:
        """Mean active fraction of each layer, over one domain or over all tokens."""
        domains = list(self.tokens) if domain is None else [domain]
        total = sum(self.tokens[name] for name in domains)
        return [
            shape.fraction(sum(int(self.counts[name][i].sum()) for name in domains) / total)
            for i, shape in enumerate(self.shapes)
        ]

    def mean(self) -> float:
        """Mean active fraction over layers and tokens."""
        return float(np.mean(self.mean_per_layer()))

    def to_plain(self) -> dict[str, Any]:
        """The `activation` section of the evaluation record."""
        return {
            "experts_per_layer": self.experts_per_layer(),
            "mean_per_layer": self.mean_per_layer(),
            "per_domain": {name: self.mean_per_layer(name) for name in self.tokens},
        }


class ActivityMeter:
    """Counts active experts batch by batch, so that text is read once for quality and activity.

    Args:
        model: Dense or converted; a dense one has nothing to count.
        dense_width: Neurons of the dense parent's network.
    """

    def __init__(self, model: nn.Module, dense_width: int) -> None:
        self._shapes = tuple(layer_shapes(model, dense_width))
        self._tokens: dict[str, int] = {}
        self._counts: dict[str, list[NDArray[np.int64]]] = {}

    def add(self, domain: str, num_tokens: int, routings: Sequence[Routing]) -> None:
        """Count one forward of `num_tokens` tokens of a domain."""
        if domain not in self._counts:
            self._tokens[domain] = 0
            self._counts[domain] = [np.zeros(s.num_experts, np.int64) for s in self._shapes]
        self._tokens[domain] += num_tokens
        routed = [i for i, shape in enumerate(self._shapes) if shape.num_experts]
        for i, routing in zip(routed, routings, strict=True):
            self._counts[domain][i] += routing.counts_E().to("cpu", torch.int64).numpy()

    def result(self) -> Activation | None:
        """What was counted; nothing for a dense model."""
        if not self._shapes:
            return None
        counts = {name: tuple(layers) for name, layers in self._counts.items()}
        return Activation(shapes=self._shapes, tokens=dict(self._tokens), counts=counts)
