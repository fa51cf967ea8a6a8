"""The best k experts by the token and by an embedding of its task, which may be missing.

Source: CDSP-MoE, arXiv 2512.20291: scores are one linear map of the normalised token beside an
embedding of the task; softmax over the k best alone. The embedding is zero where the task is not
known, and in training now and then for a whole pass, so that the router also learns to do without.

Here each token is normalised by itself; the authors' code normalises sequences as a whole.

Shapes: T tokens, D model width, E experts, K experts per token, N tasks, M width of the embedding,
B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTopKConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts per token.
        num_tasks: N; ids of tasks are in [0, N).
        size: M.
        probability: Chance that a pass of training hides the tasks, so that the router learns to
            do without.
    """

    top_k: int = 2
    num_tasks: int = 2
    size: int = 16
    probability: float = 0.1

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if min(self.num_tasks, self.size) < 1:
            raise InputError(
                f"num_tasks and size must be at least 1, got {self.num_tasks} and {self.size}; "
                "without tasks use topk-softmax"
            )
        if not 0.0 <= self.probability <= 1.0:
            raise InputError(
                f"probability must be in [0, 1], got {self.probability}; 0.1 is the paper's"
            )


class TaskTopK(Router):
    """CDSP-MoE's router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    reads_tasks = True

    def __init__(self, dim: int, num_experts: int, config: TaskTopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        # Part of the checkpoint format; columns of the token before those of the task.
        self.weight = nn.Parameter(torch.empty(num_experts, dim + config.size))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.norm_weight = nn.Parameter(torch.empty(dim))
        self.norm_bias = nn.Parameter(torch.empty(dim))
        self.task_embedding = nn.Parameter(torch.empty(config.num_tasks, config.size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random rows and embeddings of order one."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        nn.init.normal_(self.task_embedding)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Holds the tasks, if they are known.

        Returns:
            K = top_k slots, best first, whose weights sum to one; scores are the logits.

        Raises:
            InputError: If the tasks do not fit the tokens, or one lies outside of the embedding.
        """
        dtype = torch.promote_types(h_TD.dtype, torch.float32)
        with full_precision(h_TD.device):
            x_TD = nnf.layer_norm(
                h_TD.to(dtype),
                h_TD.shape[1:],
                self.norm_weight.to(dtype),
                self.norm_bias.to(dtype),
            )
        task_TM = self._embed(None if state is None else state.tasks_B, x_TD)
        scores_TE = linear_scores(torch.cat([x_TD, task_TM], dim=1), self.weight, self.bias)
        top_TK, ids_TK = scores_TE.topk(self.config.top_k, dim=-1)
        return Routing(ids_TK, top_TK.softmax(-1), scores_TE, self.num_experts)

    def _embed(self, tasks_B: Tensor | None, x_TD: Tensor) -> Tensor:
        """Embedding of the task of every token, zero where it is missing or hidden, [T, M]."""
        num_tokens = x_TD.shape[0]
        if tasks_B is None:
            return x_TD.new_zeros(num_tokens, self.config.size)
        tasks_B = tasks_B.to(x_TD.device)
        num_parts = tasks_B.shape[0]
        if tasks_B.dim() != 1 or num_tokens % max(1, num_parts):
            raise InputError(
                f"tasks must be one for each sequence or token, got the shape "
                f"{list(tasks_B.shape)} for {num_tokens} tokens; give [B]"
            )
        if num_parts and int(tasks_B.max()) >= self.config.num_tasks:
            raise InputError(
                f"num_tasks must be above every task, got {self.config.num_tasks} and task "
                f"{int(tasks_B.max())}; raise it"
            )
        known_B = tasks_B >= 0
        if self.training and float(torch.rand(())) < self.config.probability:
            known_B = torch.zeros_like(known_B)
        task_BM = self.task_embedding.to(x_TD.dtype)[tasks_B.clamp(min=0)]
        task_BM = task_BM * known_B.unsqueeze(1)
        return task_BM.repeat_interleave(num_tokens // max(1, num_parts), dim=0)

    def num_multiplied(self) -> int:
        """Weights of its map; the embedding is looked up."""
        return self.weight.numel()

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"tasks={self.config.num_tasks}, size={self.config.size}"
        )
