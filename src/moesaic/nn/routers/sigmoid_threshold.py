"""DSMoE's router: an independent sigmoid gate per expert, on where it exceeds a threshold.

Source: DSMoE, arXiv 2502.12455, section 3.2. Ours: the count of active experts is clamped to one
(the paper leaves 0/0 open), the optional bias, the weight of one, the switch for the
normalisation, the estimator that skips and scores of low rank.

Shapes: T tokens, D model width, E experts, R rank of the scores.
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
        rank: Numbers that the scores are made of: two maps, [R, D] and [E, R], in place of one. 0
            for one map (the paper). With hundreds of experts it is what keeps the router small.
            Torch routes then, native code does not.
    """

    threshold: float = 0.5
    estimator: Literal["straight-through", "hard", "soft", "hard-skip"] = "straight-through"
    value: Literal["gate", "one"] = "gate"
    normalize: Literal["count", "none"] = "count"
    bias: bool = False
    rank: int = 0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise InputError(f"rank must be at least 0, got {self.rank}; 0 is one whole map")
        if not 0.0 <= self.threshold < 1.0:
            raise InputError(
                f"threshold must be in [0, 1), got {self.threshold}; 0.5 is the paper's"
            )
        if self.value == "one" and self.estimator != "straight-through":
            raise InputError(
                f"value 'one' leaves estimator {self.estimator!r} no gradient; use "
                "'straight-through' or value 'gate'"
            )


def check_rank(rank: int, num_experts: int, dim: int) -> None:
    """Refuse a rank that is that of the whole map, or above."""
    if rank and rank >= min(num_experts, dim):
        raise InputError(
            f"rank must be below {min(num_experts, dim)} for {num_experts} experts of width {dim}, "
            f"got {rank}; lower it, or 0 for one whole map"
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
        check_rank(config.rank, num_experts, dim)
        self.weight = nn.Parameter(torch.empty(num_experts, config.rank or dim))
        self.down = nn.Parameter(torch.empty(config.rank, dim)) if config.rank else None
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random gates; the paper does not state a distribution."""
        nn.init.normal_(self.weight, std=0.02)
        if self.down is not None:
            # Of as many scores of the same size, whatever the rank.
            nn.init.normal_(self.down, std=self.config.rank**-0.5)
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
        return self.decide(self.scores(h_TD))

    def scores(self, h_TD: Tensor) -> Tensor:
        """Gate logits in float32 or better, [T, E]."""
        if self.down is not None:
            h_TD = linear_scores(h_TD, self.down)
        return linear_scores(h_TD, self.weight, self.bias)

    def map_ED(self) -> Tensor:
        """The map behind the scores, whatever its rank, [E, D]."""
        return self.weight if self.down is None else self.weight @ self.down

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

    def choice(self) -> Choice | None:
        """Gates above the threshold of now; none where it takes two maps."""
        if self.down is not None:
            return None
        return Choice(
            "above",
            "sigmoid" if self.config.value == "gate" else "one",
            threshold=self.threshold,
            normalize=self.config.normalize,
        )

    def score_map(self) -> ScoreMap:
        """Its map and, if it has one, its bias."""
        if self.down is not None:
            return super().score_map()
        return ScoreMap(self.weight, bias=self.bias)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, threshold={self.threshold}, {self.config.estimator}"
