"""DSMoE's router: an independent sigmoid gate per expert, on where it exceeds a threshold.

Source: DSMoE, arXiv 2502.12455, section 3.2. Ours: the count of active experts is clamped to one
(the paper leaves 0/0 open), the optional bias, the weight of one, the switch for the
normalisation and the estimator that skips.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState, linear_scores
from moesaic.nn.routing import Routing
from moesaic.ops.choice import Choice, ScoreMap


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmoidThresholdConfig:
    """Settings of the DSMoE router.

    Attributes:
        threshold: A gate above it is on, strictly. May be moved after training: higher is cheaper.
        estimator: `straight-through` (the paper) lets an expert that is off learn whether its
            output would have lowered the loss. `hard` (its Table 3) gives gates that are off no
            gradient; `soft` (its Figure 2) trains with all gates on and thresholds at inference.
            `hard-skip` (ours, not the paper's method) learns exactly what `hard` does and does
            not compute experts that are off: a cheaper step, in which a gate that is off never
            hears from the output that it should have been on.
        value: What an active expert weighs: its `gate` (the paper) or `one`, which makes a router
            with every gate on the dense parent exactly.
        normalize: `count` multiplies the output by E over the number of active experts, as the
            paper does; `none` leaves it.
        bias: Whether gates have a bias; the paper's have none.
    """

    threshold: float = 0.5
    estimator: Literal["straight-through", "hard", "soft", "hard-skip"] = "straight-through"
    value: Literal["gate", "one"] = "gate"
    normalize: Literal["count", "none"] = "count"
    bias: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < 1.0:
            raise InputError(
                f"threshold must be in [0, 1), got {self.threshold}; 0.5 is the paper's"
            )
        if self.value == "one" and self.estimator != "straight-through":
            raise InputError(
                f"value 'one' leaves estimator {self.estimator!r} no gradient; use "
                "'straight-through' or value 'gate'"
            )


class SigmoidThreshold(Router):
    """DSMoE's router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    score_gate = "sigmoid"
    moving = ("threshold",)

    def __init__(self, dim: int, num_experts: int, config: SigmoidThresholdConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        # Plain attribute: the operating point moves after training.
        self.threshold = config.threshold
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random gates; the paper does not state a distribution."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Gate every expert; see `decide`.

        Args:
            h_TD: Inputs of the FFN, [T, D].
            state: Ignored.

        Returns:
            Slots in expert order, K = E; scores are the gate logits.
        """
        return self.decide(linear_scores(h_TD, self.weight, self.bias))

    def decide(self, scores_TE: Tensor) -> Routing:
        """Turn gate logits into a routing.

        In training every slot holds its expert and switched-off ones weigh exactly zero, since
        the straight-through estimator needs their outputs; in evaluation, and with `hard-skip`
        always, their slots are empty.

        Args:
            scores_TE: Gate logits, [T, E].

        Returns:
            Slots in expert order, K = E.
        """
        gates_TE = scores_TE.sigmoid()
        on_TE = gates_TE > self.threshold
        if self.training and self.config.estimator == "soft":
            on_TE = torch.ones_like(on_TE)
        if self.config.value == "gate":
            weights_TE = gates_TE * on_TE
        else:
            weights_TE = on_TE.to(gates_TE.dtype)
        if self.training and self.config.estimator == "straight-through":
            # Value G(g), derivative one: the difference is exactly zero.
            weights_TE = weights_TE.detach() + (gates_TE - gates_TE.detach())
        if self.config.normalize == "count":
            count_T1 = on_TE.sum(1, keepdim=True).clamp(min=1)
            weights_TE = weights_TE * (self.num_experts / count_T1.to(weights_TE.dtype))
        ids_TE = torch.arange(self.num_experts, device=scores_TE.device).expand_as(on_TE)
        if not self.training or self.config.estimator == "hard-skip":
            ids_TE = torch.where(on_TE, ids_TE, self.num_experts)
        return Routing(ids_TE, weights_TE, scores_TE, self.num_experts)

    def choice(self) -> Choice:
        """Gates above the threshold of now."""
        return Choice(
            "above",
            "sigmoid" if self.config.value == "gate" else "one",
            threshold=self.threshold,
            normalize=self.config.normalize,
        )

    def score_map(self) -> ScoreMap:
        """Its map and, if it has one, its bias."""
        return ScoreMap(self.weight, bias=self.bias)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, threshold={self.threshold}, {self.config.estimator}"
