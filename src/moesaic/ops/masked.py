"""Every expert for every token, in the memory of one dense FFN.

The experts of a cut FFN together are as wide as the FFN was, so computing all of them costs what
the dense FFN costs. The slot weight scales an expert's neurons before the down product instead of
its output after it, so nothing of shape [T, E, D] exists. Training a router that needs the output
of experts it switched off (DSMoE's straight-through estimator) can do no better.

Shapes: T tokens, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.ops.weights import ExpertWeights


def experts_masked(h_TD: Tensor, weights_TE: Tensor | None, weights: ExpertWeights) -> Tensor:
    """Sum all experts, each scaled by its weight for the token.

    Args:
        h_TD: Inputs, [T, D].
        weights_TE: Weight of every expert for every token, [T, E]; none means one everywhere,
            which is the dense FFN.
        weights: The experts.

    Returns:
        out_TD, in the dtype of the products.
    """
    bias = None if weights.up_bias is None else weights.up_bias.flatten()
    z_TM = F.linear(h_TD, weights.up.flatten(0, 1), bias)

    def neurons(z_TM: Tensor, weights_TE: Tensor | None) -> Tensor:
        a_TEF = weights.activate(z_TM.unflatten(1, (weights.num_experts, -1)))
        if weights_TE is not None:
            a_TEF = a_TEF * weights_TE.to(a_TEF.dtype).unsqueeze(-1)
        return a_TEF.flatten(1)

    if torch.is_grad_enabled() and z_TM.requires_grad:
        # Keep the up product alone and redo the elementwise part in the backward pass: three
        # matrices of the FFN's width live at a time, where the dense FFN keeps four.
        a_TM = checkpoint(neurons, z_TM, weights_TE, use_reentrant=False, preserve_rng_state=False)
    else:
        a_TM = neurons(z_TM, weights_TE)
    down_DM = weights.down.permute(1, 0, 2).reshape(h_TD.shape[1], -1)
    out_TD = F.linear(a_TM, down_DM)
    if weights.down_bias is None:
        return out_TD
    if weights_TE is None:
        return out_TD + weights.down_bias.sum(0)
    return out_TD + weights_TE.to(out_TD.dtype) @ weights.down_bias
