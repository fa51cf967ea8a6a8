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

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic._progress import SILENT, Progress
from moesaic.calibration.fluctuation import fluctuation, mean_output
from moesaic.calibration.stats import CalibrationStats
from moesaic.models.architectures import ARCHITECTURES, architecture_of
from moesaic.models.ffn import FFN, decoder_layers, fill_experts, put_layer, read_ffn
from moesaic.models.modeling import adopt
from moesaic.nn.layer import LayerConfig, MoELayer


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
        if not 0.0 < self.active <= 1.0:
            raise InputError(f"active must be in (0, 1], got {self.active}; 0.7 keeps 70%")
        if self.multiple < 1:
            raise InputError(f"multiple must be at least 1, got {self.multiple}; 8 is usual")

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
    row = architecture_of(model.config.model_type)
    if model.config.model_type not in ARCHITECTURES:
        raise InputError("the model is converted already; give its dense parent")
    if stats is None:
        raise InputError("flap needs calibration of neurons")
    layers = decoder_layers(model)
    stats.require(*config.collectors(), by="flap", num_layers=len(layers))
    activation = getattr(model.config, row.activation)
    dense_widths = [read_ffn(layer, row, activation).width for layer in layers]
    least = sum(min(config.multiple, width) for width in dense_widths)
    if config.active * sum(dense_widths) < least - config.multiple / 2:
        raise InputError(
            f"active={config.active} leaves fewer than multiple={config.multiple} neurons in each "
            f"of {len(layers)} layers; raise it to {least / sum(dense_widths):.3g} or lower "
            "multiple"
        )

    with progress.stage("prune", 2 * len(layers), "layers") as stage:
        measured = []
        for index, layer in enumerate(layers):
            ffn = read_ffn(layer, row, activation)
            measured.append(_measure(ffn, stats, index, store))
            stage.advance()
        widths = choose_widths([m.score_F for m in measured], config)

        specs = []
        for layer, width in zip(layers, widths, strict=True):
            ffn = read_ffn(layer, row, activation)
            specs.append(
                LayerConfig(
                    num_experts=0,
                    shared_width=width,
                    output_bias=config.compensate or ffn.down_bias_D is not None,
                    experts="gated" if row.gated else "plain",
                    activation=ffn.activation,
                    bias=ffn.up_bias_F is not None,
                )
            )
        adopt(
            model,
            {
                "layers": [to_plain(spec) for spec in specs],
                "losses": {},
                "dense_width": dense_widths[0],
            },
        )
        for layer, spec, (score_F, mean_F) in zip(layers, specs, measured, strict=True):
            ffn = read_ffn(layer, row, activation)
            moe = MoELayer(model.config.hidden_size, spec).to(ffn.up_FD.dtype)
            _fill(moe, ffn, score_F, mean_F, compensate=config.compensate)
            put_layer(layer, row, moe.to(ffn.up_FD.device).eval())
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
    step = config.multiple
    if config.structure == "uniform":
        return [
            min([*range(step, len(s), step), len(s)], key=lambda w: abs(w - config.active * len(s)))
            for s in scores
        ]
    # Neurons are kept in steps, best first; the middle one of a step speaks for it.
    value, size, owner = [], [], []
    for layer, score_F in enumerate(scores):
        z_F = _standardised(score_F).sort(descending=True).values
        starts = torch.arange(0, len(z_F), step)
        values = z_F[(starts + step // 2).clamp(max=len(z_F) - 1)]
        # A layer without neurons would be another architecture.
        values[0] = torch.inf
        value.append(values)
        size.append((len(z_F) - starts).clamp(max=step))
        owner.append(torch.full_like(starts, layer))
    order = torch.cat(value).sort(descending=True, stable=True).indices
    sizes, owners = torch.cat(size)[order], torch.cat(owner)[order]
    total = sizes.cumsum(0)
    gap = (total - config.active * int(total[-1])).abs()
    gap[: len(scores) - 1] = torch.inf
    num_steps = int(gap.argmin()) + 1
    kept = torch.zeros(len(scores), dtype=torch.int64)
    kept.index_add_(0, owners[:num_steps], sizes[:num_steps])
    return [int(width) for width in kept]


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
    tensors = stats.layer(index)
    mean_F, variance_F = tensors["neurons.mean_F"], tensors["neurons.variance_F"]
    if mean_F.shape != (ffn.width,):
        raise InputError(
            f"{stats.directory} was measured on {mean_F.shape[0]} neurons, layer {index} has "
            f"{ffn.width}; calibrate this model"
        )
    if not bool((mean_F.isfinite() & variance_F.isfinite()).all()):
        raise InputError(
            f"the statistics of layer {index} in {stats.directory} have values that are not "
            "finite; calibrate again in float32 or bfloat16"
        )
    measured = _Measured(fluctuation(variance_F, ffn.down_DF), mean_F)
    if file is not None:
        with atomic_write(file) as temporary:
            save_file(measured._asdict(), temporary)
    return measured


def _fill(moe: MoELayer, ffn: FFN, score_F: Tensor, mean_F: Tensor, *, compensate: bool) -> None:
    """Write the neurons that stay, in their order, and the bias for those that go."""
    order_F = score_F.sort(descending=True, stable=True).indices.to(ffn.up_FD.device)
    width = moe.config.shared_width
    fill_experts(moe, ffn.keep(order_F[:width].sort().values))
    if not compensate or width == ffn.width:
        return
    assert moe.output_bias is not None
    moe.output_bias.copy_(mean_output(ffn, mean_F, order_F[width:]))
