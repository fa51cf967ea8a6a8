"""A small recurrent cell carries what was routed from layer to layer; the best k of its scores.

Source: RMoE, arXiv 2408.06793, section 3: x' = P_i x_i, r_i = GRU(x', r_(i-1)) with one cell for
all layers and r_0 = 0, scores softmax(R_i r_i). The recurrence runs over layers and not over
positions. The gates are the scores, as the paper writes; renormalised, as in the authors' code, on
request. Ours: fresh P and R have a deviation of 0.02 whatever the depth.

Shapes: T tokens, D model width, E experts, K experts per token, P width of the state, M of what is
handed on: P, or 2 P of an LSTM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import (
    Router,
    RouterState,
    check_top_k,
    full_precision,
    linear_scores,
)
from moesaic.nn.routing import Routing

Cell = nn.GRUCell | nn.RNNCell | nn.LSTMCell
_CELLS: dict[str, type[Cell]] = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentTopKConfig:
    """Settings of the recurrent router.

    Attributes:
        top_k: Experts per token.
        first: Whether this is the first layer with such a router. It owns the cell and starts from
            zero; set it to false in every other layer.
        size: P; the paper found no more than 128 to help.
        cell: Kind of the cell. The paper's is `gru`; `rnn` and `lstm` were slightly worse.
        memory: `passed` hands the state on with its gradient; `detached` without, and `none` starts
            every layer from zero: the two ablations, which lose what the paper gains.
        renormalize: Whether the chosen weights sum to one.
    """

    top_k: int = 2
    first: bool = True
    size: int = 128
    cell: Literal["gru", "rnn", "lstm"] = "gru"
    memory: Literal["passed", "detached", "none"] = "passed"
    renormalize: bool = False

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if self.size < 1:
            raise InputError(f"size must be at least 1, got {self.size}; 128 is the paper's")


class RecurrentTopK(Router):
    """RMoE's router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: RecurrentTopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.needs_previous = config.memory != "none" and not config.first
        self.project = nn.Parameter(torch.empty(config.size, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, config.size))
        self.cell: Cell | None = None
        if config.first:
            self.cell = _CELLS[config.cell](config.size, config.size)
        # In a tuple, so that the weights of another layer's cell are not this router's, too.
        self._borrowed: tuple[Cell, ...] = ()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random maps, and the cell as torch does."""
        nn.init.normal_(self.project, std=0.02)
        nn.init.normal_(self.weight, std=0.02)
        if self.cell is not None:
            self.cell.reset_parameters()

    def link(self, routers: Sequence[Router]) -> None:
        """Use the cell of the first layer.

        Raises:
            InputError: If there is not exactly one, or it is of another kind or size.
        """
        if self.cell is not None:
            return
        cells = [r.cell for r in routers if isinstance(r, RecurrentTopK) and r.cell is not None]
        kind, size = _CELLS[self.config.cell], self.config.size
        if len(cells) != 1 or type(cells[0]) is not kind or cells[0].hidden_size != size:
            raise InputError(
                f"first=False needs one layer before with first=True and the same cell and size, "
                f"got {len(cells)}; set first in the first layer alone, and cell and size alike"
            )
        self._borrowed = tuple(cells)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Move the state on and route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Holds the routing of the layer before, in all layers but the first.

        Returns:
            K = top_k slots, most probable first; scores are the logits, `memory_TM` the state.

        Raises:
            InputError: If this is not the first layer and there is no state or no cell.
        """
        project_TP = linear_scores(h_TD, self.project)
        memory_TM = self._move(project_TP, self._before(state, project_TP))
        scores_TE = linear_scores(memory_TM[:, : self.config.size], self.weight)
        weights_TK, ids_TK = scores_TE.softmax(-1).topk(self.config.top_k, dim=-1)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts, memory_TM=memory_TM)

    def _shared_cell(self) -> Cell:
        for cell in (self.cell, *self._borrowed):
            if cell is not None:
                return cell
        raise InputError(
            "first=False needs the cell of the first layer, got none; run "
            "moesaic.nn.layer.link_layers(model) after the layers are made"
        )

    def _before(self, state: RouterState | None, project_TP: Tensor) -> Tensor | None:
        """State of the layer before, or none where it is zero."""
        if not self.needs_previous:
            return None
        before_TM = None if state is None or state.previous is None else state.previous.memory_TM
        if before_TM is None or len(before_TM) != len(project_TP):
            raise InputError(
                f"memory {self.config.memory!r} needs the state of {len(project_TP)} tokens in the "
                "layer before, got none; set first in the first layer, run layers inside "
                "moesaic.nn.layer.pass_state, and train without gradient checkpointing"
            )
        return before_TM.detach() if self.config.memory == "detached" else before_TM

    def _move(self, project_TP: Tensor, before_TM: Tensor | None) -> Tensor:
        """One step of the cell, in the dtype of project_TP whatever that of its weights."""
        cell = self._shared_cell()
        weights = {name: p.to(project_TP.dtype) for name, p in cell.named_parameters()}
        before: Tensor | tuple[Tensor, ...] | None = before_TM
        if before_TM is not None and isinstance(cell, nn.LSTMCell):
            before = before_TM.chunk(2, dim=1)
        with full_precision(project_TP.device):
            after = torch.func.functional_call(cell, weights, (project_TP, before))
        return torch.cat(after, dim=1) if isinstance(after, tuple) else after

    def num_multiplied(self) -> int:
        """Weights of its own matrices and of the cell, which may be another layer's."""
        cell = self._shared_cell()
        return super().num_multiplied() + sum(p.numel() for p in cell.parameters() if p.dim() == 2)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, size={self.config.size}, "
            f"memory={self.config.memory}, first={self.config.first}"
        )
