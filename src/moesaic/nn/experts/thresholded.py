"""Experts that leave out what is small: inputs, gates and neurons under a threshold count as zero.

Source: TEAL, arXiv 2408.14690: x -> x * 1[|x| > t], one threshold for each tensor that a matrix
reads; gate and up share their input and its threshold. The compression `teal` sets these. Ours: a
threshold for each neuron, and one for each gate after its activation, which says whether the up row
of that neuron is read at all; the conversion `dsmoe` sets those. At zero, where all start, these
are ordinary experts.

A column of gate, up or down whose input is zero need not be read, nor an up row whose gate is: that
is what it would save. Torch's dense products read everything all the same, and so does the native
code, which masks.

Shapes: T tokens, E experts, F width of one expert, D model width, R rows of one expert in the up
product (2F if gated, else F).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.experts.gated import GatedExperts
from moesaic.nn.experts.plain import PlainExperts
from moesaic.ops.weights import ExpertWeights, Thresholds


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdedConfig(ExpertsConfig):
    """Settings of experts with thresholds: what these were set for, which budgets count on.

    Attributes:
        inputs: Part of the inputs that is kept, in (0, 1].
        gates: Part of the gates of an expert that is on; 1 in plain experts.
        neurons: Part of its neurons, at most that of its gates.
    """

    inputs: float = 1.0
    gates: float = 1.0
    neurons: float = 1.0

    def __post_init__(self) -> None:
        ExpertsConfig.__post_init__(self)
        if not 0.0 < self.neurons <= self.gates <= 1.0 or not 0.0 < self.inputs <= 1.0:
            raise InputError(
                "inputs, gates and neurons must be in (0, 1] and neurons at most gates, got "
                f"{self.inputs}, {self.gates} and {self.neurons}; 1 keeps all"
            )


class Thresholded(Experts):
    """What the thresholds add to a kind of experts, which stands after it among the bases.

    A mixin and no wrapper: experts inside experts would be counted, packed and drawn twice, and
    the names of a checkpoint would differ from those of the dense network.

    Attributes:
        kept: What the thresholds were set for.
        input_threshold: Of the input of gate and up, a scalar buffer.
        gate_threshold: Of the gates after their activation, a buffer [E, F]; none in plain experts.
        neuron_threshold: Of the input of down, a buffer [E, F].
    """

    kept: ThresholdedConfig
    input_threshold: Tensor
    gate_threshold: Tensor | None
    neuron_threshold: Tensor

    def set_thresholds(
        self, inputs: float, neurons: Tensor | float, gates: Tensor | float = 0.0
    ) -> None:
        """Write all thresholds; those of gates and neurons as one number or [E, F]."""
        self.input_threshold.fill_(inputs)
        self.neuron_threshold.copy_(torch.as_tensor(neurons))
        if self.gate_threshold is not None:
            self.gate_threshold.copy_(torch.as_tensor(gates))

    def keep(self, *, inputs: float = 1.0, gates: float = 1.0, neurons: float = 1.0) -> None:
        """Say what the thresholds are to be set for; see `ThresholdedConfig`."""
        self.kept = ThresholdedConfig(inputs=inputs, gates=gates, neurons=neurons)

    def kept_options(self) -> dict[str, float]:
        """What they are set for, as options of a layer."""
        return {name: getattr(self.kept, name) for name in ("inputs", "gates", "neurons")}

    def expected_share(self) -> float:
        """Share of an expert's weights that a token uses, as the thresholds were set for."""
        gated = self.gate_threshold is not None
        rows = self.kept.inputs * (1.0 + self.kept.gates if gated else 1.0)
        return (rows + self.kept.neurons) / (3 if gated else 2)

    def used_share(self) -> None:
        """Give none: each token has other large values."""
        return None

    def used_TE(self, h_TD: Tensor) -> Tensor:
        """Share of an expert's weights that are multiplied with no zero, [T, E] float64."""
        weights = self.weights()
        x_TD = weights.cut_inputs(h_TD)
        bias = None if weights.up_bias is None else weights.up_bias.flatten()
        z_TM = nnf.linear(x_TD, weights.up.flatten(0, 1), bias)
        z_TER = z_TM.unflatten(1, (self.num_experts, -1))
        num_experts, _, dim = weights.up.shape
        rows_TE = z_TM.new_full(z_TER.shape[:2], weights.width, dtype=torch.float64)
        if self.gate_threshold is not None:
            gate_TEF = weights._replace(gated=False, thresholds=None).activate(
                z_TER[..., : weights.width]
            )
            rows_TE += (gate_TEF.abs() > self.gate_threshold).sum(2)
        used_TE = x_TD.count_nonzero(1).double().unsqueeze(1) * rows_TE
        used_TE += weights.activate(z_TER).count_nonzero(2).double() * dim
        return used_TE * num_experts / (weights.up.numel() + weights.down.numel())

    def _with_thresholds(self, weights: ExpertWeights) -> ExpertWeights:
        thresholds = Thresholds(self.input_threshold, self.neuron_threshold, self.gate_threshold)
        return weights._replace(thresholds=thresholds)

    def _add_thresholds(self, config: ExpertsConfig, *, gated: bool) -> None:
        # Whoever has no thresholds in mind gives the settings that all kinds have.
        self.kept = config if isinstance(config, ThresholdedConfig) else ThresholdedConfig()
        shape = (self.num_experts, self.width)
        # Part of the checkpoint format.
        self.register_buffer("input_threshold", torch.zeros(()))
        self.register_buffer("gate_threshold", torch.zeros(shape) if gated else None)
        self.register_buffer("neuron_threshold", torch.zeros(shape))


class ThresholdedGatedExperts(Thresholded, GatedExperts):
    """Experts down(keep(keep(act(gate x)) * (up x))) with x = keep(h).

    Args:
        dim: D.
        num_experts: E.
        width: F.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, width: int, config: ExpertsConfig) -> None:
        super().__init__(dim, num_experts, width, config)
        self._add_thresholds(config, gated=True)

    def weights(self) -> ExpertWeights:
        """Give the weights and the thresholds to an expert path."""
        return self._with_thresholds(super().weights())


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
        self._add_thresholds(config, gated=False)

    def weights(self) -> ExpertWeights:
        """Give the weights and the thresholds to an expert path."""
        return self._with_thresholds(super().weights())
