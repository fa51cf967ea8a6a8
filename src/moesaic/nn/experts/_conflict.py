"""Which experts pull shared dimensions in opposite directions, from one step to the next.

Source: CDSP-MoE, arXiv 2512.20291. Gradients are compared where both experts have a dimension,
matched by its index in the backbone: with K the dimensions of both, the cosine of the gradients
restricted to K, and zero where K is empty. Their sum over the slots of a token and the passes of a
step is what counts, so that it does not matter how a batch was cut.

Shapes: E experts, F dimensions of one expert, B dimensions of the backbone, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.nn._passes import PassCount
from moesaic.nn._processes import sum_over_processes


def shared_cosines(gradient_EFD: Tensor, dims_EF: Tensor, num_dims: int) -> Tensor:
    """Cosine of the gradients of every two experts on the dimensions that both have.

    Args:
        gradient_EFD: Gradient of every expert on its dimensions.
        dims_EF: Which these are, in any order, [E, F] int64.
        num_dims: B.

    Returns:
        [E, E] in float32 or better, symmetric; zero where two share nothing or one has no gradient.
    """
    num_experts, _, dim = gradient_EFD.shape
    dtype = torch.promote_types(gradient_EFD.dtype, torch.float32)
    gradient_EFD = gradient_EFD.to(dtype)
    # The size of gradients plays no part, and their squares must not underflow.
    largest_E11 = gradient_EFD.abs().amax((1, 2), keepdim=True)
    gradient_EFD = gradient_EFD / largest_E11.where(largest_E11 > 0, 1.0)
    index_EFD = dims_EF.unsqueeze(-1).expand(-1, -1, dim)
    placed_EBD = gradient_EFD.new_zeros(num_experts, num_dims, dim)
    placed_EBD = placed_EBD.scatter(1, index_EFD, gradient_EFD)
    has_EB = gradient_EFD.new_zeros(num_experts, num_dims).scatter(1, dims_EF, 1.0)
    placed_EN = placed_EBD.flatten(1)
    dot_EE = placed_EN @ placed_EN.T
    # Of expert i on the dimensions that j has, too.
    norm_EE = (placed_EBD.square().sum(-1) @ has_EB.T).sqrt()
    both_EE = norm_EE * norm_EE.T
    return torch.where(both_EE > 0, dot_EE / both_EE.where(both_EE > 0, 1.0), 0.0)


class StepConflict:
    """Collects the gradients of a step and gives their conflicts in the next one.

    It is in no checkpoint: what it holds is of one step before.

    Args:
        num_dims: B.
    """

    def __init__(self, num_dims: int) -> None:
        self.num_dims = num_dims
        # Of the step before, [E, E] in [0, 1]; none where nothing is known.
        self.last_EE: Tensor | None = None
        self._sum_EFD: Tensor | None = None
        self._dims_EF: Tensor | None = None
        self._passes = PassCount("gradients", "to be compared")

    def add(self, dims_EF: Tensor, gradient_EFD: Tensor) -> None:
        """Add the gradient of a pass."""
        dtype = torch.promote_types(gradient_EFD.dtype, torch.float32)
        gradient_EFD = gradient_EFD.detach().to(dtype)
        self._passes.add()
        self._dims_EF = dims_EF
        self._sum_EFD = gradient_EFD if self._sum_EFD is None else self._sum_EFD + gradient_EFD

    def end_step(self) -> None:
        """Turn the gradients of this step into the conflicts that the next one sees."""
        total_EFD, dims_EF = self._sum_EFD, self._dims_EF
        self.forget()
        if total_EFD is None or dims_EF is None:
            return
        # A copy: what autograd handed out is not ours to add to.
        total_EFD = sum_over_processes(total_EFD.clone())
        # A step that overflowed says nothing.
        if bool(total_EFD.isfinite().all()):
            self.last_EE = (-shared_cosines(total_EFD, dims_EF, self.num_dims)).relu()

    def forget(self) -> None:
        """Know nothing, as before the first step."""
        self.last_EE = self._sum_EFD = self._dims_EF = None
        self._passes.reset()
