"""FFNs with known groups of neurons, shuffled, and what a partition is worth on them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moesaic.conversion.partition._base import PartitionInput


def statistics(hidden_TF: Tensor, length_F: Tensor) -> dict[str, Tensor]:
    strength_TF = hidden_TF.abs()
    groups = strength_TF.split(8)
    return {
        "activation_importance_CF": torch.stack([s.mean(0) for s in strength_TF.chunk(4)]),
        "adjacency_FF": torch.stack([(g.T @ g).clamp(max=1.0) for g in groups]).sum(0),
        "coactivation_FF": strength_TF.T @ strength_TF / len(hidden_TF),
        "activity_F": strength_TF.mean(0),
        "energy_F": ((hidden_TF * length_F) ** 2).mean(0),
    }


def gated(gate_FD: Tensor, up_FD: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h_TD: torch.nn.functional.silu(h_TD @ gate_FD.T) * (h_TD @ up_FD.T)


def random_source(num_neurons: int, num_experts: int, seed: int = 0) -> PartitionInput:
    rng = torch.Generator().manual_seed(seed)
    hidden_TF = torch.randn(64, num_neurons, generator=rng)
    up_FD = torch.randn(num_neurons, 6, generator=rng)
    gate_FD = torch.randn(num_neurons, 6, generator=rng)
    stats = statistics(hidden_TF, torch.rand(num_neurons, generator=rng) + 0.5)
    return PartitionInput(
        num_experts=num_experts,
        num_neurons=num_neurons,
        up_FD=up_FD,
        gate_FD=gate_FD,
        down_DF=torch.randn(6, num_neurons, generator=rng),
        neurons=gated(gate_FD, up_FD),
        stats=stats | {"h_TD": torch.randn(64, 6, generator=rng)},
        seed=seed,
    )


def planted_source(
    num_neurons: int, num_experts: int, seed: int = 0
) -> tuple[PartitionInput, Tensor]:
    """Neurons of group g share a direction of the weights and fire on the tokens of topic g."""
    rng = torch.Generator().manual_seed(seed)
    group_F = torch.arange(num_neurons) % num_experts
    group_F = group_F[torch.randperm(num_neurons, generator=rng)]
    topic_T = torch.arange(40 * num_experts) % num_experts
    on_TF = topic_T[:, None] == group_F
    noise_TF = torch.randn(on_TF.shape, generator=rng)
    hidden_TF = torch.where(on_TF, 1.0, 0.2) * (noise_TF + torch.sign(noise_TF))
    centre_GD = torch.linalg.qr(torch.randn(32, num_experts, generator=rng))[0].T
    noise_FD = 0.05 * torch.randn(num_neurons, 32, generator=rng)
    scale_F1 = torch.rand(num_neurons, 1, generator=rng) + 0.5
    source = PartitionInput(
        num_experts=num_experts,
        num_neurons=num_neurons,
        up_FD=scale_F1 * (centre_GD[group_F] + noise_FD),
        gate_FD=scale_F1 * (centre_GD[group_F] + noise_FD.flip(0)),
        stats=statistics(hidden_TF, torch.ones(num_neurons)),
        seed=seed,
    )
    return source, group_F


def blocks(permutation_F: Tensor, num_experts: int) -> set[frozenset[int]]:
    return {frozenset(block) for block in permutation_F.reshape(num_experts, -1).tolist()}


def within(matrix_FF: Tensor, permutation_F: Tensor, num_experts: int) -> float:
    """Sum of the matrix over all pairs of neurons in one block."""
    order_EF = permutation_F.reshape(num_experts, -1).numpy()
    matrix = matrix_FF.numpy()
    return float(sum(matrix[np.ix_(block, block)].sum() for block in order_EF))
