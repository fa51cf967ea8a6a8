"""Wanda: of every output, the inputs whose weight times the size of the input is least are cut.

Source: A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695,
section 3: the score |W_ij| ||X_j||, compared within each row, no update of what stays, and layers
pruned in sequence. As in its code, the matrices of one layer are scored on what the layer gives
before it is pruned itself. Only feed-forward networks are pruned here; the paper prunes attention
too.

Zeros cost as much as other weights in a dense product: this says what sparsity costs in quality,
not what it gains in speed. `moesaic.training` keeps the zeros.

Shapes: T tokens, F neurons of a network, D model width; R rows and C columns of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
class Wanda:
    """Settings of the pruning.

    Attributes:
        active: Fraction of the weights of every row to keep, in (0, 1]; rounded to whole weights.
    """

    active: float = 0.7

    def __post_init__(self) -> None:
        check_active(self.active)

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return COLLECTORS


def prune_wanda(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: Wanda,
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
        RunError: If the inputs of a network are not finite.
    """

    def prune(ffn: FFN, h_TD: Tensor) -> FFN:
        square_D = torch.zeros(h_TD.shape[1], device=h_TD.device)
        square_F = torch.zeros(ffn.width, device=h_TD.device)
        for piece_TD, a_TF in neuron_chunks(ffn, h_TD):
            square_D += piece_TD.square().sum(0)
            square_F += a_TF.square().sum(0)
        norm_D, norm_F = square_D.sqrt(), square_F.sqrt()
        gate_FD = ffn.gate_FD
        return ffn._replace(
            gate_FD=None if gate_FD is None else cut_rows(gate_FD, norm_D, config.active),
            up_FD=cut_rows(ffn.up_FD, norm_D, config.active),
            down_DF=cut_rows(ffn.down_DF, norm_F, config.active),
        )

    return prune_weights(
        model, stats, config.active, prune, by="wanda", store=store, progress=progress
    )


def cut_rows(weight_RC: Tensor, norm_C: Tensor, active: float) -> Tensor:
    """Zero the lowest scores |W_ij| ||X_j|| of every row.

    Args:
        weight_RC: A matrix, out x in, [R, C].
        norm_C: Length of each of its inputs over the tokens, [C].
        active: Fraction to keep, rounded to whole weights.

    Returns:
        The matrix with the same number of zeros in every row, [R, C].
    """
    num_columns = weight_RC.shape[1]
    score_RC = weight_RC.float().abs() * norm_C
    dropped_RC = drop_smallest(score_RC, num_columns - round(active * num_columns))
    return weight_RC.masked_fill(dropped_RC, 0.0)
