"""Fit the down product of a layer to what its blocks should give together: ridge regression.

Ours. Once it is known which neurons a token uses, the layer's output is linear in the down
product, and least squares moves it to where they make up for those that are left out, as SparseGPT
(arXiv 2301.00774) does for weights that are removed. All blocks together are then no longer the
network that they were cut from.

Shapes: B tokens, M neurons of all blocks together, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.conversion.gram_router import BlockErrors
from moesaic.nn.experts._base import Experts

# Of the mean square of each neuron, times neurons over tokens: with fewer tokens a neuron, the more
# of what they say is chance.
_RIDGE = 5.0


@torch.no_grad()
def fit_down(experts: Experts, errors: BlockErrors, tokens_B: Tensor, weights_BE: Tensor) -> None:
    """Move the down product to where least is missing.

    Args:
        experts: Their down product is written.
        errors: What they lose; it then tells what is still missing.
        tokens_B: Tokens to fit to, [B] int64.
        weights_BE: Weight of every block for them, [B, E].
    """
    num_neurons, dim = errors.down_MD.shape
    count_B1 = errors.scale_T1[tokens_B] / errors.scale_T1[tokens_B].sum()
    gram_MM = count_B1.new_zeros(num_neurons, num_neurons)
    cross_MD = count_B1.new_zeros(num_neurons, dim)
    for part_B, parts_BE, share_B1 in errors.batches(tokens_B, weights_BE, count_B1):
        x_BM = errors.weighted(part_B, parts_BE)
        scaled_MB = (x_BM * share_B1).T
        gram_MM += errors.product(scaled_MB, x_BM)
        cross_MD += errors.product(scaled_MB, errors.missing(part_B, parts_BE))
    squares_M = gram_MM.diagonal().double()
    # A neuron that is never on stays as it is.
    ridge_M = _RIDGE * num_neurons / len(tokens_B) * squares_M + 1e-6 * squares_M.mean() + 1e-30
    factor_MM = torch.linalg.cholesky(gram_MM.double() + torch.diag(ridge_M))
    move_MD = torch.cholesky_solve(cross_MD.double(), factor_MM).float()
    errors.down_MD = errors.down_MD + move_MD
    down_EDF = experts.weights().down
    down_EDF.add_(move_MD.view(len(down_EDF), -1, dim).transpose(1, 2).to(down_EDF.dtype))
