"""The k highest sigmoid gates; a bias takes part in the choice and not in the weight.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (equations 14 to 16), as GLM-4.5 and its
relatives use it: sigmoid gates, the highest of gate plus bias are chosen, each weighs its gate
times a factor. With groups of neighbours a token first chooses groups, by the sum of the best two
of gate plus bias in each, and then experts inside them (node-limited routing), so that it visits
few nodes; experts outside cannot be chosen, whatever their bias. The bias stays, or moves as in
auxiliary-loss-free balancing, arXiv 2408.15664, algorithm 1: after an optimiser step an expert that
was chosen less than the mean rises by a step, one that was chosen more falls; `analysis/balance.py`
has the theory of it, arXiv 2512.03915. Padding counts as load: the router does not know it.

It is what a router with a threshold (`sigmoid-threshold`) becomes for software that knows a fixed
number of experts per token.

Shapes: T tokens, D model width, E experts, K experts per token, G groups of N = E / G neighbours, J
groups that a token may use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState, check_top_k, linear_scores
from moesaic.nn.routers._loads import StepLoads
from moesaic.nn.routing import Routing
from moesaic.ops.choice import Choice, ScoreMap


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmoidTopKConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts per token.
        scale: What every gate is multiplied by. E over `top_k` makes up for the experts that are
            off, as DSMoE does for as many.
        normalize: Whether the chosen gates are divided by their sum, as DeepSeek-V3 does and the
            paper of the balancing does not.
        num_groups: G, such as nodes that hold the experts; it divides E. 1 is no groups;
            DeepSeek-V3 has 8.
        top_groups: J, groups that a token may use; they hold at least `top_k` experts. DeepSeek-V3
            allows 4.
        bias_step: How far an optimiser step moves the bias, in units of gates; 0 leaves it alone,
            0.001 is usual: a tenth is slow at first, ten times as much swings at the end.
        bias_rule: `sign` moves every expert off the mean by the same; `proportional` by
            `bias_step` for each choice that it lies off the mean, which is no better.
    """

    top_k: int = 2
    scale: float = 1.0
    normalize: bool = False
    num_groups: int = 1
    top_groups: int = 1
    bias_step: float = 0.0
    bias_rule: Literal["sign", "proportional"] = "sign"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if not 0.0 < self.scale < float("inf"):
            raise InputError(f"scale must be above 0, got {self.scale}; 1 leaves gates as they are")
        if not 1 <= self.top_groups <= self.num_groups:
            raise InputError(
                f"top_groups must be in [1, num_groups={self.num_groups}], got {self.top_groups}; "
                "1 and 1 are no groups"
            )
        if not 0.0 <= self.bias_step < float("inf"):
            raise InputError(f"bias_step must be at least 0, got {self.bias_step}; 0.001 is usual")


class SigmoidTopK(Router):
    """Sigmoid gates, of which the k highest count.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.

    Attributes:
        choice_bias: Added to the gates for the choice alone, [E] float32.
    """

    choice_bias: Tensor

    def __init__(self, dim: int, num_experts: int, config: SigmoidTopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        _check_groups(config, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.loads = StepLoads(num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("choice_bias", torch.empty(num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random rows; no expert is preferred."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.choice_bias)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, highest first; scores are the gate logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        gates_TE = scores_TE.sigmoid()
        choice_TE = gates_TE.detach() + self.choice_bias.to(gates_TE.dtype)
        ids_TK = self._in_groups(choice_TE).topk(self.config.top_k, dim=-1).indices
        weights_TK = gates_TE.gather(1, ids_TK)
        if self.config.normalize:
            # Gates that are all zero in this precision keep a finite gradient.
            tiny = torch.finfo(weights_TK.dtype).tiny
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp(min=tiny)
        if self.training and self.config.bias_step > 0:
            self.loads.watch(ids_TK, scores_TE)
        return Routing(ids_TK, weights_TK * self.config.scale, scores_TE, self.num_experts)

    def _in_groups(self, choice_TE: Tensor) -> Tensor:
        """Bar the experts outside of the groups that each token chooses, [T, E]."""
        config = self.config
        if config.top_groups == config.num_groups:
            return choice_TE
        choice_TGN = choice_TE.unflatten(1, (config.num_groups, -1))
        best_TG = choice_TGN.topk(min(2, choice_TGN.shape[2]), dim=-1).values.sum(-1)
        groups_TJ = best_TG.topk(config.top_groups, dim=-1).indices
        barred_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, groups_TJ, False)
        allowed_TGN: Tensor = choice_TGN.masked_fill(barred_TG.unsqueeze(2), -torch.inf)
        return allowed_TGN.flatten(1)

    def choice(self) -> Choice:
        """The highest gates plus bias, of the groups with the best two."""
        return Choice(
            "highest",
            "sigmoid",
            top_k=self.config.top_k,
            normalize="sum" if self.config.normalize else "none",
            scale=self.config.scale,
            by_gate=True,
            num_groups=self.config.num_groups,
            top_groups=self.config.top_groups,
        )

    def score_map(self) -> ScoreMap:
        """Its map and the bias of its choice."""
        return ScoreMap(self.weight, choice_bias=self.choice_bias)

    def end_step(self) -> None:
        """Move the bias of every expert towards the mean load of the step."""
        load_E = self.loads.take()
        if load_E is None:
            return
        below_E = load_E.double().mean() - load_E
        if self.config.bias_rule == "sign":
            below_E = below_E.sign()
        # In half precision the sum would be the bias again; from here on it is kept in full.
        dtype = torch.promote_types(self.choice_bias.dtype, torch.float32)
        if self.choice_bias.dtype != dtype:
            self.choice_bias = self.choice_bias.to(dtype)
        self.choice_bias += (self.config.bias_step * below_E).to(dtype)

    def forget_step(self) -> None:
        """Drop the loads of a step that was skipped."""
        self.loads.drop()

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"scale={self.config.scale:g}, bias_step={self.config.bias_step:g}"
        )


def _check_groups(config: SigmoidTopKConfig, num_experts: int) -> None:
    """Refuse groups that are not equal, or too few for the experts of a token."""
    size, rest = divmod(num_experts, config.num_groups)
    if rest:
        raise InputError(
            f"num_groups must divide num_experts={num_experts}, got {config.num_groups}; choose a "
            "divisor"
        )
    if config.top_k > config.top_groups * size:
        raise InputError(
            f"top_k must be at most the {config.top_groups * size} experts of top_groups="
            f"{config.top_groups}, got {config.top_k}; raise top_groups or lower top_k"
        )
