"""Gated feed-forward experts, in the tensor layout of transformers 5.

Source: GLU variants, arXiv 2002.05202.

Shapes: E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import torch
from torch import nn

from moesaic.nn.experts._base import Experts, ExpertsConfig
from moesaic.ops.weights import ExpertWeights


class GatedExperts(Experts):
    """Experts down(act(gate h) * (up h)).

    Args:
        dim: D.
        num_experts: E.
        width: F.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.width = width
        self.activation = config.activation
        # Names and layout [E, 2F, D], [E, D, F] are part of the checkpoint format.
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, width))
        self.gate_up_proj_bias = (
            nn.Parameter(torch.empty(num_experts, 2 * width)) if config.bias else None
        )
        self.down_proj_bias = (
            nn.Parameter(torch.empty(num_experts, dim)) if config.down_bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random weights; biases start at zero."""
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def weights(self) -> ExpertWeights:
        """Give the weights to an expert path."""
        return ExpertWeights(
            up=self.gate_up_proj,
            down=self.down_proj,
            activation=self.activation,
            gated=True,
            up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
        )
