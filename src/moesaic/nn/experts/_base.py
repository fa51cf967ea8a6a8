"""The interface of a set of experts, and what gated and plain ones share.

Shapes: T tokens, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.part import Part
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routing import Routing
from moesaic.ops.masked import experts_masked
from moesaic.ops.select import Backend, apply_experts
from moesaic.ops.weights import ExpertWeights, Packed, activation

# Matrices that nobody pruned hold a few zeros too, above all dequantised ones.
STRAY_ZEROS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """Settings of feed-forward experts.

    Attributes:
        activation: Name of the activation, as transformers spells it.
        bias: Whether the up product has a bias.
        down_bias: Whether the output of each expert has a bias, which its weight scales with the
            rest of it. A bias that is there whatever is on belongs to the layer.
    """

    activation: str = "silu"
    bias: bool = False
    down_bias: bool = False

    def __post_init__(self) -> None:
        activation(self.activation)


class Experts(Part, ABC):
    """E experts of equal width, feed-forward networks as a rule.

    Attributes:
        num_experts: E.
        width: F, neurons of one expert.
        backend: Path that computes them; `auto` chooses (see `moesaic.ops.select`).
        packed: A copy for the native CPU code; see `moesaic.inference.pack_experts`.
        shared_kind: Name of the kind that a layer's shared part is of, if it is another.
    """

    num_experts: int
    width: int
    backend: Backend = "auto"
    packed: Packed | None = None
    shared_kind: ClassVar[str] = ""

    def weights(self) -> ExpertWeights:
        """Give the weights to an expert path.

        Raises:
            InputError: If the experts are no feed-forward networks, or of several kinds.
        """
        raise InputError(
            f"{type(self).__name__} have no up and down products that others could compute or "
            "change; use gated or plain experts for that"
        )

    def forward(
        self, h_TD: Tensor, routing: Routing | None = None, state: RouterState | None = None
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts, [T, D]; without routing, of all.

        Args:
            h_TD: Inputs, [T, D].
            routing: Experts of every token.
            state: What experts need that do not read the token alone.
        """
        if routing is None:
            return self.dense(h_TD, state)
        weights = self.weights()._replace(packed=self.packed)
        return apply_experts(h_TD, routing.ids_TK, routing.weights_TK, weights, self.backend)

    def dense(self, h_TD: Tensor, state: RouterState | None = None) -> Tensor:
        """Sum all experts at weight one: the dense FFN, [T, D]."""
        weights = self.weights()
        return experts_masked(weights.cut_inputs(h_TD), None, weights)

    def aux_losses(self, routing: Routing) -> Mapping[str, Tensor]:
        """Scalar losses that only the experts can compute, by name; most have none.

        Args:
            routing: With which they ran, over their own experts.
        """
        return {}

    def own_weights(self) -> int:
        """Weights that one expert multiplies, those of `common_weights` left out."""
        weights = self.weights()
        return weights.up[0].numel() + weights.down[0].numel()

    def common_weights(self) -> int:
        """Weights of the matrices that experts have in common; a token is taken to use all."""
        return 0

    def neuron_weights(self) -> int:
        """Weights of one neuron of the dense network that such experts stand for.

        Its rows of the up product and its column of the down product: the unit in which
        `moesaic.nn.shape` counts what is on.
        """
        weights = self.weights()
        return (3 if weights.gated else 2) * weights.down.shape[1]

    def unused_weights(self, num_off: float) -> float:
        """Weights of the matrices that a token does not use when so many experts are off."""
        return num_off * self.own_weights()

    def own_width(self) -> float:
        """Neurons of that dense network which one expert's own weights make."""
        return self.own_weights() / self.neuron_weights()

    def common_width(self) -> float:
        """Neurons of that dense network which the weights in common make."""
        weights = self.common_weights()
        return weights / self.neuron_weights() if weights else 0.0

    def used_share(self) -> float | None:
        """Share of the matrices' weights that every token uses when all experts are on.

        A weight of exactly zero is not used: that is how static pruning without a change of shape
        shows. Up to one zero in a hundred is taken for chance, so that experts which nobody pruned
        count as one whole.

        Returns:
            In [0, 1]; none where it depends on the token, so that only `used_TE` knows.
        """
        weights = self.weights()
        total = weights.up.numel() + weights.down.numel()
        used = int(weights.up.count_nonzero()) + int(weights.down.count_nonzero())
        return 1.0 if used >= (1.0 - STRAY_ZEROS) * total else used / total

    def expected_share(self) -> float:
        """Share of an expert's weights that a token uses where it is on, as budgets count it."""
        return 1.0

    def used_TE(self, h_TD: Tensor) -> Tensor:
        """Share of each expert's weights that each token uses when it is on.

        Args:
            h_TD: Inputs, [T, D].

        Returns:
            [T, E] float64 in [0, 1].
        """
        share = self.used_share()
        assert share is not None, "experts without a fixed share override used_TE"
        return constant_share(h_TD, share).unsqueeze(1).expand(-1, self.num_experts)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"experts={self.num_experts}, width={self.width}, backend={self.backend}"


def constant_share(h_TD: Tensor, share: float) -> Tensor:
    """A share of weights that every token uses, [T] float64."""
    return torch.full(h_TD.shape[:1], share, dtype=torch.float64, device=h_TD.device)
