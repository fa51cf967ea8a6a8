"""The interface of a router.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.free import FreeKind
from moesaic.nn.part import Part
from moesaic.nn.routing import Routing
from moesaic.nn.schedules._base import StepClock
from moesaic.nn.sequences import Sequences
from moesaic.ops.choice import Choice, ScoreMap


@dataclass(frozen=True, slots=True)
class RouterState:
    """What some routers and experts need beyond the token.

    Attributes:
        previous: Routing of the layer before, or none in the first.
        tokens_T: Ids of the tokens, [T] int64, or none where they are not known.
        sequences: The sequence behind each token, for experts that read one.
        num_sequences: B, which the tokens are equal parts of, in turn; none where nobody knows.
        tasks_B: Task of each sequence, or of each token, [B] or [T] int64, -1 where it is not
            known; none where no task is.
    """

    previous: Routing | None = None
    tokens_T: Tensor | None = None
    sequences: Sequences | None = None
    num_sequences: int | None = None
    tasks_B: Tensor | None = None


class Router(Part, ABC):
    """Decides which experts each token uses.

    Attributes:
        num_experts: E, the real experts.
        free_experts: Kinds of the experts without neurons that it chooses among, too.
        needs_previous: Whether it needs the routing of the layer before, in its state.
        reads_sequences: Whether a token's experts depend on the sequence that it is of; its state
            says how many there are.
        needs_tokens: Whether it needs the ids of the tokens, in its state.
        reads_tasks: Whether it reads the tasks in its state, which may be missing.
        training_only: Names of parameters that take no part in evaluation.
        score_gate: What makes gates of its scores, where its weights may not tell.
        moving: Names of plain attributes that its `choice` reads and that may be set at any time.
    """

    num_experts: int
    free_experts: tuple[FreeKind, ...] = ()
    needs_previous: bool = False
    reads_sequences: bool = False
    needs_tokens: bool = False
    reads_tasks: bool = False
    training_only: frozenset[str] = frozenset()
    score_gate: Literal["softmax", "sigmoid"] | None = None
    moving: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route the tokens of h_TD."""

    def link(self, routers: Sequence[Router]) -> None:
        """Take hold of what it shares with the routers of other layers; most share nothing.

        Args:
            routers: Of all layers, first to last, this one among them.
        """

    def choice(self) -> Choice | None:
        """How it decides in evaluation, for native code; none where it takes more than that.

        It scores experts by one linear map then, that of `score_map`.
        """
        return None

    def score_map(self) -> ScoreMap:
        """The tensors behind its `choice`.

        Raises:
            InputError: If it has none.
        """
        raise InputError(
            f"{type(self).__name__} has no linear scores that native code could compute; route in "
            "torch"
        )

    def num_multiplied(self) -> int:
        """Weights that a token multiplies in evaluation."""
        return sum(
            p.numel()
            for name, p in self.named_parameters(recurse=False)
            if p.dim() == 2 and name not in self.training_only
        )


class LinearRouter(Router, ABC):
    """A router whose scores are one linear map of the token, without bias.

    Args:
        dim: D.
        num_experts: E.
        num_scores: Rows of the map, if not E.
    """

    def __init__(self, dim: int, num_experts: int, num_scores: int | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_scores or num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random rows; schedules start anew."""
        nn.init.normal_(self.weight, std=0.02)
        for child in self.children():
            if isinstance(child, StepClock):
                child.reset_parameters()

    def score_map(self) -> ScoreMap:
        """Its map."""
        return ScoreMap(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKConfig:
    """Settings of a router that has no others.

    Attributes:
        top_k: Experts per token.
    """

    top_k: int = 2

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")


def check_top_k(top_k: int, num_experts: int, field: str = "top_k") -> None:
    """Refuse to choose more experts than there are."""
    if top_k > num_experts:
        raise InputError(
            f"{field} must be in [1, num_experts={num_experts}], got {top_k}; lower it"
        )


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from computing in half what is inside."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def linear_scores(h_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Score every expert in float32 or better, whatever the dtype of the model or of autocast.

    A decision near its threshold must not depend on them.
    """
    dtype = torch.promote_types(h_TD.dtype, torch.float32)
    with full_precision(h_TD.device):
        scores_TE = torch.nn.functional.linear(h_TD.to(dtype), weight_ED.to(dtype))
    return scores_TE if bias_E is None else scores_TE + bias_E.to(dtype)


def highest_at_one(scores_TE: Tensor, top_k: int) -> Routing:
    """Choose the k highest scores; each chosen expert weighs exactly one.

    All experts together are then the network that they were cut from. The weight has the derivative
    of the score's sigmoid (straight-through; ours), so that training can still teach the router.

    Args:
        scores_TE: Scores, [T, E], float32 or better.
        top_k: K, at most E.

    Returns:
        K slots, highest first.
    """
    scores_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    gates_TK = scores_TK.sigmoid()
    # The difference is exactly zero.
    weights_TK = 1 + (gates_TK - gates_TK.detach())
    return Routing(ids_TK, weights_TK, scores_TE, scores_TE.shape[1])
