"""What every expert path is given: the weights, and the shape of the function they make.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic._errors import UnknownNameError
from moesaic._registry import unknown_name


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


# Names as transformers configs spell them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of a name; an unknown name raises with the closest."""
    if name not in ACTIVATIONS:
        raise UnknownNameError(unknown_name("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


class Packed(Protocol):
    """A copy of experts in the order in which native code reads them."""

    def __call__(
        self, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
    ) -> Tensor:
        """Compute the reference's result, without gradients."""
        ...

    def is_copy_of(self, weights: ExpertWeights) -> bool:
        """Whether these are still the weights that were packed, unchanged."""
        ...


class Thresholds(NamedTuple):
    """Magnitudes that must be exceeded; what does not exceed its own counts as zero.

    Attributes:
        input: Of the inputs of the up product, a scalar.
        neuron_EF: Of a neuron, the input of the down product, [E, F].
        gate_EF: Of a gate after its activation, [E, F]; none in plain experts. The up row of a gate
            that is left out need not be read.
    """

    input: Tensor
    neuron_EF: Tensor
    gate_EF: Tensor | None = None


def keep_large(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Set to zero what does not exceed a threshold in magnitude; not-a-number stays visible."""
    return x.masked_fill(x.abs() <= threshold, 0.0)


class ExpertWeights(NamedTuple):
    """Weights of E experts and how they are applied.

    Attributes:
        up: Gated: [E, 2F, D], the gate rows of an expert before its up rows, out x in, the
            layout of transformers 5. Plain: [E, F, D].
        down: [E, D, F].
        activation: Name of the activation function; empty when `glu` says what is applied.
        gated: Whether `up` holds gate and up rows.
        up_bias: [E, 2F] or [E, F], or none.
        down_bias: [E, D], or none; scaled by the slot's weight like the rest of the output.
        glu: Maps the up product of one expert to its neurons where no activation's name can.
        packed: The same weights once more, in the order in which the native CPU code reads them.
        thresholds: What inputs, gates and neurons must exceed, or none; of experts with an
            activation's name.
    """

    up: Tensor
    down: Tensor
    activation: str
    gated: bool
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    glu: Callable[[Tensor], Tensor] | None = None
    packed: Packed | None = None
    thresholds: Thresholds | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def width(self) -> int:
        """F, the neurons of one expert."""
        return self.down.shape[2]

    def cut_inputs(self, h_TD: Tensor) -> Tensor:
        """What the up product reads of the inputs, [T, D]: zero where that is small."""
        return h_TD if self.thresholds is None else keep_large(h_TD, self.thresholds.input)

    def activate(self, z: Tensor, experts: Tensor | slice | int = slice(None)) -> Tensor:
        """Map the up product to neurons.

        Args:
            z: [..., 2F] if gated, else [..., F].
            experts: Which experts the axis before the last is of, or which one all of it is of;
                all of them in order if not given. It matters where there are thresholds.

        Returns:
            [..., F].
        """
        if self.glu is not None:
            return self.glu(z)
        act = activation(self.activation)
        gate, up = z.chunk(2, dim=-1) if self.gated else (z, None)
        a = act(gate)
        if self.thresholds is not None and self.thresholds.gate_EF is not None:
            a = keep_large(a, self.thresholds.gate_EF[experts])
        a = a if up is None else a * up
        return a if self.thresholds is None else keep_large(a, self.thresholds.neuron_EF[experts])
