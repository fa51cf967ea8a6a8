"""What can be measured at a feed-forward network, a chunk of tokens at a time.

Each collector states the memory it holds for one layer, beside the chunk it works on. Methods name
the collectors they need.

Shapes: T tokens, D model width, F neurons, E experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moesaic._errors import InputError, RunError
from moesaic.models.ffn import FFN
from moesaic.nn.layer import MoELayer
from moesaic.ops.weights import ExpertWeights

# Tokens whose co-activation counts at most once.
_GROUP = 8


class Collector(Protocol):
    """Gathers one kind of statistics of one layer."""

    def update(self, h_TD: Tensor) -> None:
        """Take in some tokens."""

    def result(self) -> dict[str, Tensor]:
        """What was measured so far."""


class Inputs:
    """The inputs themselves, in bfloat16: 2 * T * D bytes, twice that while they are joined.

    Enough to derive anything later, such as the Grams of blocks that are not cut yet.
    """

    def __init__(self, ffn: FFN | MoELayer) -> None:
        self.pieces: list[Tensor] = []

    def update(self, h_TD: Tensor) -> None:
        """Keep the tokens."""
        self.pieces.append(h_TD.to(torch.bfloat16))

    def result(self) -> dict[str, Tensor]:
        """`h_TD`."""
        return {"h_TD": torch.cat(self.pieces)}


class Moments:
    """Second moments of the input: 4 * D * D bytes."""

    def __init__(self, ffn: FFN | MoELayer) -> None:
        self.sum_DD: Tensor | None = None
        self.sum_D: Tensor | None = None
        self.count = 0

    def update(self, h_TD: Tensor) -> None:
        """Add the tokens."""
        h_TD = h_TD.float()
        second, first = h_TD.T @ h_TD, h_TD.sum(0)
        self.sum_DD = second if self.sum_DD is None else self.sum_DD.add_(second)
        self.sum_D = first if self.sum_D is None else self.sum_D.add_(first)
        self.count += h_TD.shape[0]

    def result(self) -> dict[str, Tensor]:
        """`second_DD` and `mean_D`."""
        assert self.sum_DD is not None
        assert self.sum_D is not None
        return {"second_DD": self.sum_DD / self.count, "mean_D": self.sum_D / self.count}


class Neurons:
    """Activity and co-activation of the neurons of a dense network: 4 * F * (F + 4) bytes.

    A neuron's value a_j is the input of the down product. Its energy counts what it contributes to
    the output: the mean of (a_j times the length of its down column) squared.
    """

    def __init__(self, ffn: FFN | MoELayer) -> None:
        self.ffn = _dense("neurons", ffn)
        self.norm_F = self.ffn.down_DF.float().norm(dim=0)
        self.sum_F = torch.zeros_like(self.norm_F)
        self.square_F = torch.zeros_like(self.norm_F)
        self.value_F = torch.zeros_like(self.norm_F)
        self.sum_FF = self.norm_F.new_zeros(self.ffn.width, self.ffn.width)
        self.count = 0

    def update(self, h_TD: Tensor) -> None:
        """Add the tokens."""
        a_TF = self.ffn.neurons(h_TD).float()
        self.value_F += a_TF.sum(0)
        self.square_F += a_TF.square().sum(0)
        size_TF = a_TF.abs()
        self.sum_F += size_TF.sum(0)
        self.sum_FF.addmm_(size_TF.T, size_TF)
        self.count += h_TD.shape[0]

    def result(self) -> dict[str, Tensor]:
        """`coactivation_FF` (of |a|), `activity_F`, `energy_F`, `mean_F` and `variance_F`."""
        mean_F = self.value_F / self.count
        square_F = self.square_F / self.count
        return {
            "coactivation_FF": self.sum_FF / self.count,
            "activity_F": self.sum_F / self.count,
            "energy_F": square_F * self.norm_F.square(),
            "mean_F": mean_F,
            "variance_F": (square_F - mean_F.square()).clamp_(min=0),
        }


class Adjacency:
    """How often neurons are strong together, a group of 8 tokens at a time: 8 * F * F bytes.

    The graph of MoEfication, arXiv 2110.01786, as its released code counts it: the products of the
    values of two neurons, summed over the tokens of a group and at most 1, summed over groups. Its
    values are those of a ReLU; ours are absolute, which is the same there. Slow: every group passes
    over the whole matrix.
    """

    def __init__(self, ffn: FFN | MoELayer) -> None:
        self.ffn = _dense("adjacency", ffn)
        self.sum_FF = torch.zeros(self.ffn.width, self.ffn.width, device=self.ffn.up_FD.device)
        self.group_FF = torch.empty_like(self.sum_FF)
        self.rest_TF = self.sum_FF.new_empty(0, self.ffn.width)

    def update(self, h_TD: Tensor) -> None:
        """Add the groups that are whole and hold the rest."""
        size_TF = torch.cat([self.rest_TF, self.ffn.neurons(h_TD).float().abs()])
        whole = len(size_TF) - len(size_TF) % _GROUP
        for group_TF in size_TF[:whole].split(_GROUP):
            torch.mm(group_TF.T, group_TF, out=self.group_FF)
            self.sum_FF += self.group_FF.clamp_(max=1.0)
        self.rest_TF = size_TF[whole:].clone()

    def result(self) -> dict[str, Tensor]:
        """`adjacency_FF`; the last tokens are a smaller group."""
        last_FF = (self.rest_TF.T @ self.rest_TF).clamp_(max=1.0)
        return {"adjacency_FF": self.sum_FF + last_FF}


class Grams:
    """Mean Gram matrix of the experts' outputs in a converted layer: 4 * E * E bytes."""

    def __init__(self, ffn: FFN | MoELayer) -> None:
        if not isinstance(ffn, MoELayer) or ffn.experts is None:
            raise InputError(
                "collector 'grams' needs converted layers that have experts, got one without; "
                "convert the model first"
            )
        self.weights = ffn.experts.weights()
        num_experts = self.weights.num_experts
        self.sum_EE = torch.zeros(num_experts, num_experts, device=self.weights.up.device)
        self.count = 0

    def update(self, h_TD: Tensor) -> None:
        """Add the tokens."""
        o_TED = block_outputs(h_TD, self.weights)
        self.sum_EE += torch.einsum("ted,tfd->ef", o_TED, o_TED)
        self.count += h_TD.shape[0]

    def result(self) -> dict[str, Tensor]:
        """`gram_EE`."""
        return {"gram_EE": self.sum_EE / self.count}


