"""A router whose experts are exchanged while training begins: it leaves bad starts behind.

Source: COMET, arXiv 2306.02824 (permutation-based local search, the suffix "+" of its tables):
any sparse router chooses slots, and a matrix that is learned says which expert sits in each. For
the first steps it is soft, by Sinkhorn's rounds of normalisation at a falling temperature, and all
experts are computed; then the best permutation is kept for good. Evaluation always uses that.

The temperature falls from 1e-3 to 1e-7 and the rounds rise from 20 to 150. The entropies of rows
and of columns are charged, where released code takes rows twice. One matrix serves all trees of
`soft-trees`; one for each is left out. Ours: the matrix starts at the first temperature's scale,
and its rounds cool down.

Shapes: T tokens, K slots, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic._config import build_config
from moesaic._errors import InputError
from moesaic.nn._assignment import best_assignment
from moesaic.nn.routers._base import Router, RouterState
from moesaic.nn.routers._table import ROUTERS
from moesaic.nn.routing import Routing
from moesaic.nn.schedules._base import ScheduleConfig, StepClock


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutationSearchConfig:
    """Settings of the search.

    Attributes:
        router: Name of the router whose experts are exchanged; none that has free experts.
        options: Its settings.
        search_steps: Optimiser steps of the search, which compute every expert; one to ten passes
            over the data in the paper.
        entropy_coef: Weight of the entropy of the matrix, 1e-4 in the paper.
        noise: Scale of the Gumbel noise on the matrix in the search; the released settings have 0.
    """

    router: str = "topk-softmax"
    options: Mapping[str, Any] = field(default_factory=dict)
    search_steps: int = 100
    entropy_coef: float = 1e-4
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.search_steps < 0:
            raise InputError(f"search_steps must be at least 0, got {self.search_steps}; 0 is none")
        if min(self.entropy_coef, self.noise) < 0:
            raise InputError(
                f"entropy_coef and noise must be at least 0, got {self.entropy_coef} and "
                f"{self.noise}; 1e-4 and 0 are usual"
            )


class PermutationSearch(Router):
    """Local search over the experts of another router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.

    Attributes:
        inner: The other router, which chooses slots.
        expert_of: Expert that sits in each of its slots outside the search, [E] int64.
    """

    expert_of: Tensor

    def __init__(self, dim: int, num_experts: int, config: PermutationSearchConfig) -> None:
        super().__init__()
        settings = build_config(
            ROUTERS.load_config(config.router), config.options, where=f"router {config.router}"
        )
        self.inner: Router = ROUTERS.load(config.router)(dim, num_experts, settings)
        if self.inner.free_experts:
            raise InputError(
                f"router must have no free experts, got {config.router!r}; they cannot be exchanged"
            )
        self.num_experts = num_experts
        self.config = config
        self.needs_previous = self.inner.needs_previous
        self.reads_tasks = self.inner.reads_tasks
        self.training_only = frozenset(
            {"logits", *(f"inner.{n}" for n in self.inner.training_only)}
        )
        steps = config.search_steps
        self.temperature = ScheduleConfig(start=1e-3, end=1e-7, steps=steps, shape="exponential")
        self.rounds = ScheduleConfig(start=20, end=150, steps=steps)
        self.clock = StepClock()
        self.logits = nn.Parameter(torch.empty(num_experts, num_experts))
        self.register_buffer("expert_of", torch.arange(num_experts))
        self._draw()

    @property
    def weight(self) -> Tensor:
        """Score rows of the other router."""
        weight = self.inner.weight
        assert isinstance(weight, Tensor)
        return weight

    def reset_parameters(self) -> None:
        """Draw the other router anew and begin the search again."""
        self.inner.reset_parameters()
        self.clock.reset_parameters()
        self._draw()

    def _draw(self) -> None:
        nn.init.normal_(self.logits, std=self.temperature.start)
        with torch.no_grad():
            self.expert_of.copy_(torch.arange(self.num_experts))

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token as the other router does, to the experts in the chosen slots.

        Args:
            h_TD: Inputs, [T, D].
            state: Given to the other router.

        Returns:
            Its slots, and its scores in the order of the experts; all E in the search, where the
            summed weight of a token stays what it was.
        """
        routing: Routing = self.inner(h_TD, state)
        num_experts = self.num_experts
        # Slots after E, empty ones and columns of noise, stay where they are.
        places = torch.cat([self.expert_of, self.expert_of.new_tensor([num_experts])])
        scores = routing.scores_TE
        scores = torch.cat([scores[:, self.expert_of.argsort()], scores[:, num_experts:]], dim=1)
        if not (self.training and self.clock.step() < self.config.search_steps):
            return replace(routing, ids_TK=places[routing.ids_TK], scores_TE=scores)
        matrix_EE = self.matrix()
        before_TE = routing.weights_TE()
        mixed_TE = before_TE @ matrix_EE.to(before_TE.dtype)
        tiny = torch.finfo(mixed_TE.dtype).tiny
        scale_T1 = before_TE.sum(1, keepdim=True) / mixed_TE.sum(1, keepdim=True).clamp(min=tiny)
        ids_TE = torch.arange(num_experts, device=h_TD.device).expand_as(mixed_TE)
        charge = self.config.entropy_coef * entropies(matrix_EE)
        aux = {**routing.aux, "permutation": charge.to(before_TE.dtype)}
        return Routing(ids_TE, mixed_TE * scale_T1, scores, num_experts, aux)

    def matrix(self) -> Tensor:
        """The soft permutation of this step, [E, E] float64: slots by experts."""
        step = self.clock.step()
        # At the last temperature float32 tells numbers near one hardly apart.
        logits_EE = self.logits.double()
        if self.training and self.config.noise > 0:
            gumbel_EE = -torch.empty_like(logits_EE).exponential_().log()
            logits_EE = logits_EE + self.config.noise * gumbel_EE
        return sinkhorn(logits_EE, self.temperature.at(step), round(self.rounds.at(step)))

    @torch.no_grad()
    def end_step(self) -> None:
        """Keep the best permutation of the step, while the search lasts."""
        self.inner.end_step()
        if self.clock.step() < self.config.search_steps:
            self.expert_of.copy_(torch.tensor(best_assignment(self.logits)))
        self.clock.end_step()

    def forget_step(self) -> None:
        """Tell the other router."""
        self.inner.forget_step()

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, router={self.config.router}, "
            f"search_steps={self.config.search_steps}"
        )


