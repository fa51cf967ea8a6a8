"""Top-k over noisy scores, and a softmax of those that were kept.

Source: sparsely-gated MoE, arXiv 1701.06538, section 2.1, as LLaMA-MoE, arXiv 2406.16554, uses it:
its two gates and the factor on the weights. The chance that an expert is among the top k, which the
loss `load` sums, is that of appendix A of the former, judged by the noisy scores; LLaMA-MoE's
released code compares the noise alone. Ours: the first weights of the two-layer gate. The noise is
drawn from torch's global generator, as dropout's is.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing

# Noise that never leaves, so that the chance of being chosen has a gradient.
_NOISE_FLOOR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyTopKConfig:
    """Settings of the noisy top-k router.

    Attributes:
        top_k: Experts per token. With 1 the one weight is constant, so that the losses `importance`
            and `load` are all that teaches the router.
        gate: What scores a token: `mlp` (LLaMA-MoE's default) is a linear map to E values, their
            tanh and a map of these; `linear` is one map that starts at zero.
        scale: Factor on the weights, which sum to one without it. LLaMA-MoE takes E / K, so that
            the experts of a cut network together weigh what they weighed in it.
    """

    top_k: int = 2
    gate: Literal["mlp", "linear"] = "mlp"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if not 0.0 < self.scale < float("inf"):
            raise InputError(
                f"scale must be above 0, got {self.scale}; num_experts / top_k is usual"
            )


class NoisyTopK(Router):
    """LLaMA-MoE's router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    training_only = frozenset({"noise"})
    # With a single slot its weights are all alike and do not tell.
    score_gate = "softmax"

    def __init__(self, dim: int, num_experts: int, config: NoisyTopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        # Plain attribute: a conversion may calibrate it.
        self.scale = config.scale
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.mix = (
            nn.Parameter(torch.empty(num_experts, num_experts)) if config.gate == "mlp" else None
        )
        self.noise = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a small random gate, or a zero one if it is linear; the noise starts at zero."""
        if self.mix is None:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=0.02)
            nn.init.uniform_(self.mix, -(self.num_experts**-0.5), self.num_experts**-0.5)
        nn.init.zeros_(self.noise)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k, in training by noisy scores.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, best first; scores are what was compared, noisy in training. Where they
            are and k < E, E more columns say how far inside the top k each expert is, in standard
            deviations of its noise: its chance of being chosen is their normal distribution.
        """
        scores_TE = self._gate(h_TD)
        if not self.training:
            return self._choose(scores_TE, scores_TE)
        spread_TE = nnf.softplus(linear_scores(h_TD, self.noise)) + _NOISE_FLOOR
        noisy_TE = scores_TE + torch.randn_like(scores_TE) * spread_TE
        top_k = self.config.top_k
        if top_k == self.num_experts:
            return self._choose(noisy_TE, noisy_TE)
        best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
        last_T1, next_T1 = best_TK[:, top_k - 1 : top_k], best_TK[:, top_k:]
        # Drawn again, an expert of the top k must beat the best outside, another the last inside.
        bar_TE = torch.where(noisy_TE >= last_T1, next_T1, last_T1)
        inside_TE = (scores_TE - bar_TE) / spread_TE
        return self._choose(noisy_TE, torch.cat([noisy_TE, inside_TE], dim=1))

    def _gate(self, h_TD: Tensor) -> Tensor:
        scores_TE = linear_scores(h_TD, self.weight)
        return scores_TE if self.mix is None else linear_scores(scores_TE.tanh(), self.mix)

    def _choose(self, compared_TE: Tensor, scores_TE: Tensor) -> Routing:
        best_TK, ids_TK = compared_TE.topk(self.config.top_k, dim=-1)
        weights_TK = best_TK.softmax(-1) * self.scale
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, gate={self.config.gate}, "
            f"scale={self.scale:.4g}"
        )