class Routes:
    """The routing of every token in a converted layer: 4 * T * K bytes for K slots."""

    def __init__(self, ffn: FFN | MoELayer) -> None:
        if not isinstance(ffn, MoELayer) or ffn.router is None:
            raise InputError(
                "collector 'routes' needs converted layers that have a router, got one without; "
                "convert the model first"
            )
        if len(ffn.turns()) > 1:
            raise InputError(
                f"collector 'routes' reads one routing of a layer, got {len(ffn.turns())} "
                "iterations; calibrate without it"
            )
        self.router = ffn.router
        self.ids: list[Tensor] = []
        self.weights: list[Tensor] = []

    def update(self, h_TD: Tensor) -> None:
        """Route the tokens."""
        routing = self.router(h_TD)
        self.ids.append(routing.ids_TK.to(torch.int16))
        self.weights.append(routing.weights_TK.to(torch.bfloat16))

    def result(self) -> dict[str, Tensor]:
        """`ids_TK` and `weights_TK`.

        Raises:
            RunError: If an expert was never used.
        """
        ids_TK = torch.cat(self.ids)
        used = set(ids_TK.unique().tolist())
        unused = [e for e in range(self.router.num_experts) if e not in used]
        if unused:
            raise RunError(
                f"experts {unused} saw none of {len(ids_TK)} tokens; calibrate on more text"
            )
        return {"ids_TK": ids_TK, "weights_TK": torch.cat(self.weights)}


COLLECTORS: dict[str, type[Adjacency | Inputs | Moments | Neurons | Grams | Routes]] = {
    "adjacency": Adjacency,
    "grams": Grams,
    "inputs": Inputs,
    "moments": Moments,
    "neurons": Neurons,
    "routes": Routes,
}


def _dense(collector: str, ffn: FFN | MoELayer) -> FFN:
    """Refuse a layer that is no dense network any more."""
    if isinstance(ffn, MoELayer):
        raise InputError(
            f"collector {collector!r} needs a dense network, got a converted layer; give the dense "
            "parent"
        )
    return ffn


def block_neurons(h_TD: Tensor, weights: ExpertWeights) -> Tensor:
    """Neurons of every expert for every token, [T, E, F] in float32; callers bound T."""
    bias = None if weights.up_bias is None else weights.up_bias.flatten()
    z_TM = nnf.linear(h_TD, weights.up.flatten(0, 1), bias)
    return weights.activate(z_TM.unflatten(1, (weights.num_experts, -1))).float()


def block_outputs(h_TD: Tensor, weights: ExpertWeights) -> Tensor:
    """Output of every expert for every token, [T, E, D] in float32; callers bound T."""
    o_TED = torch.einsum("tef,edf->ted", block_neurons(h_TD, weights), weights.down.float())
    return o_TED if weights.down_bias is None else o_TED + weights.down_bias.float()
