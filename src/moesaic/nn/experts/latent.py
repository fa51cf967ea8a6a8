"""Gated experts that share one projection into a latent space with the others of their group.

Source: Mixture of Latent Experts (MoLE, later MoLAE), arXiv 2503.23100: the gate and up matrices of
expert i in group q are W_i = A_i B_q, where B_q belongs to the group and A_i to the expert, and the
down matrix stays its own. B_q h is computed once for a token and group. With groups of one it is an
ordinary mixture with one more linear factor; a single group shares one latent space.

The factorisation `latent_experts` among the compressions brings trained experts into this form.

Shapes: T tokens, E experts, G groups of N = E / G neighbours, F width of one expert, M width of the
latent space, D model width; the 2 is gate and up.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routing import Routing
from moesaic.ops.weights import ExpertWeights, activation

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentExpertsConfig(ExpertsConfig):
    """Settings of latent experts.

    Attributes:
        group_size: N, neighbouring experts that share a projection; it divides E. More share more
            and fit trained experts worse.
        latent_width: M; 0 is the width of an expert, which the paper uses.
    """

    group_size: int = 2
    latent_width: int = 0

    def __post_init__(self) -> None:
        activation(self.activation)
        if self.group_size < 1:
            raise InputError(f"group_size must be at least 1, got {self.group_size}; 2 is usual")
        if self.latent_width < 0:
            raise InputError(
                f"latent_width must be at least 0, got {self.latent_width}; 0 is the width of an "
                "expert"
            )


class LatentGatedExperts(Experts):
    """Experts down(act(A_gate B_gate h) * (A_up B_up h)).

    Args:
        dim: D.
        num_experts: E.
        width: F.
        config: Settings.

    Attributes:
        gate_up_common: B of every group, [G, 2, M, D].
        gate_up_private: A of every expert, [E, 2, F, M].
        down_proj: [E, D, F].
    """

    shared_kind = "gated"

    def __init__(self, dim: int, num_experts: int, width: int, config: LatentExpertsConfig) -> None:
        super().__init__()
        if num_experts % config.group_size:
            raise InputError(
                f"group_size must divide num_experts={num_experts}, got {config.group_size}; "
                "choose a divisor"
            )
        self.num_experts = num_experts
        self.width = width
        self.config = config
        latent = config.latent_width or width
        num_groups = num_experts // config.group_size
        # Part of the checkpoint format.
        self.gate_up_common = nn.Parameter(torch.empty(num_groups, 2, latent, dim))
        self.gate_up_private = nn.Parameter(torch.empty(num_experts, 2, width, latent))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, width))
        self.gate_up_proj_bias = (
            nn.Parameter(torch.empty(num_experts, 2 * width)) if config.bias else None
        )
        self.down_proj_bias = (
            nn.Parameter(torch.empty(num_experts, dim)) if config.down_bias else None
        )
        factors = self.gate_up_common.numel() + self.gate_up_private.numel()
        # Who counts a model without making it, or loads one, has no use for the advice.
        if factors >= 2 * num_experts * width * dim and not self.down_proj.is_meta:
            _LOGGER.warning(
                "group_size=%d and latent_width=%d give latent experts no fewer weights than "
                "ordinary ones of width %d; lower latent_width or make the groups larger",
                config.group_size,
                latent,
                width,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random factors, whose products are as large as ordinary experts are."""
        nn.init.normal_(self.gate_up_common, std=0.02)
        nn.init.normal_(self.gate_up_private, std=self.gate_up_private.shape[3] ** -0.5)
        nn.init.normal_(self.down_proj, std=0.02)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def weights(self) -> ExpertWeights:
        """Multiply the factors out for an expert path."""
        private = self.gate_up_private.unflatten(0, (-1, self.config.group_size))
        up = torch.einsum("gnafm,gamd->gnafd", private, self.gate_up_common)
        return ExpertWeights(
            up=up.flatten(2, 3).flatten(0, 1),
            down=self.down_proj,
            activation=self.config.activation,
            gated=True,
            up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
        )

    def forward(
        self, h_TD: Tensor, routing: Routing | None = None, state: RouterState | None = None
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts, [T, D]; without routing, of all.

        A backend other than `auto`, and packed weights, use the factors multiplied out.
        """
        if routing is None or self.backend != "auto" or self.packed is not None:
            return super().forward(h_TD, routing, state)
        held_TE = _held(routing)
        weights_TE = routing.weights_TE()
        # A sum over slots in bfloat16 would round once per slot.
        dtype = torch.promote_types(h_TD.dtype, torch.float32)
        out_TD = torch.zeros_like(h_TD, dtype=dtype)
        for group, common_2MD in enumerate(self.gate_up_common):
            first = group * self.config.group_size
            experts = range(first, first + self.config.group_size)
            token_N = held_TE[:, first : experts.stop].any(1).nonzero().squeeze(1)
            # Once for a token and group, whatever the number of its experts.
            z_2NM = torch.einsum("td,amd->atm", h_TD[token_N], common_2MD)
            for expert in experts:
                own_N = held_TE[token_N, expert].nonzero().squeeze(1)
                y_ND = self._expert(expert, z_2NM[:, own_N]).to(dtype)
                own_T = token_N[own_N]
                out_TD = out_TD.index_add(
                    0, own_T, y_ND * weights_TE[own_T, expert, None].to(dtype)
                )
        return out_TD.to(h_TD.dtype)

    def _expert(self, expert: int, z_2NM: Tensor) -> Tensor:
        """Output of one expert from the latent tokens of its group."""
        gate_NF, up_NF = torch.einsum("atm,afm->atf", z_2NM, self.gate_up_private[expert])
        if self.gate_up_proj_bias is not None:
            gate_bias_F, up_bias_F = self.gate_up_proj_bias[expert].chunk(2)
            gate_NF, up_NF = gate_NF + gate_bias_F, up_NF + up_bias_F
        neurons_NF = activation(self.config.activation)(gate_NF) * up_NF
        bias = None if self.down_proj_bias is None else self.down_proj_bias[expert]
        return nn.functional.linear(neurons_NF, self.down_proj[expert], bias)

    def own_weights(self) -> int:
        """Weights of the matrices of one expert that no other has."""
        return self.gate_up_private[0].numel() + self.down_proj[0].numel()

    def common_weights(self) -> int:
        """Weights of the projections; a token is taken to need those of every group."""
        return self.gate_up_common.numel()

    def neuron_weights(self) -> int:
        """Weights of one neuron of a gated network: rows of gate and up, a column of down."""
        return 3 * self.down_proj.shape[1]


def _held(routing: Routing) -> Tensor:
    """Whether a slot of a token holds an expert, at whatever weight, [T, E] bool."""
    held_TX = torch.zeros(
        routing.ids_TK.shape[0],
        routing.num_experts + 1,
        dtype=torch.bool,
        device=routing.ids_TK.device,
    )
    column_TK = routing.ids_TK.where(routing.ids_TK >= 0, routing.num_experts)
    return held_TX.scatter(1, column_TK, True)[:, : routing.num_experts]
