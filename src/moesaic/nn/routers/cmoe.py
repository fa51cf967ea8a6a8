"""CMoE's router: each expert is scored by one of its neurons, and a bias balances the load.

Source: CMoE, arXiv 2502.04416: scores |(W_u h) * act(W_g h)| of the representative neurons, whose
rows have unit length (the inputs do not); softmax; the highest of probability plus bias; a chosen
expert weighs 1 + probability * scale with a scale that starts at zero; no balance loss. Ours: the
bias moves when an optimiser step ends, by the loads of all its passes, and is stored as a whole
number of steps, which half precision would swallow.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState, check_top_k, linear_scores
from moesaic.nn.routers._loads import StepLoads
from moesaic.nn.routing import Routing
from moesaic.ops.weights import activation


@dataclass(frozen=True, slots=True, kw_only=True)
class CMoERouterConfig:
    """Settings of CMoE's router.

    Attributes:
        top_k: Routed experts per token.
        activation: Of the gate, that of the network the experts were cut from.
        bias_step: How far a training step moves the bias of an expert that more or fewer tokens
            than the mean chose; 0.001 is the paper's, 0 leaves the load alone.
    """

    top_k: int = 2
    activation: str = "silu"
    bias_step: float = 0.001

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        activation(self.activation)
        if not 0.0 <= self.bias_step < float("inf"):
            raise InputError(f"bias_step must be at least 0, got {self.bias_step}; 0.001 is usual")


class CMoERouter(Router):
    """CMoE's router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    balance: Tensor

    def __init__(self, dim: int, num_experts: int, config: CMoERouterConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.loads = StepLoads(num_experts)
        # Up rows and gate rows of the representative neurons, [E, D] each.
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.gate = nn.Parameter(torch.empty(num_experts, dim))
        self.scale = nn.Parameter(torch.empty(num_experts))
        self.register_buffer("balance", torch.zeros(num_experts, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random rows; scale and bias start at zero."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.normal_(self.gate, std=0.02)
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.balance)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, best first; scores are those before the softmax.
        """
        act = activation(self.config.activation)
        up_TE, gate_TE = linear_scores(h_TD, self.weight), linear_scores(h_TD, self.gate)
        scores_TE = (up_TE * act(gate_TE)).abs()
        probs_TE = scores_TE.softmax(-1)
        bias_E = self.config.bias_step * self.balance
        ids_TK = (probs_TE.detach() + bias_E).topk(self.config.top_k, dim=-1).indices
        scale_TK = self.scale.to(probs_TE.dtype)[ids_TK]
        weights_TK = 1 + probs_TE.gather(1, ids_TK) * scale_TK
        if self.training:
            self.loads.watch(ids_TK, scores_TE)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def end_step(self) -> None:
        """Raise the bias of experts below the mean load by a step, lower that of those above."""
        load_E = self.loads.take()
        if load_E is not None:
            self.balance += (load_E.double().mean() - load_E).sign().long()

    def forget_step(self) -> None:
        """Drop the loads of a step that was skipped."""
        self.loads.drop()

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"bias_step={self.config.bias_step}"
        )
