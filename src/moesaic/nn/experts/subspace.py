"""Experts that are parts of one shared backbone; a learned matrix says who borrows whose part.

Source: CDSP-MoE, arXiv 2512.20291. The B dimensions of one pair of matrices are owned in equal
blocks by the experts. Expert i takes the F dimensions with the largest influence sigmoid(A_ij), j
being the owner, and gives down(act(up h)) on these, times the mean of their influences, through
which the task teaches the topology A. Where the gradients of two experts on shared dimensions
pointed against each other in the step before, their link A_ij is charged by sigmoid(A_ij) times
the conflict, and falls until the block is no longer borrowed. Only gradients of the up matrix are
compared.

As the paper's text, and not its code: the sigmoid of A in the loss, and no pair left out for a
small A. As the code: the loss of A alone counts ten times the text's. Gradients of an expert in
both slots of a token, and of all passes of a step, add up. F exceeds a block, so that an expert
borrows F - B/E dimensions even where no link is left; links then only decide whose.

Shapes: T tokens, E experts, B dimensions of the backbone in E blocks, F of one expert, D model
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.experts._conflict import StepConflict
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routing import Routing
from moesaic.ops.select import apply_experts
from moesaic.ops.weights import ExpertWeights, activation


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceExpertsConfig(ExpertsConfig):
    """Settings of experts in a shared backbone.

    Attributes:
        block: Dimensions that each expert owns; 0 is the fewest of which E blocks leave an expert
            its width F = B / sqrt(E), as in the paper: F / sqrt(E). More make experts differ more.
        conflict_coef: Weight of the conflicts; 0 is none. A model takes the mean of its layers'
            losses and the paper their sum, whose 10 is 10 times the number of layers there.
        size_coef: Weight of the mean of |A|; the paper's text has a tenth of it.
        choice_coef: Weight of the mean of sigmoid(A) (1 - sigmoid(A)), which is small where links
            are decided; the paper's text has a tenth of it.
        topology_rate: Times that A learns faster than the rest; it has no weight decay.
    """

    block: int = 0
    conflict_coef: float = 10.0
    size_coef: float = 1e-3
    choice_coef: float = 1e-2
    topology_rate: float = 10.0

    def __post_init__(self) -> None:
        activation(self.activation)
        if self.block < 0:
            raise InputError(
                f"block must be at least 0, got {self.block}; 0 follows from the width"
            )
        for name in ("conflict_coef", "size_coef", "choice_coef"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0, got {value}; 0 is none")
        if not 0.0 < self.topology_rate < math.inf:
            raise InputError(
                f"topology_rate must be above 0, got {self.topology_rate}; 10 is the paper's"
            )


class SubspaceExperts(Experts):
    """Experts scale_i * down(act(up h)) on dimensions of their own choice.

    Args:
        dim: D.
        num_experts: E.
        width: F.
        config: Settings.

    Attributes:
        up_proj: Rows of all dimensions, [B, D].
        down_proj: [D, B].
        topology: A, [E, E]: how much expert i is linked to the block of expert j.
    """

    shared_kind = "plain"

    def __init__(
        self, dim: int, num_experts: int, width: int, config: SubspaceExpertsConfig
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.width = width
        self.config = config
        self.block = config.block or math.ceil(width / math.sqrt(num_experts))
        num_dims = self.block * num_experts
        if width > num_dims:
            raise InputError(
                f"width must be at most num_experts * block={num_dims}, got {width}; raise block"
            )
        self.rate_factors = {"topology": config.topology_rate}
        # Part of the checkpoint format.
        self.up_proj = nn.Parameter(torch.empty(num_dims, dim))
        self.down_proj = nn.Parameter(torch.empty(dim, num_dims))
        self.topology = nn.Parameter(torch.empty(num_experts, num_experts))
        self.up_proj_bias = nn.Parameter(torch.empty(num_dims)) if config.bias else None
        self.down_proj_bias = (
            nn.Parameter(torch.empty(num_experts, dim)) if config.down_bias else None
        )
        self.conflict = StepConflict(num_dims)
        self.register_load_state_dict_post_hook(_forget)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an orthogonal backbone, and experts linked most to themselves; biases are zero."""
        nn.init.orthogonal_(self.up_proj)
        nn.init.orthogonal_(self.down_proj)
        nn.init.normal_(self.topology, mean=0.1, std=0.01)
        with torch.no_grad():
            self.topology.fill_diagonal_(1.0)
        for bias in (self.up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.forget_step()

    def links(self) -> Tensor:
        """Influence of the owner of a block on each expert, sigmoid(A), [E, E] in [0, 1]."""
        dtype = torch.promote_types(self.topology.dtype, torch.float32)
        return self.topology.to(dtype).sigmoid()

    def dims(self) -> tuple[Tensor, Tensor]:
        """Dimensions of every expert and their influence.

        Of equal influences the lowest dimensions come first.

        Returns:
            Dimensions, [E, F] int64, falling in influence; influences, [E, F].
        """
        links_EE = self.links()
        # All of a block have the influence of its owner.
        sorted_EE, owner_EE = links_EE.sort(dim=1, descending=True, stable=True)
        inside = torch.arange(self.block, device=links_EE.device)
        dims_EB = (owner_EE.unsqueeze(-1) * self.block + inside).flatten(1)
        influence_EB = sorted_EE.repeat_interleave(self.block, dim=1)
        return dims_EB[:, : self.width], influence_EB[:, : self.width]

    def weights(self) -> ExpertWeights:
        """Gather the dimensions of every expert for an expert path."""
        return self._gather(*self.dims())

    def _gather(self, dims_EF: Tensor, influence_EF: Tensor) -> ExpertWeights:
        scale_E11 = influence_EF.mean(1).to(self.down_proj.dtype).reshape(-1, 1, 1)
        bias = self.up_proj_bias
        return ExpertWeights(
            up=self.up_proj[dims_EF],
            down=self.down_proj[:, dims_EF].transpose(0, 1) * scale_E11,
            activation=self.config.activation,
            gated=False,
            up_bias=None if bias is None else bias[dims_EF],
            down_bias=self.down_proj_bias,
        )

    def forward(
        self, h_TD: Tensor, routing: Routing | None = None, state: RouterState | None = None
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts, [T, D]; without routing, of all.

        In training the gradients of this pass are collected for the conflicts of the next step.
        """
        if routing is None:
            return self.dense(h_TD, state)
        dims_EF, influence_EF = self.dims()
        weights = self._gather(dims_EF, influence_EF)
        if self.training and self.config.conflict_coef > 0 and weights.up.requires_grad:
            # One row of it for each expert and dimension, so a gradient is of one expert alone.
            weights.up.register_hook(partial(self.conflict.add, dims_EF))
        return apply_experts(h_TD, routing.ids_TK, routing.weights_TK, weights, self.backend)

    def aux_losses(self, routing: Routing) -> Mapping[str, Tensor]:
        """Charge links between experts in conflict, and keep the topology small and decided.

        Args:
            routing: With which they ran; only experts that some token used are in conflict.

        Returns:
            `topology`, and `conflict` where the step before is known.
        """
        links_EE = self.links()
        size = self.topology.to(links_EE.dtype).abs().mean()
        choice = (links_EE * (1 - links_EE)).mean()
        losses = {"topology": self.config.size_coef * size + self.config.choice_coef * choice}
        conflict_EE = self.conflict.last_EE
        if conflict_EE is not None:
            active_E = routing.counts_E() > 0
            charged_EE = conflict_EE * (active_E.unsqueeze(1) & active_E)
            losses["conflict"] = self.config.conflict_coef * (links_EE * charged_EE).sum()
        return losses

    def end_step(self) -> None:
        """Hand the conflicts of this step on to the next."""
        self.conflict.end_step()

    def forget_step(self) -> None:
        """Forget gradients and conflicts."""
        self.conflict.forget()

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation, which forgets gradients and conflicts."""
        if not mode:
            self.forget_step()
        return super().train(mode)

    def own_weights(self) -> int:
        """Weights that one expert multiplies; others may have the same."""
        return 2 * self.width * self.up_proj.shape[1]

    def unused_weights(self, num_off: float) -> float:
        """Weights of the backbone that no expert of a token can have, at the least."""
        used = (self.num_experts - num_off) * self.own_weights()
        return max(0.0, self.up_proj.numel() + self.down_proj.numel() - used)


def _forget(experts: nn.Module, keys: object) -> None:
    """What was collected with other weights says nothing of those just loaded."""
    assert isinstance(experts, SubspaceExperts)
    experts.forget_step()
