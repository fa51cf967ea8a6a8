"""Experts of several kinds in one layer.

Source: Hecto, arXiv 2506.22919, for two of them.

Shapes: T tokens, D model width, R tokens of one kind, K slots per token.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

import torch
from torch import Tensor, nn

from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routing import Routing


class MixedExperts(Experts):
    """Neighbours of one kind are a part; each part computes the tokens that chose one of its own.

    Args:
        dim: D.
        kinds: Name of the kind of each expert.
        width: F, that of every expert.
        config: Settings of every kind.
    """

    def __init__(self, dim: int, kinds: tuple[str, ...], width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.num_experts = len(kinds)
        self.width = width
        self.kinds = kinds
        # Names are part of the checkpoint format.
        self.parts = nn.ModuleList(
            EXPERTS.load(kind)(dim, len(list(run)), width, _settings(kind, config))
            for kind, run in groupby(kinds)
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights of every part."""
        for part in self._each():
            part.reset_parameters()

    def forward(
        self, h_TD: Tensor, routing: Routing | None = None, state: RouterState | None = None
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts, [T, D]; without routing, of all."""
        if routing is None:
            return self.dense(h_TD, state)
        out_TD = torch.zeros_like(h_TD)
        first = 0
        for part in self._each():
            end = first + part.num_experts
            mine_TK = (routing.ids_TK >= first) & (routing.ids_TK < end)
            tokens_R = mine_TK.any(1).nonzero().squeeze(1)
            if tokens_R.numel():
                ids_TK = torch.where(mine_TK, routing.ids_TK - first, part.num_experts)
                theirs = Routing(
                    ids_TK[tokens_R],
                    (routing.weights_TK * mine_TK)[tokens_R],
                    routing.scores_TE[tokens_R, first:end],
                    part.num_experts,
                )
                out_RD = part(h_TD[tokens_R], theirs, _of(state, tokens_R))
                out_TD = out_TD.index_add(0, tokens_R, out_RD)
            first = end
        return out_TD

    def dense(self, h_TD: Tensor, state: RouterState | None = None) -> Tensor:
        """Sum all experts at weight one, [T, D]."""
        return torch.stack([part.dense(h_TD, state) for part in self._each()]).sum(0)

    def own_width(self) -> float:
        """Count an expert as its width: all have the same, whatever their kind weighs."""
        return float(self.width)

    def used_share(self) -> float | None:
        """Share of the parts' parameters in use; none where it depends on the token."""
        used, total = 0.0, 0
        for part in self._each():
            share, size = part.used_share(), sum(p.numel() for p in part.parameters())
            if share is None:
                return None
            used, total = used + share * size, total + size
        return used / total

    def end_step(self) -> None:
        """Tell every part."""
        for part in self._each():
            part.end_step()

    def forget_step(self) -> None:
        """Tell every part."""
        for part in self._each():
            part.forget_step()

    def _each(self) -> list[Experts]:
        return [part for part in self.parts if isinstance(part, Experts)]

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"experts={self.num_experts}, width={self.width}, kinds={', '.join(self.kinds)}"


def _of(state: RouterState | None, tokens_R: Tensor) -> RouterState | None:
    """What some of the tokens have of the state."""
    if state is None or state.sequences is None:
        return None
    return RouterState(sequences=state.sequences.take(tokens_R))


def _settings(kind: str, config: ExpertsConfig) -> ExpertsConfig:
    """The settings of a kind that may have more of its own, at their defaults."""
    made: ExpertsConfig = EXPERTS.load_config(kind)(**asdict(config))
    return made
