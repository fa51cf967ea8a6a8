"""How much of a layer can be on, counted in neurons of the dense network that it stands for.

Weights in use over those of the dense network are neurons over neurons, as all neurons have as
many weights. Whatever else has weights counts as the neurons that have as many: experts of any
kind, what they have in common, the bypass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moesaic.nn.layer import MoELayer, moe_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What of a layer can be on.

    Attributes:
        num_experts: E.
        width: Neurons that one expert's own weights make; of ordinary experts its width.
        shared_width: Neurons that are always on.
        dense_width: Neurons of the dense parent's network.
        common_width: Neurons that the weights make which the experts have in common.
        bypass_width: Neurons that the weights of the layer's bypass make.
        expected_share: Share of an expert's weights that a token uses where it is on, as what
            leaves out some of them was set for.
        iterations: Times that the layer runs in a row. What runs several times counts as often.
        reuse: Layers whose experts it chooses among; E are its own.
    """

    num_experts: int
    width: float
    shared_width: int
    dense_width: int
    common_width: float = 0.0
    bypass_width: float = 0.0
    expected_share: float = 1.0
    iterations: int = 1
    reuse: int = 1

    @property
    def num_candidates(self) -> int:
        """Experts that the router chooses among."""
        return self.num_experts * self.reuse

    @property
    def beside_width(self) -> float:
        """Neurons' worth that every token uses in each iteration beside the shared part.

        Reused experts of other layers bring what they have in common with them.
        """
        return self.reuse * self.common_width + self.bypass_width

    def fraction(self, active_experts: float, shared: float = 1.0) -> float:
        """Weights in use over dense ones.

        Args:
            active_experts: Experts that are on, over all iterations; an expert of whose weights
                only a part is in use counts as that part.
            shared: Share of the always-on experts' weights in use, mean over iterations.
        """
        always = self.iterations * (self.shared_width * shared + self.beside_width)
        return (always + active_experts * self.width) / self.dense_width

    def expected_fraction(self, active_experts: float) -> float:
        """Weights in use over dense ones when experts that are on use what is expected of them."""
        return self.fraction(active_experts * self.expected_share)

    def experts_on(self, fraction: float) -> float:
        """Share of the experts that an active fraction leaves room for, in [0, 1]."""
        room = fraction * self.dense_width / self.iterations - self.shared_width - self.beside_width
        whole = self.num_experts * self.width * self.expected_share
        return min(1.0, max(0.0, room / whole))

    def unused(self, fraction: float) -> float:
        """Neurons' worth of this layer's weights that are not in use at an active fraction."""
        beside = self.shared_width + self.common_width + self.bypass_width
        return beside + self.num_experts * self.width - fraction * self.dense_width


def layer_shapes(model: nn.Module, dense_width: int) -> list[LayerShape]:
    """Shape of every MoE layer of a model, first to last; none for a dense model."""
    return [layer_shape(layer, dense_width) for layer in moe_layers(model)]


def layer_shape(layer: MoELayer, dense_width: int) -> LayerShape:
    """Shape of one layer."""
    config = layer.config
    width = common_width = bypass_width = 0.0
    if layer.experts is not None:
        width = layer.experts.own_width()
        common_width = layer.experts.common_width()
    if layer.bypass is not None:
        part = layer.shared if layer.experts is None else layer.experts
        assert part is not None, "a bypass stands beside experts"
        bypass_width = layer.bypass.num_weights() / part.neuron_weights()
    return LayerShape(
        num_experts=config.num_experts,
        width=width,
        shared_width=config.shared_width,
        dense_width=dense_width,
        common_width=common_width,
        bypass_width=bypass_width,
        expected_share=1.0 if layer.experts is None else layer.experts.expected_share(),
        iterations=config.iterations,
        reuse=config.reuse,
    )
