"""Loads of a training step, for routers whose choice bias follows them.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moesaic.nn._passes import PassCount
from moesaic.nn._processes import sum_over_processes


class StepLoads:
    """Counts how often each expert was chosen since the last optimiser step.

    A pass counts when its gradient reaches the scores and not in `forward`, so that a layer which
    recomputes its forward is not counted twice and one that does not train is not counted.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._counts_E: Tensor | None = None
        self._passes = PassCount("loads", "to move a router's bias")

    def watch(self, ids_TK: Tensor, scores_TE: Tensor) -> None:
        """Count these choices once the gradient of their scores is known."""
        if scores_TE.requires_grad:
            scores_TE.register_hook(partial(self._count, ids_TK))

    def _count(self, ids_TK: Tensor, gradient_TE: Tensor) -> None:
        counts_E = torch.bincount(ids_TK.flatten(), minlength=self.num_experts)
        self._counts_E = counts_E if self._counts_E is None else self._counts_E + counts_E
        self._passes.add()

    def take(self) -> Tensor | None:
        """Give the counts of the step over all processes and begin the next one.

        Returns:
            [E] int64; none where no pass was counted.
        """
        counts_E = self._counts_E
        self.drop()
        return None if counts_E is None else sum_over_processes(counts_E)

    def drop(self) -> None:
        """Begin the next step without the counts of this one."""
        self._counts_E = None
        self._passes.reset()
