"""The specification of grouped experts: one expert after the other, in plain torch.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.weights import ExpertWeights


def experts_reference(
    h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Sum the weighted outputs of each token's experts.

    Args:
        h_TD: Inputs, [T, D].
        ids_TK: Expert of each slot, [T, K] int64; id E (or -1) is an empty slot.
        weights_TK: Weight of each slot, [T, K]; ignored where the slot is empty.
        weights: The experts.

    Returns:
        out_TD = sum over slots of weight * down(act(gate h) * (up h)), in the dtype of h.
    """
    # A sum over slots in bfloat16 would round once per slot.
    out_TD = torch.zeros_like(h_TD, dtype=torch.promote_types(h_TD.dtype, torch.float32))
    for expert in range(weights.num_experts):
        token_N, slot_N = (ids_TK == expert).nonzero(as_tuple=True)
        if token_N.numel() == 0:
            continue
        bias = None if weights.up_bias is None else weights.up_bias[expert]
        a_NF = weights.activate(F.linear(h_TD[token_N], weights.up[expert], bias), expert)
        bias = None if weights.down_bias is None else weights.down_bias[expert]
        y_ND = F.linear(a_NF, weights.down[expert], bias)
        weight_N1 = weights_TK[token_N, slot_N, None].to(out_TD.dtype)
        out_TD = out_TD.index_add(0, token_N, y_ND.to(out_TD.dtype) * weight_N1)
    return out_TD.to(h_TD.dtype)
