"""FLAP: the neurons that vary least are removed, and a bias stands in for what they add on average.

Source: Fluctuation-based Adaptive Structured Pruning, arXiv 2312.11983: its metric WIFV, the scores
standardised over each layer for one threshold over all of them, and the bias compensation. Only
feed-forward networks are pruned here; the paper prunes attention heads too. Ours: widths in
multiples of a number, and the bias of a network that has one is added to.

The honest baseline of a mixture: it costs no router, and the same neurons serve every token.

Shapes: F neurons of a network, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._files import atomic_write
from moesaic._progress import SILENT, Progress
from moesaic.calibration.fluctuation import fluctuation, mean_output
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
from moesaic.models.ffn import FFN, fill_experts
from moesaic.nn.layer import MoELayer


@dataclass(frozen=True, slots=True, kw_only=True)
class FLAP:
    """Settings of the pruning.

    Attributes:
        active: Fraction of neurons to keep, in (0, 1]; over all layers with `adaptive`.
        structure: `adaptive` (the paper) keeps more neurons in some layers than in others;
            `uniform` keeps the same fraction of each.
        compensate: Whether the mean contribution of removed neurons moves to the output bias.
        multiple: Widths are multiples of it, since odd ones are slow; 1 for any width. At least
            so many neurons of a layer stay.
    """

    active: float = 0.7
    structure: Literal["adaptive", "uniform"] = "adaptive"
    compensate: bool = True
    multiple: int = 8

    def __post_init__(self) -> None:
        check_active(self.active)
        check_multiple(self.multiple)

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return ("neurons",)


class _Measured(NamedTuple):
    """What decides about the neurons of a layer."""

    score_F: Tensor
    mean_F: Tensor


@torch.no_grad()
def prune_flap(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: FLAP,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Prune a dense model; it is consumed, layer by layer, so that no second copy exists.

    Args:
        model: A dense model of a known architecture.
        stats: Its calibration with the collector `neurons`.
        config: Settings.
        store: Directory for the scores of finished layers; an interrupted run goes on after them.
        progress: Told of every layer, once for its scores and once for its cut.

    Returns:
        The pruned model in evaluation mode, and what came out: the fraction `active` that is left
        and the `widths` of the layers.

    Raises:
        InputError: Before the model is touched, if the settings do not fit it or the statistics.
    """
    stats = check_measured(model, stats, config.collectors(), by="flap")
    networks = Networks.of(model)
    dense_widths = networks.widths()
    check_widths(config.active, config.multiple, dense_widths)

    with progress.stage("prune", 2 * len(dense_widths), "layers") as stage:
        measured = []
        for index in range(len(dense_widths)):
            measured.append(_measure(networks.read(index), stats, index, store))
            stage.advance()
        widths = choose_widths([m.score_F for m in measured], config)

        specs = networks.adopt(widths, output_bias=config.compensate)
        for index, (score_F, mean_F) in enumerate(measured):
            moe, ffn = networks.fresh(index, specs[index]), networks.read(index)
            _fill(moe, ffn, score_F, mean_F, compensate=config.compensate)
            networks.put(index, moe)
            stage.advance()
    return model.eval(), {"active": sum(widths) / sum(dense_widths), "widths": widths}


def choose_widths(scores: Sequence[Tensor], config: FLAP) -> list[int]:
    """Decide how many neurons each layer keeps.

    Args:
        scores: Score of every neuron, [F] for each layer.
        config: Settings.

    Returns:
        A width for each layer: a multiple of `config.multiple`, or all of F. With `adaptive` the
        widths together are the nearest that steps of `multiple` neurons allow to the fraction
        asked for, with `uniform` each of them is.
    """
    if config.structure == "uniform":
        return equal_widths([len(s) for s in scores], config.active, config.multiple)
    return widths_by_rank([_standardised(s) for s in scores], config.active, config.multiple)


def _standardised(score_F: Tensor) -> Tensor:
    """Scores less their mean, in units of their deviation; layers are then comparable."""
    score_F = score_F.double()
    deviation = score_F.std(correction=0).clamp(min=torch.finfo(torch.float64).tiny)
    return (score_F - score_F.mean()) / deviation


def _measure(ffn: FFN, stats: CalibrationStats, index: int, store: Path | None) -> _Measured:
    """Score one layer, or read what an interrupted run left."""
    file = None if store is None else store / f"layer_{index:03d}.safetensors"
    if file is not None and file.is_file():
        return _Measured(**load_file(file))
    names = ("neurons.mean_F", "neurons.variance_F")
    mean_F, variance_F = neuron_statistics(stats, index, ffn.width, names)
    measured = _Measured(fluctuation(variance_F, ffn.down_DF), mean_F)
    if file is not None:
        with atomic_write(file) as temporary:
            save_file(measured._asdict(), temporary)
    return measured


def _fill(moe: MoELayer, ffn: FFN, score_F: Tensor, mean_F: Tensor, *, compensate: bool) -> None:
    """Write the neurons that stay, in their order, and the bias for those that go."""
    order_F = ranked(score_F).to(ffn.up_FD.device)
    width = moe.config.shared_width
    fill_experts(moe, ffn.keep(order_F[:width].sort().values))
    if not compensate or width == ffn.width:
        return
    assert moe.output_bias is not None
    moe.output_bias.copy_(mean_output(ffn, mean_F, order_F[width:]))
