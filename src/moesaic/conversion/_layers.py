"""What every conversion does: check, convert layer by layer, go on after an interruption.

Shapes: F neurons of the dense network, N neurons of the layer it becomes, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.conversion.partition._base import COLLECTORS, PartitionInput
from moesaic.conversion.partition._table import PARTITIONS
from moesaic.models.architectures import dense_architecture
from moesaic.models.ffn import FFN, decoder_layers, fill_experts, put_layer, read_ffn
from moesaic.models.modeling import adopt
from moesaic.nn.layer import LayerConfig, MoELayer


@dataclass(slots=True, kw_only=True)
class Cut:
    """One layer on its way from a dense network to a mixture.

    Attributes:
        index: Of the layer, from 0.
        ffn: The dense network.
        moe: What takes its place, with fresh weights until `fill`.
        measured: What calibration measured of the layer, `collector.tensor` to tensor.
        order_N: What `fill` was given.
    """

    index: int
    ffn: FFN
    moe: MoELayer
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    order_N: Tensor | None = None

    @classmethod
    def begin(cls, index: int, ffn: FFN, spec: LayerConfig) -> Cut:
        """Make the layer that a network is cut into."""
        # What is drawn here is overwritten; the caller's random numbers must not move.
        with torch.random.fork_rng(devices=[]):
            moe = MoELayer(ffn.up_FD.shape[1], spec).to(ffn.up_FD.dtype)
        return cls(index=index, ffn=ffn, moe=moe)

    def fill(self, order_N: Tensor) -> None:
        """Write neurons into the layer: the shared ones first, then expert by expert.

        Args:
            order_N: Which neuron of the network each neuron of the layer is, [N]. One may stand in
                several experts, or in none.
        """
        self.order_N = order_N
        fill_experts(self.moe, self.ffn.keep(order_N))

    def fresh_router(self, seed: int) -> None:
        """Draw the router's first weights, from the seed and the layer's index alone."""
        assert self.moe.router is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + self.index)
            self.moe.router.reset_parameters()

    @property
    def exact(self) -> bool:
        """Whether every neuron has one place, so that all experts together are the network."""
        assert self.order_N is not None
        return torch.equal(
            self.order_N.sort().values.cpu(), torch.arange(self.ffn.width, dtype=torch.int64)
        )

    def partition(
        self, name: str, options: Any, num_experts: int, seed: int, *, num_shared: int = 0
    ) -> Tensor:
        """Order the network's neurons by a registered partition, [F].

        Args:
            name: Of the partition.
            options: Its settings.
            num_experts: Blocks to cut, the shared ones included.
            seed: Of its random choices.
            num_shared: Blocks at the front that are always on.
        """
        stats = {
            statistic: self.measured[f"{collector}.{statistic}"]
            for statistic, collector in COLLECTORS.items()
            if f"{collector}.{statistic}" in self.measured
        }
        source = PartitionInput(
            num_experts=num_experts,
            num_neurons=self.ffn.width,
            up_FD=self.ffn.up_FD,
            gate_FD=self.ffn.gate_FD,
            down_DF=self.ffn.down_DF,
            neurons=lambda h_TD: self.ffn.neurons(h_TD.to(self.ffn.up_FD)).cpu().float(),
            stats=stats,
            seed=seed,
            num_shared=num_shared,
        )
        order_F: Tensor = PARTITIONS.load(name)(source, options)
        return order_F


def expert_layer(ffn: FFN, *, prefix: str = "", **values: Any) -> LayerConfig:
    """Describe a layer whose experts are of the network's kind.

    Args:
        ffn: The dense network.
        prefix: Of the kind's name, such as "thresholded-".
        **values: Fields of `LayerConfig` that the method chooses.
    """
    values.setdefault("output_bias", ffn.down_bias_D is not None)
    return LayerConfig(
        experts=prefix + ("plain" if ffn.gate_FD is None else "gated"),
        activation=ffn.activation,
        bias=ffn.up_bias_F is not None,
        **values,
    )


@torch.no_grad()
def convert_layers(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    *,
    method: str,
    collectors: tuple[str, ...],
    describe: Callable[[FFN], LayerConfig],
    convert: Callable[[Cut], Mapping[str, Tensor]],
    plan: Callable[[list[FFN]], list[LayerConfig]] | None = None,
    losses: Mapping[str, Any] | None = None,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> list[Mapping[str, Tensor]]:
    """Convert every layer of a dense model, which is consumed, so that no second copy exists.

    Args:
        model: A dense model of a known architecture.
        stats: Its calibration; none if no collector is needed.
        method: Name of the conversion, for messages.
        collectors: What it needs to know of the model.
        describe: Gives the layer that a network becomes, or raises what does not fit.
        convert: Fills the layer and starts its router; what it gives is kept with the layer.
        plan: Decides on all layers together, once `describe` took each and the statistics fit; they
            are what `describe` gave if none.
        losses: Losses of the converted model, as in its config.
        store: Directory for finished layers; an interrupted conversion goes on after them.
        progress: Told of every layer.

    Returns:
        What `convert` gave for every layer, or what an interrupted run left of it.

    Raises:
        InputError: Before the model is touched, if the method does not fit it or the statistics.
    """
    row = dense_architecture(model.config.model_type)
    layers = decoder_layers(model)
    activation = getattr(model.config, row.activation)
    dim = model.config.hidden_size
    specs = [describe(read_ffn(layer, row, activation)) for layer in layers]
    if collectors:
        if stats is None:
            raise InputError(
                f"{method} with these settings needs calibration of {', '.join(collectors)}"
            )
        stats.require(*collectors, by=method, num_layers=len(layers))
        _check_sizes(stats, {"F": read_ffn(layers[0], row, activation).width, "D": dim})

    if plan is not None:
        specs = plan([read_ffn(layer, row, activation) for layer in layers])

    adopt(
        model,
        {
            "layers": [to_plain(spec) for spec in specs],
            "losses": dict(losses or {}),
            "dense_width": read_ffn(layers[0], row, activation).width,
        },
    )
    kept: list[Mapping[str, Tensor]] = []
    exact = True
    with progress.stage("convert", len(layers), "layers") as stage:
        for index, (layer, spec) in enumerate(zip(layers, specs, strict=True)):
            ffn = read_ffn(layer, row, activation)
            cut = Cut.begin(index, ffn, spec)
            file = None if store is None else store / f"layer_{index:03d}.safetensors"
            if file is not None and file.is_file():
                kept.append(_take_up(cut, load_file(file)))
            else:
                if stats is not None and collectors:
                    cut.measured = stats.layer(index)
                kept.append(convert(cut))
                if file is not None:
                    _keep(cut, kept[-1], file)
            exact = exact and cut.exact
            put_layer(layer, row, cut.moe.to(ffn.up_FD.device).eval())
            stage.advance()
    # Tells training whether the model holds its own teacher.
    model.config.moesaic["exact"] = exact
    model.eval()
    return kept


def _check_sizes(stats: CalibrationStats, sizes: Mapping[str, int]) -> None:
    """Refuse statistics of a network of another size; names end in the letters of their axes."""
    for key, value in stats.layer(0).items():
        for letter, size in zip(key.rpartition("_")[2], value.shape, strict=False):
            if sizes.get(letter, size) != size:
                raise InputError(
                    f"{key} of {stats.directory} has {size} values on axis {letter}, the model "
                    f"has {sizes[letter]}; calibrate this model"
                )


def _keep(cut: Cut, kept: Mapping[str, Tensor], file: Path) -> None:
    """Write what a layer is beyond the weights of its network."""
    assert cut.order_N is not None
    tensors = {"order_N": cut.order_N}
    tensors |= {f"state.{name}": value for name, value in _own_state(cut.moe).items()}
    tensors |= {f"kept.{name}": value for name, value in kept.items()}
    with atomic_write(file) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)


def _take_up(cut: Cut, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Make a layer what an interrupted run left of it."""
    cut.fill(tensors["order_N"])
    for name, value in _own_state(cut.moe).items():
        value.copy_(tensors[f"state.{name}"])
    return {
        name.removeprefix("kept."): value
        for name, value in tensors.items()
        if name.startswith("kept.")
    }


def _own_state(moe: MoELayer) -> dict[str, Tensor]:
    """State of a layer that `fill` does not write: all but the weights of the network."""
    filled = {
        tensor.data_ptr()
        for part in (moe.experts, moe.shared)
        if part is not None
        for tensor in (part.weights().up, part.weights().down, part.weights().up_bias)
        if tensor is not None
    }
    return {
        name: value for name, value in moe.state_dict().items() if value.data_ptr() not in filled
    }
