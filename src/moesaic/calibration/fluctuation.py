"""Which neurons vary least, and what they add on average: what pruning by FLAP decides by.

Source: Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983.

Shapes: F neurons of a network, D model width, M neurons of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.models.ffn import FFN


def fluctuation(variance_F: Tensor, down_DF: Tensor) -> Tensor:
    """Score every neuron by how much its contribution to the output varies.

    FLAP's metric WIFV, arXiv 2312.11983: the variance of the neuron's value over tokens times the
    squared length of its down column.

    Args:
        variance_F: Variance of the input of the down product, [F].
        down_DF: Down matrix, [D, F].

    Returns:
        Scores in float32, [F].
    """
    return variance_F.float() * down_DF.float().square().sum(0).to(variance_F.device)


@torch.no_grad()
def mean_output(ffn: FFN, mean_F: Tensor, neurons_M: Tensor) -> Tensor:
    """Bias that stands in for some neurons: what they add on average, and the network's own bias.

    Args:
        ffn: The network.
        mean_F: Mean of the input of the down product, [F].
        neurons_M: Neurons that go.

    Returns:
        The bias in float32, [D]: one of half precision would swallow small contributions.
    """
    mean_F = mean_F.to(ffn.down_DF.device)
    bias_D = ffn.down_DF[:, neurons_M].float() @ mean_F[neurons_M]
    return bias_D if ffn.down_bias_D is None else bias_D + ffn.down_bias_D.float()
