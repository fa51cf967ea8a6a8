"""SparseGPT: weights are cut column by column, and what stays makes up for what went.

Source: SparseGPT, arXiv 2301.00774, section 3 and its code: the Hessian of each matrix's squared
output error, inputs that are always zero cut, 1% damping, the Cholesky factor of the inverse, the
mask of each block of 128 columns from the weights as they are by then, and layers pruned in
sequence. As in its code, the matrices of one layer are pruned on what the layer gives before it is
pruned itself. Only feed-forward networks are pruned here; the paper prunes attention too. Ours: the
number of zeros of a block is exact, where the code compares with a threshold.

Zeros cost as much as other weights in a dense product: this says what sparsity costs in quality,
not what it gains in speed. `moesaic.training` keeps the zeros.

Beside the model and the walk, it holds 16 * F * F bytes, the Hessian of the down product and what
becomes of it; its time in a layer grows with F * F * (T + D + F).

Shapes: T tokens, F neurons of a network, D model width; R rows and C columns of one matrix, B
columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.compression.pruning._base import check_active
from moesaic.compression.pruning._sequential import (
    COLLECTORS,
    drop_smallest,
    neuron_chunks,
    prune_weights,
)
from moesaic.models.ffn import FFN


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGPT:
    """Settings of the pruning.

    Attributes:
        active: Fraction of the weights of every block of columns to keep, in (0, 1]; rounded to
            whole weights.
        block: Columns whose mask is chosen together; 128 in the paper.
        damping: Of the mean of the Hessian's diagonal, added to it; more where text is little.
    """

    active: float = 0.7
    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_active(self.active)
        if self.block < 1 or self.damping <= 0:
            raise InputError(
                f"block must be at least 1 and damping above 0, got {self.block} and "
                f"{self.damping}; 128 and 0.01 are usual"
            )

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return COLLECTORS


def prune_sparsegpt(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: SparseGPT,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Prune a dense model; it is consumed, layer by layer, so that no second copy exists.

    Args:
        model: A dense model of a known architecture.
        stats: Its calibration with the collector `tokens`.
        config: Settings.
        store: Directory for finished layers; an interrupted run goes on after them.
        progress: Told of every token.

    Returns:
        The pruned model in evaluation mode, and the fraction `active` of weights of its networks
        that are not zero.

    Raises:
        InputError: Before the model is touched, if the settings do not fit it or the statistics.
        RunError: If the inputs of a network are not finite, or its Hessian has no inverse.
    """

    def prune(ffn: FFN, h_TD: Tensor) -> FFN:
        hessian_DD = torch.zeros(h_TD.shape[1], h_TD.shape[1], device=h_TD.device)
        hessian_FF = torch.zeros(ffn.width, ffn.width, device=h_TD.device)
        for piece_TD, a_TF in neuron_chunks(ffn, h_TD):
            hessian_DD.addmm_(piece_TD.T, piece_TD, alpha=2 / len(h_TD))
            hessian_FF.addmm_(a_TF.T, a_TF, alpha=2 / len(h_TD))
        down_DF = cut_columns(ffn.down_DF, hessian_FF, config)
        del hessian_FF
        gate_FD = ffn.gate_FD
        return ffn._replace(
            gate_FD=None if gate_FD is None else cut_columns(gate_FD, hessian_DD, config),
            up_FD=cut_columns(ffn.up_FD, hessian_DD, config),
            down_DF=down_DF,
        )

    return prune_weights(
        model, stats, config.active, prune, by="sparsegpt", store=store, progress=progress
    )


def cut_columns(weight_RC: Tensor, hessian_CC: Tensor, config: SparseGPT) -> Tensor:
    """Zero weights block by block of columns, and move their error to the columns after them.

    Args:
        weight_RC: A matrix, out x in, [R, C].
        hessian_CC: (2 / T) X^T X of its inputs, [C, C], float32.
        config: Settings.

    Returns:
        The matrix with the same share of zeros in every block, in its dtype, [R, C].

    Raises:
        RunError: If the damped Hessian has no Cholesky factor.
    """
    if config.active == 1.0:
        return weight_RC
    factor_CC = _inverse_factor(hessian_CC, config.damping)
    # In float32: an error that is passed on over many columns outgrows half precision.
    left_RC = weight_RC.float().masked_fill(hessian_CC.diagonal() == 0, 0.0)
    cut_RC = torch.empty_like(left_RC)
    for start in range(0, left_RC.shape[1], config.block):
        block = slice(start, start + config.block)
        u_BB = factor_CC[block, block]
        w_RB = left_RC[:, block].clone()
        score = (w_RB / u_BB.diagonal()).square().flatten()
        num_cut = score.numel() - round(config.active * score.numel())
        gone_RB = drop_smallest(score[None], num_cut).view_as(w_RB)
        error_RB = torch.zeros_like(w_RB)
        for i in range(w_RB.shape[1]):
            # What is lost with a weight, in units of what its own column can still change.
            error_RB[:, i] = w_RB[:, i] * gone_RB[:, i] / u_BB[i, i]
            w_RB[:, i:] -= error_RB[:, i, None] * u_BB[i, i:]
        cut_RC[:, block] = w_RB.masked_fill(gone_RB, 0.0)
        left_RC[:, start + config.block :] -= error_RB @ factor_CC[block, start + config.block :]
    return cut_RC.to(weight_RC.dtype)


def _inverse_factor(hessian_CC: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of the inverse of the damped Hessian: H^-1 = U^T U."""
    added = damping * hessian_CC.diagonal().mean()
    damped_CC = hessian_CC + added * torch.eye(len(hessian_CC), device=hessian_CC.device)
    factor_CC: Tensor
    lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
    inverse_CC = torch.cholesky_inverse(lower_CC)
    factor_CC, failed_too = torch.linalg.cholesky_ex(inverse_CC, upper=True)
    if bool(failed) or bool(failed_too):
        raise RunError(
            f"the Hessian of a layer has no inverse with damping={damping}; raise it, or "
            "calibrate on more text"
        )
    return factor_CC