def sinkhorn(logits_EE: Tensor, temperature: float, rounds: int) -> Tensor:
    """Normalise the rows and the columns of exp(logits / temperature) in turn, in logarithms.

    The rounds cool down from the spread of the logits to the temperature: at the temperature from
    the first one on, cold rounds would leave rows empty.

    Args:
        logits_EE: [E, E].
        temperature: Above 0.
        rounds: How often both are normalised.

    Returns:
        [E, E]; columns sum to one, and rows too where the rounds were enough.
    """
    warm = max(temperature, float((logits_EE.amax() - logits_EE.amin()).detach()))
    u_E1, v_1E = torch.zeros_like(logits_EE[:, :1]), torch.zeros_like(logits_EE[:1])
    for round_ in range(rounds):
        # Half of the rounds are left for the last temperature.
        share = min(1.0, 2 * (round_ + 1) / rounds)
        heat = warm * (temperature / warm) ** share
        u_E1 = -heat * ((logits_EE + v_1E) / heat).logsumexp(1, keepdim=True)
        v_1E = -heat * ((logits_EE + u_E1) / heat).logsumexp(0, keepdim=True)
    return ((logits_EE + u_E1 + v_1E) / temperature).exp()


def entropies(matrix_EE: Tensor) -> Tensor:
    """Summed entropies of the rows and of the columns, each divided by its sum."""
    total = matrix_EE.new_zeros(())
    for dim in (0, 1):
        shares_EE = matrix_EE / matrix_EE.sum(dim, keepdim=True)
        total = total - (shares_EE * (shares_EE + 1e-30).log()).sum()
    return total
