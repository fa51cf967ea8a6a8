"""Experts that leave out what is small: inputs and neurons under a threshold count as zero.

Source: TEAL, arXiv 2408.14690: x -> x * 1[|x| > t], one threshold for each tensor that a matrix
reads. Here gate and up share their input and its threshold. The compression `teal` sets the
thresholds; at zero, where they start, these are ordinary experts.

A column of gate, up or down whose input is zero need not be read: that is what it saves. Torch's
dense products read it all the same.

Shapes: T tokens, E experts, F width of one expert, D model width, R rows of one expert in the up
product (2F if gated, else F).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.experts.gated import GatedExperts
from moesaic.nn.experts.plain import PlainExperts
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routing import Routing
from moesaic.ops.weights import ExpertWeights


def keep_large(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Set to zero what does not exceed a threshold in magnitude; not-a-number stays visible."""
    return x.masked_fill(x.abs() <= threshold, 0.0)


class Thresholded(Experts):
    """What the thresholds add to a kind of experts, which stands after it among the bases.

    A mixin and no wrapper: experts inside experts would be counted, packed and drawn twice, and
    the names of a checkpoint would differ from those of the dense network.

    Attributes:
        input_threshold: Of the input of gate and up, a scalar buffer.
        neuron_threshold: Of the input of down, a scalar buffer.
    """

    input_threshold: Tensor
    neuron_threshold: Tensor

    def set_thresholds(self, inputs: float, neurons: float) -> None:
        """Write both thresholds."""
        self.input_threshold.fill_(inputs)
        self.neuron_threshold.fill_(neurons)

    def forward(
        self, h_TD: Tensor, routing: Routing | None = None, state: RouterState | None = None
    ) -> Tensor:
        """Compute the experts on what is large of the inputs and of the neurons, [T, D]."""
        return super().forward(keep_large(h_TD, self.input_threshold), routing, state)

    def dense(self, h_TD: Tensor, state: RouterState | None = None) -> Tensor:
        """Sum all experts at weight one, thresholds included, [T, D]."""
        return super().dense(keep_large(h_TD, self.input_threshold), state)

    def used_share(self) -> None:
        """Give none: each token has other large values."""
        return None

    def used_T(self, h_TD: Tensor) -> Tensor:
        """Share of the weights whose input is not zero, [T] float64."""
        x_TD = keep_large(h_TD, self.input_threshold)
        weights = self.weights()
        bias = None if weights.up_bias is None else weights.up_bias.flatten()
        z_TM = nnf.linear(x_TD, weights.up.flatten(0, 1), bias)
        a_TEF = weights.activate(z_TM.unflatten(1, (self.num_experts, -1)))
        num_experts, num_rows, dim = weights.up.shape
        used_T = x_TD.count_nonzero(1).double() * (num_experts * num_rows)
        used_T += a_TEF.count_nonzero((1, 2)).double() * dim
        return used_T / (weights.up.numel() + weights.down.numel())


class ThresholdedGatedExperts(Thresholded, GatedExperts):
    """Experts down(keep(act(gate x) * (up x))) with x = keep(h).

    Args:
        dim: D.
        num_experts: E.
        width: F.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, width: int, config: ExpertsConfig) -> None:
        super().__init__(dim, num_experts, width, config)
        _add_thresholds(self)

    def weights(self) -> ExpertWeights:
        """Give the weights and the cut of the neurons; whoever calls them cuts the input."""
        return _cut_neurons(super().weights(), self.neuron_threshold)


class ThresholdedPlainExperts(Thresholded, PlainExperts):
    """Experts down(keep(act(up x))) with x = keep(h).

    Args:
        dim: D.
        num_experts: E.
        width: F.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, width: int, config: ExpertsConfig) -> None:
        super().__init__(dim, num_experts, width, config)
        _add_thresholds(self)

    def weights(self) -> ExpertWeights:
        """Give the weights and the cut of the neurons; whoever calls them cuts the input."""
        return _cut_neurons(super().weights(), self.neuron_threshold)


def _add_thresholds(experts: Thresholded) -> None:
    # Part of the checkpoint format.
    experts.register_buffer("input_threshold", torch.zeros(()))
    experts.register_buffer("neuron_threshold", torch.zeros(()))


def _cut_neurons(weights: ExpertWeights, threshold: Tensor) -> ExpertWeights:
    """Replace the activation by one that leaves small neurons out; no activation's name says it."""

    def glu(z: Tensor) -> Tensor:
        return keep_large(weights.activate(z), threshold)

    return weights._replace(activation="", glu=glu)
