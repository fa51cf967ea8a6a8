"""The interface of a set of experts, and what gated and plain ones share.

Shapes: T tokens, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from moesaic.nn.routing import Routing
from moesaic.ops.masked import experts_masked
from moesaic.ops.select import Backend, apply_experts
from moesaic.ops.weights import ExpertWeights, Packed, activation


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


class Experts(nn.Module, ABC):
    """E feed-forward experts of equal width.

    Attributes:
        num_experts: E.
        width: F, neurons of one expert.
        backend: Path that computes them; `auto` chooses (see `moesaic.ops.select`).
        packed: A copy for the native CPU code; see `moesaic.inference.pack_experts`.
    """

    num_experts: int
    width: int
    backend: Backend = "auto"
    packed: Packed | None = None

    @abstractmethod
    def weights(self) -> ExpertWeights:
        """Give the weights to an expert path."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh weights."""

    def forward(self, h_TD: Tensor, routing: Routing | None = None) -> Tensor:
        """Sum the weighted outputs of each token's experts, [T, D]; without routing, of all."""
        if routing is None:
            return self.dense(h_TD)
        weights = self.weights()._replace(packed=self.packed)
        return apply_experts(h_TD, routing.ids_TK, routing.weights_TK, weights, self.backend)

    def dense(self, h_TD: Tensor) -> Tensor:
        """Sum all experts at weight one: the dense FFN, [T, D]."""
        return experts_masked(h_TD, None, self.weights())

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"experts={self.num_experts}, width={self.width}, backend={self.backend}"
