"""What every partition takes and returns.

Letters: F neurons of the dense FFN, D model width, E experts, C domains of the text, T tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic._errors import InputError

# Statistic -> the calibration collector that measures it.
COLLECTORS = {
    "activation_importance_CF": "gradients",
    "activity_F": "neurons",
    "adjacency_FF": "adjacency",
    "coactivation_FF": "neurons",
    "energy_F": "neurons",
    "h_TD": "inputs",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartitionInput:
    """One dense FFN, seen from its neurons.

    Attributes:
        num_experts: Blocks to cut, shared ones included; divides num_neurons.
        num_neurons: Width F of the FFN.
        up_FD: Rows of the up matrix (the first matrix of a plain FFN), one per neuron.
        gate_FD: Rows of the gate matrix; None for a plain FFN.
        down_DF: The down matrix, one column per neuron.
        neurons: Gives the input of the down matrix, [T, F], for inputs of the FFN, [T, D], both in
            float32 on the CPU.
        stats: Measured on calibration text, for the methods that need it: `coactivation_FF`, the
            mean over tokens of |a_i| |a_j|, with a the input of the down matrix; `activity_F`, the
            mean of |a_j|; `energy_F`, the mean of (a_j ||w_down_j||)^2; `adjacency_FF`, how many
            groups of 8 tokens both neurons were strong in; `activation_importance_CF`, the mean
            over the tokens of domain c of |a_j dL/da_j|; `h_TD`, the inputs of the FFN themselves.
        seed: Seeds every random choice.
        num_shared: Blocks at the front that are to be always on. Most methods cut as ever; the
            caller then shares their first blocks.
    """

    num_experts: int
    num_neurons: int
    up_FD: Tensor | None = None
    gate_FD: Tensor | None = None
    down_DF: Tensor | None = None
    neurons: Callable[[Tensor], Tensor] | None = None
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    num_shared: int = 0

    def __post_init__(self) -> None:
        validate_num_experts(self.num_neurons, self.num_experts)
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")
        if not 0 <= self.num_shared < self.num_experts:
            raise InputError(
                f"shared must be in [0, {self.num_experts}), the blocks there are, got "
                f"{self.num_shared}; leave some to the router"
            )
        for name, rows_FD in (("up_FD", self.up_FD), ("gate_FD", self.gate_FD)):
            if rows_FD is not None and (rows_FD.ndim != 2 or len(rows_FD) != self.num_neurons):
                raise InputError(
                    f"{name} must have one row for each of {self.num_neurons} neurons, "
                    f"got the shape {tuple(rows_FD.shape)}"
                )
        if self.down_DF is not None and (
            self.down_DF.ndim != 2 or self.down_DF.shape[1] != self.num_neurons
        ):
            raise InputError(
                f"down_DF must have one column for each of {self.num_neurons} neurons, "
                f"got the shape {tuple(self.down_DF.shape)}"
            )
        for name in COLLECTORS.keys() & self.stats.keys():
            got = tuple(self.stats[name].shape)
            # One axis for each letter; there may be any number of domains.
            axes = zip(name.rpartition("_")[2], (*got, 0, 0), strict=False)
            expected = tuple(self.num_neurons if axis == "F" else size for axis, size in axes)
            if got != expected:
                raise InputError(f"the statistic {name} must have the shape {expected}, got {got}")

    @property
    def block_size(self) -> int:
        """Neurons in one expert."""
        return self.num_neurons // self.num_experts

    def stat(self, name: str, method: str) -> Tensor:
        """Return a statistic on the CPU in float32.

        Raises:
            InputError: If it was not collected, or holds a value that is not finite.
        """
        if name not in self.stats:
            raise InputError(
                f"partition {method!r} needs the statistic {name}; add the collector "
                f"{COLLECTORS[name]!r} to the calibration, or choose a partition without statistics"
            )
        value = self.stats[name].detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"the statistic {name} has values that are not finite; calibrate again in float32 "
                f"or bfloat16"
            )
        return value


class Partition(Protocol):
    """A partition method: a pure function of its input, its settings and the seed."""

    def __call__(self, source: PartitionInput, config: Any) -> Tensor:
        """Order the neurons so that each expert is a contiguous block.

        Returns:
            The permutation, (F,) int64 on the CPU: position p of the new order holds the old neuron
            permutation[p], and expert e owns the positions e * F / E to (e + 1) * F / E - 1.
            Where its settings let experts overlap, the old neurons are no permutation.
        """


def require_package(partition: str, package: str) -> None:
    """Refuse to go on without an optional package.

    Raises:
        InputError: Naming it.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"partition {partition!r} needs {package}, which is not installed; "
            f"pip install {package}"
        )


def validate_num_experts(num_neurons: int, num_experts: int) -> None:
    """Check that an FFN can be cut into so many equal experts.

    Raises:
        InputError: If num_experts is outside [1, num_neurons] or does not divide it; names the
            nearest values that work.
    """
    if num_neurons < 1:
        raise InputError(f"the FFN width must be at least 1, got {num_neurons}")
    if not 1 <= num_experts <= num_neurons:
        nearest = 1 if num_experts < 1 else num_neurons
        raise InputError(
            f"experts must be between 1 and the FFN width {num_neurons}, got {num_experts}; "
            f"the nearest that works is {nearest}"
        )
    if num_neurons % num_experts:
        below = next(e for e in range(num_experts, 0, -1) if num_neurons % e == 0)
        above = next(e for e in range(num_experts, num_neurons + 1) if num_neurons % e == 0)
        raise InputError(
            f"experts={num_experts} does not divide the FFN width {num_neurons}; "
            f"the nearest that do are {below} and {above}"
        )
