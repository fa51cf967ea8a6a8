"""What compressions share: checks, how many neurons stay, and layers that are always on.

A pruned feed-forward network is a `MoELayer` without experts, whose shared part is what is left.

Shapes: F neurons of a network, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.calibration.stats import CalibrationStats
from moesaic.models.architectures import Architecture, architecture_of, dense_architecture
from moesaic.models.ffn import FFN, decoder_layers, put_layer, read_ffn
from moesaic.models.modeling import adopt
from moesaic.nn.layer import LayerConfig, MoELayer


def check_active(active: float) -> None:
    """Refuse a fraction outside (0, 1]."""
    if not 0.0 < active <= 1.0:
        raise InputError(f"active must be in (0, 1], got {active}; 0.7 keeps 70%")


def check_multiple(multiple: int) -> None:
    """Refuse a step of widths below 1."""
    if multiple < 1:
        raise InputError(f"multiple must be at least 1, got {multiple}; 8 is usual")


def check_measured(
    model: PreTrainedModel, stats: CalibrationStats | None, collectors: tuple[str, ...], *, by: str
) -> CalibrationStats:
    """Refuse a converted model, and statistics that a pruning cannot use.

    Args:
        model: What is to be pruned.
        stats: Its calibration.
        collectors: What the pruning needs of it.
        by: Name of the pruning.

    Returns:
        The statistics.

    Raises:
        InputError: Naming what is wrong and the remedy.
    """
    dense_architecture(model.config.model_type)
    if stats is None:
        raise InputError(f"{by} needs calibration of {', '.join(collectors)}")
    stats.require(*collectors, by=by, num_layers=len(decoder_layers(model)))
    return stats


def neuron_statistics(
    stats: CalibrationStats, index: int, width: int, names: Sequence[str]
) -> list[Tensor]:
    """Read what was measured of the neurons of a layer.

    Args:
        stats: The calibration.
        index: Of the layer.
        width: F.
        names: `collector.tensor` of each.

    Returns:
        One [F] for each name.

    Raises:
        InputError: If they are of another number of neurons, or not finite.
    """
    tensors = stats.layer(index)
    measured = [tensors[name] for name in names]
    for value_F in measured:
        if value_F.shape != (width,):
            raise InputError(
                f"{stats.directory} was measured on {value_F.shape[0]} neurons, layer {index} has "
                f"{width}; calibrate this model"
            )
        if not bool(value_F.isfinite().all()):
            raise InputError(
                f"the statistics of layer {index} in {stats.directory} have values that are not "
                "finite; calibrate again in float32 or bfloat16"
            )
    return measured


def check_widths(active: float, multiple: int, dense_widths: Sequence[int]) -> None:
    """Refuse a fraction that leaves some layer without neurons."""
    least = sum(min(multiple, width) for width in dense_widths)
    if active * sum(dense_widths) < least - multiple / 2:
        raise InputError(
            f"active={active} leaves fewer than multiple={multiple} neurons in each "
            f"of {len(dense_widths)} layers; raise it to {least / sum(dense_widths):.3g} or lower "
            "multiple"
        )


def equal_widths(dense_widths: Sequence[int], active: float, multiple: int) -> list[int]:
    """Keep the same fraction of every layer: the nearest multiple, or all."""
    return [
        min([*range(multiple, width, multiple), width], key=lambda w: abs(w - active * width))
        for width in dense_widths
    ]


def widths_by_rank(scores: Sequence[Tensor], active: float, multiple: int) -> list[int]:
    """Keep the best neurons of all layers together, in steps of `multiple` neurons of one layer.

    Args:
        scores: Score of every neuron, [F] for each layer, comparable over layers.
        active: Fraction to keep.
        multiple: Of the step.

    Returns:
        A width for each layer, at least one step and at most F; together they are the nearest that
        steps allow to the fraction.
    """
    # Neurons are kept in steps, best first; the middle one of a step speaks for it.
    value, size, owner = [], [], []
    for layer, score_F in enumerate(scores):
        best_F = score_F.sort(descending=True).values
        starts = torch.arange(0, len(best_F), multiple)
        values = best_F[(starts + multiple // 2).clamp(max=len(best_F) - 1)]
        # A layer without neurons would be another architecture.
        values[0] = torch.inf
        value.append(values)
        size.append((len(best_F) - starts).clamp(max=multiple))
        owner.append(torch.full_like(starts, layer))
    order = torch.cat(value).sort(descending=True, stable=True).indices
    sizes, owners = torch.cat(size)[order], torch.cat(owner)[order]
    total = sizes.cumsum(0)
    gap = (total - active * int(total[-1])).abs()
    gap[: len(scores) - 1] = torch.inf
    num_steps = int(gap.argmin()) + 1
    kept = torch.zeros(len(scores), dtype=torch.int64)
    kept.index_add_(0, owners[:num_steps], sizes[:num_steps])
    return [int(width) for width in kept]


def ranked(score_F: Tensor) -> Tensor:
    """Neurons from the best score to the worst, the first of equals first."""
    return score_F.sort(descending=True, stable=True).indices


@dataclass(frozen=True, slots=True)
class Networks:
    """The feed-forward networks of a dense model that gives them up one by one.

    Attributes:
        model: The model; it is consumed, so that no second copy exists.
        row: Its architecture.
        layers: Its decoder layers.
    """

    model: PreTrainedModel
    row: Architecture
    layers: list[nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Networks:
        """Find the networks of a model of a known architecture."""
        return cls(model, architecture_of(model.config.model_type), decoder_layers(model))

    def read(self, index: int) -> FFN:
        """The network of a layer that still has it."""
        activation = getattr(self.model.config, self.row.activation)
        return read_ffn(self.layers[index], self.row, activation)

    def widths(self) -> list[int]:
        """Neurons of every network, before any is replaced."""
        return [self.read(index).width for index in range(len(self.layers))]

    def adopt(
        self,
        widths: Sequence[int],
        *,
        output_bias: bool = False,
        experts: str = "",
        exact: bool = True,
    ) -> list[LayerConfig]:
        """Make the model a converted one, whose networks are still the dense ones.

        Args:
            widths: Neurons that each layer will have.
            output_bias: Whether the layers have an output bias where the networks have none.
            experts: What stands before the name of the networks' kind of experts.
            exact: Whether a layer with all of its network's weights is that network.

        Returns:
            The layers that are to replace the networks, as data.
        """
        specs = []
        for index, width in enumerate(widths):
            ffn = self.read(index)
            specs.append(
                LayerConfig(
                    num_experts=0,
                    shared_width=width,
                    output_bias=output_bias or ffn.down_bias_D is not None,
                    experts=experts + ("gated" if self.row.gated else "plain"),
                    activation=ffn.activation,
                    bias=ffn.up_bias_F is not None,
                )
            )
        moesaic = {
            "layers": [to_plain(spec) for spec in specs],
            "losses": {},
            "dense_width": self.read(0).width,
            "exact": exact,
        }
        adopt(self.model, moesaic)
        return specs

    def fresh(self, index: int, spec: LayerConfig) -> MoELayer:
        """A layer to fill, in the dtype of the network that it replaces."""
        moe = MoELayer(self.model.config.hidden_size, spec)
        return moe.to(self.read(index).up_FD.dtype)

    def put(self, index: int, moe: MoELayer) -> None:
        """Replace a network by a layer that is filled."""
        device = self.read(index).up_FD.device
        put_layer(self.layers[index], self.row, moe.to(device).eval())
