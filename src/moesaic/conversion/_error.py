"""How far a converted layer is from its network on the text it was converted with.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.conversion._layers import Cut

_TOKENS = 1024
_CHUNK = 256


@torch.no_grad()
def layer_error(cut: Cut) -> Tensor:
    """Measure a filled layer whose router is started.

    Args:
        cut: Measured with the collector `inputs`; 1,024 of its tokens are used, evenly spread.

    Returns:
        Squared difference of the outputs over the square of the network's, mean over tokens, since
        a few tokens have outputs hundreds of times as long as the rest; a scalar in float32.
    """
    h_TD = cut.measured["inputs.h_TD"]
    h_TD = h_TD[:: -(-len(h_TD) // _TOKENS)].to(cut.ffn.up_FD.dtype)
    errors = []
    for h in h_TD.split(_CHUNK):
        neurons_TF = cut.ffn.neurons(h.to(cut.ffn.up_FD.device))
        dense_TD = linear(neurons_TF, cut.ffn.down_DF, cut.ffn.down_bias_D).cpu().float()
        gap_TD = cut.moe(h).float() - dense_TD
        tiny = torch.finfo(torch.float32).tiny
        errors.append(gap_TD.square().sum(1) / dense_TD.square().sum(1).clamp(min=tiny))
    return torch.cat(errors).mean()


def error_results(kept: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """Tell the errors that layers kept under `error`, if they did."""
    if not all("error" in tensors for tensors in kept):
        return {}
    return {"error_per_layer": [round(float(tensors["error"]), 5) for tensors in kept]}
