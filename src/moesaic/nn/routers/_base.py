"""The interface of a router.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True)
class RouterState:
    """What some routers need beyond the token: other layers, other steps.

    Attributes:
        previous: Routing of the layer before, or none in the first.
        progress: Part of the training done, in [0, 1].
    """

    previous: Routing | None = None
    progress: float = 0.0


class Router(nn.Module, ABC):
    """Decides which experts each token uses.

    Attributes:
        num_experts: E, the real experts.
    """

    num_experts: int

    @abstractmethod
    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route the tokens of h_TD."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh weights."""


def linear_scores(h_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Score every expert in float32 or better, whatever the dtype of the model or of autocast.

    A decision near its threshold must not depend on them.
    """
    dtype = torch.promote_types(h_TD.dtype, torch.float32)
    device = h_TD.device.type
    plain: AbstractContextManager[object] = nullcontext()
    if torch.amp.is_autocast_available(device):
        plain = torch.autocast(device, enabled=False)
    with plain:
        scores_TE = torch.nn.functional.linear(h_TD.to(dtype), weight_ED.to(dtype))
    return scores_TE if bias_E is None else scores_TE + bias_E.to(dtype)
