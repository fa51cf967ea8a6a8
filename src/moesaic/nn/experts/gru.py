"""Recurrent experts: they read a sequence in order and give what they hold at its end.

Source: Hecto, arXiv 2506.22919, whose two experts are such a network and a feed-forward one: a GRU
over the sequence behind the token, its hidden state at the last position that is not padding, and
a linear map of that. The token itself is not read: each kind of expert has a view of its own.

Shapes: T tokens, E experts, F hidden units of one expert, D model width, S positions, R tokens of
one expert, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routing import Routing
from moesaic.nn.sequences import Sequences


class GruExperts(Experts):
    """Experts linear(last hidden state of GRU(sequence)).

    An expert runs on the sequences of its tokens alone, position after position: it takes longer
    than a feed-forward expert of as many weights.

    Args:
        dim: D.
        num_experts: E.
        width: F.
        config: Settings; a GRU has its own activations, and `activation` says nothing.
    """

    def __init__(self, dim: int, num_experts: int, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.width = width
        # Names are part of the checkpoint format.
        self.cells = nn.ModuleList(
            nn.GRU(dim, width, bias=config.bias, batch_first=True) for _ in range(num_experts)
        )
        self.outs = nn.ModuleList(
            nn.Linear(width, dim, bias=config.down_bias) for _ in range(num_experts)
        )

    def reset_parameters(self) -> None:
        """Draw weights as torch does: uniform, within one over the root of F."""
        for module in (*self.cells, *self.outs):
            assert isinstance(module, (nn.GRU, nn.Linear))
            module.reset_parameters()

    def forward(
        self, h_TD: Tensor, routing: Routing | None = None, state: RouterState | None = None
    ) -> Tensor:
        """Sum the weighted outputs of each token's experts, [T, D]; without routing, of all.

        Raises:
            InputError: If the state holds no sequence for each token.
        """
        if routing is None:
            return self.dense(h_TD, state)
        sequences = self._sequences(h_TD, state)
        weights_TE = routing.weights_TE().to(h_TD.dtype)
        held_TE = (routing.ids_TK.unsqueeze(-1) == self._numbers(h_TD)).any(1)
        out_TD = torch.zeros_like(h_TD)
        for expert in range(self.num_experts):
            tokens_R = held_TE[:, expert].nonzero().squeeze(1)
            if tokens_R.numel():
                out_RD = self._expert(expert, sequences.take(tokens_R))
                out_TD = out_TD.index_add(
                    0, tokens_R, out_RD * weights_TE[tokens_R, expert].unsqueeze(1)
                )
        return out_TD

    def dense(self, h_TD: Tensor, state: RouterState | None = None) -> Tensor:
        """Sum all experts at weight one, [T, D]."""
        sequences = self._sequences(h_TD, state)
        if not h_TD.shape[0]:
            return torch.zeros_like(h_TD)
        return torch.stack([self._expert(e, sequences) for e in range(self.num_experts)]).sum(0)

    def own_width(self) -> float:
        """Count an expert as its width: a hidden unit is no neuron and none is nearer."""
        return float(self.width)

    def used_share(self) -> float:
        """Every token uses all of the weights when all experts are on."""
        return 1.0

    def _numbers(self, h_TD: Tensor) -> Tensor:
        return torch.arange(self.num_experts, device=h_TD.device)

    def _expert(self, expert: int, sequences: Sequences) -> Tensor:
        states_RSF, _ = self.cells[expert](sequences.values_TSD)
        last_R11 = (sequences.lengths_T - 1).reshape(-1, 1, 1)
        last_RF = states_RSF.gather(1, last_R11.expand(-1, 1, self.width)).squeeze(1)
        out_RD: Tensor = self.outs[expert](last_RF)
        return out_RD

    @staticmethod
    def _sequences(h_TD: Tensor, state: RouterState | None) -> Sequences:
        sequences = None if state is None else state.sequences
        if sequences is None or sequences.values_TSD.shape[0] != h_TD.shape[0]:
            found = "none" if sequences is None else f"{sequences.values_TSD.shape[0]}"
            raise InputError(
                f"recurrent experts need a sequence for each of the {h_TD.shape[0]} tokens, got "
                f"{found}; call the layer with RouterState(sequences=Sequences(...))"
            )
        return sequences
