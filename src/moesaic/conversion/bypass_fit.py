"""Fit the linear map that stands in for experts that are off: reduced-rank regression.

Ours. What the experts that a token does without would have added is regressed on the token's
input, each token counting as in the fit of the routers; of the full map those directions of the
output are kept that explain most (reduced-rank regression, Izenman 1975). Without the inputs it
would be their mean.

Shapes: B tokens, D model width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.nn.bypass import Bypass

# Of the mean square of the whitened inputs.
_RIDGE = 1e-3


@torch.no_grad()
def fit_bypass(bypass: Bypass, h_BD: Tensor, missing_BD: Tensor, scale_B1: Tensor) -> None:
    """Write the map that comes nearest to what is missing.

    Args:
        bypass: Its weights are written.
        h_BD: Inputs of the layer, [B, D].
        missing_BD: What is to be added to its output, [B, D].
        scale_B1: What the squared error of each token counts, [B, 1].
    """
    count_B1 = scale_B1 / scale_B1.sum()
    mean_D, mean_missing_D = (count_B1 * h_BD).sum(0), (count_B1 * missing_BD).sum(0)
    x_BD = (h_BD - mean_D) * count_B1.sqrt()
    y_BD = (missing_BD - mean_missing_D) * count_B1.sqrt()
    # In float64, since a few directions of the inputs carry most of their variance.
    cov_DD, cross_DD = (x_BD.T @ x_BD).double(), (x_BD.T @ y_BD).double()
    values_D, vectors_DD = torch.linalg.eigh(cov_DD)
    values_D = values_D.clamp(min=0) + 1e-2 * values_D.mean() + 1e-12
    whiten_DD = vectors_DD * values_D.rsqrt()
    # Covariance of the whitened inputs, close to the identity.
    white_DD = whiten_DD.T @ cov_DD @ whiten_DD
    ridge_DD = _RIDGE * torch.eye(len(white_DD), dtype=white_DD.dtype, device=white_DD.device)
    map_DD = torch.linalg.solve(white_DD + ridge_DD, whiten_DD.T @ cross_DD)
    explained_DD = map_DD.T @ white_DD @ map_DD
    best_DR = torch.linalg.eigh(explained_DD).eigenvectors[:, -bypass.rank :]
    down_DR = whiten_DD @ map_DD @ best_DR
    bypass.down_proj.weight.copy_(down_DR.T)
    bypass.up_proj.weight.copy_(best_DR)
    bypass.up_proj.bias.copy_(mean_missing_D - best_DR @ (down_DR.T @ mean_D.double()))
