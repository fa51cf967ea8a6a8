"""LLM-Pruner, block-wise: the neurons whose weights the loss feels least are removed.

Source: LLM-Pruner, arXiv 2305.11627, section 3.2: a group of coupled weights goes as a whole, by
the importance that the gradient of the loss gives it, summed over its weights
(`moesaic.calibration.gradients` says how). The group here is a neuron: its row of the gate and up
matrices and its column of the down matrix. Ours: only feed-forward networks are pruned, so that a
token uses the fraction `active` of them and attention stays; the paper removes heads in the same
way. All layers are pruned, where its recipe spares the first and the last ones; no training
follows, where its recipe adapts with LoRA.

What is left is smaller and runs as fast as its size says.

Shapes: F neurons of a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.compression.pruning._base import (
    Networks,
    check_active,
    check_measured,
    check_multiple,
    check_widths,
    equal_widths,
    neuron_statistics,
    ranked,
    widths_by_rank,
)
from moesaic.models.ffn import fill_experts

_STATISTICS = {
    "first": "gradients.weight_importance_F",
    "second": "gradients.weight_second_F",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMPrunerBlock:
    """Settings of the pruning.

    Attributes:
        active: Fraction of neurons to keep, in (0, 1]; over all layers with `together`.
        structure: `uniform` (the paper's recipe, which it calls local) keeps the same fraction of
            each layer; `together` (global) keeps the most important neurons of all layers.
        order: Of the importance: `first` sums |w dL/dw|, `second` the square of w times the mean
            squared gradient.
        multiple: Widths are multiples of it, since odd ones are slow; 1 for any width. At least
            so many neurons of a layer stay.
    """

    active: float = 0.7
    structure: Literal["uniform", "together"] = "uniform"
    order: Literal["first", "second"] = "first"
    multiple: int = 8

    def __post_init__(self) -> None:
        check_active(self.active)
        check_multiple(self.multiple)

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return ("gradients",)


@torch.no_grad()
def prune_block(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: LLMPrunerBlock,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Prune a dense model; it is consumed, layer by layer, so that no second copy exists.

    Args:
        model: A dense model of a known architecture.
        stats: Its calibration with the collector `gradients`.
        config: Settings.
        store: Not used: all that takes time is in the calibration.
        progress: Told of every layer.

    Returns:
        The pruned model in evaluation mode, and what came out: the fraction `active` that is left
        and the `widths` of the layers.

    Raises:
        InputError: Before the model is touched, if the settings do not fit it or the statistics.
    """
    stats = check_measured(model, stats, config.collectors(), by="llm-pruner-block")
    networks = Networks.of(model)
    dense_widths = networks.widths()
    check_widths(config.active, config.multiple, dense_widths)
    names = (_STATISTICS[config.order],)
    scores = [
        neuron_statistics(stats, index, width, names)[0] for index, width in enumerate(dense_widths)
    ]
    if config.structure == "uniform":
        widths = equal_widths(dense_widths, config.active, config.multiple)
    else:
        widths = widths_by_rank(scores, config.active, config.multiple)

    specs = networks.adopt(widths)
    with progress.stage("prune", len(widths), "layers") as stage:
        for index, (score_F, width) in enumerate(zip(scores, widths, strict=True)):
            moe, ffn = networks.fresh(index, specs[index]), networks.read(index)
            kept = ranked(score_F)[:width].sort().values
            fill_experts(moe, ffn.keep(kept.to(ffn.up_FD.device)))
            networks.put(index, moe)
            stage.advance()
    return model.eval(), {"active": sum(widths) / sum(dense_widths), "widths": widths}
