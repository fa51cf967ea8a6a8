"""Top-k over experts and free ones: easy tokens take what costs nothing; layers hear each other.

Source: MoE++, arXiv 2410.07348, section 3: softmax over all experts, the top k weigh their
probability, not renormalised. With gating residuals the scores of the MoE layer before, its own
residual among them, are mapped and added: G_j = W_j x_j + V_j G_(j-1). The authors' code doubles
the input, leaves zero experts out of the weights and scores by two layers; this is the paper. Ours:
V starts at zero. Left out: the capacity of experts in training.

Shapes: T tokens, D model width, E experts, Z free experts, N = E + Z, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.free import FreeKind
from moesaic.nn.routers._base import LinearRouter, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroComputationConfig:
    """Settings of the router with free experts.

    Attributes:
        top_k: Experts per token, free ones among them.
        num_zero: Experts that give nothing.
        num_copy: Experts that give their input.
        num_constant: Experts that mix their input with a learned vector; the paper's number is
            E / 4 less the others, at least 1. They help most, and too many hurt.
        residual: Whether the scores of the layer before are added. Set it in every layer but the
            first, which has none before; all layers then have as many experts of each kind.
    """

    top_k: int = 2
    num_zero: int = 1
    num_copy: int = 1
    num_constant: int = 2
    residual: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; 2 is usual")
        counts = (self.num_zero, self.num_copy, self.num_constant)
        if min(counts) < 0:
            raise InputError(
                "num_zero, num_copy and num_constant must be at least 0, got "
                f"{', '.join(map(str, counts))}; 1, 1 and 2 are usual"
            )


class ZeroComputation(LinearRouter):
    """MoE++'s router.

    Args:
        dim: D.
        num_experts: E, those with neurons.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: ZeroComputationConfig) -> None:
        counts: dict[FreeKind, int] = {
            "zero": config.num_zero,
            "copy": config.num_copy,
            "constant": config.num_constant,
        }
        free = tuple(kind for kind, count in counts.items() for _ in range(count))
        total = num_experts + len(free)
        check_top_k(config.top_k, total)
        super().__init__(dim, num_experts, num_scores=total)
        self.config = config
        self.free_experts = free
        self.needs_previous = config.residual
        self.residual = nn.Parameter(torch.zeros(total, total)) if config.residual else None

    def reset_parameters(self) -> None:
        """Draw small random rows; the residual starts at zero."""
        super().reset_parameters()
        # The base class draws before there is one.
        residual = getattr(self, "residual", None)
        if residual is not None:
            nn.init.zeros_(residual)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k among experts and free ones; ties go to the lower index.

        Args:
            h_TD: Inputs, [T, D].
            state: Holds the routing of the layer before, where there is a residual.

        Returns:
            K = top_k slots, empty where a free expert was chosen, and the weights of those; scores
            are the logits of all N, residual included.

        Raises:
            InputError: If there is a residual and no layer before, or one of other experts.
        """
        scores_TN = linear_scores(h_TD, self.weight)
        if self.residual is not None:
            scores_TN = scores_TN + linear_scores(self._previous(state, scores_TN), self.residual)
        order_TN = scores_TN.argsort(dim=-1, descending=True, stable=True)
        ids_TK = order_TN[:, : self.config.top_k]
        weights_TK = scores_TN.softmax(-1).gather(1, ids_TK)
        free_TZ = torch.zeros_like(scores_TN).scatter(1, ids_TK, weights_TK)[:, self.num_experts :]
        real_TK = ids_TK < self.num_experts
        return Routing(
            torch.where(real_TK, ids_TK, self.num_experts),
            weights_TK * real_TK,
            scores_TN,
            self.num_experts,
            free_weights_TZ=free_TZ,
        )

    def _previous(self, state: RouterState | None, scores_TN: Tensor) -> Tensor:
        if state is None or state.previous is None:
            raise InputError(
                "residual needs the scores of the layer before, got none; set it to false in the "
                "first layer, run layers inside moesaic.nn.layer.pass_state, and train without "
                "gradient checkpointing"
            )
        before_TN = state.previous.scores_TE
        if before_TN.shape != scores_TN.shape:
            raise InputError(
                f"residual needs {scores_TN.shape[1]} scores of {scores_TN.shape[0]} tokens of the "
                f"layer before, got {list(before_TN.shape)}; give both layers the same experts"
            )
        return before_TN

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, free={len(self.free_experts)}, "
            f"top_k={self.config.top_k}, residual={self.config.residual}"
        )
