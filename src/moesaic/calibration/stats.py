"""What one pass over text measured: safetensors files, read when they are asked for.

A walk leaves one file a layer. What looks at the whole model leaves one file, with tensors of the
model and of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic._errors import CheckpointError, InputError
from moesaic._files import atomic_write, read_json

MANIFEST = "calibration.json"
_WHOLE = "whole"


class Measured(NamedTuple):
    """What was measured by looking at the whole model.

    Attributes:
        whole: Tensors of the model, by name.
        layers: Tensors of each layer, first to last; empty if there are none.
    """

    whole: Mapping[str, Tensor]
    layers: Sequence[Mapping[str, Tensor]] = ()


@dataclass(frozen=True, slots=True)
class CalibrationStats:
    """Statistics of every layer, and of the model.

    Attributes:
        directory: Where they are.
        num_layers: L.
        num_tokens: Tokens that every layer saw.
        collectors: Names of what was collected.
        text: Provenance of the text.
        sensitivity: Of every layer, if it was collected; see `layer_sensitivity`.
        passes: Which of the collectors looked at the whole model.
        most_tokens: How many tokens at most `layer` gives of what was kept token by token.
    """

    directory: Path
    num_layers: int
    num_tokens: int
    collectors: tuple[str, ...]
    text: dict[str, Any]
    sensitivity: tuple[float, ...] = ()
    passes: tuple[str, ...] = ()
    most_tokens: int | None = None

    def thinned(self, tokens: int) -> CalibrationStats:
        """The same statistics with at most so many tokens of what was kept token by token.

        They are evenly spaced over the text; means over tokens stay those of all.
        """
        return replace(self, most_tokens=tokens)

    def layer(self, index: int) -> dict[str, Tensor]:
        """Read the statistics of one layer, `collector.tensor` to tensor."""
        tensors = self._of_passes(f"{index:03d}")
        if set(self.collectors) - set(self.passes):
            tensors |= _read(layer_file(self.directory, index))
        if self.most_tokens is None:
            return tensors
        return {name: _thin(name, value, self.most_tokens) for name, value in tensors.items()}

    def whole(self) -> dict[str, Tensor]:
        """Read the statistics of the whole model, `collector.tensor` to tensor."""
        tensors = self._of_passes(_WHOLE)
        if self.most_tokens is None:
            return tensors
        return {name: _thin(name, value, self.most_tokens) for name, value in tensors.items()}

    def _of_passes(self, part: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in self.passes:
            tensors |= _read(pass_file(self.directory, name), prefix=f"{part}.")
        return tensors

    def require(self, *names: str, by: str, num_layers: int) -> None:
        """Refuse to work without a collector, or with the statistics of another model.

        Args:
            names: Collectors that are needed.
            by: Who needs them.
            num_layers: Layers of the model that is worked on.

        Raises:
            InputError: Naming what is missing and who needs it.
        """
        if self.num_layers != num_layers:
            raise InputError(
                f"{self.directory} was measured on {self.num_layers} layers, the model has "
                f"{num_layers}; calibrate this model"
            )
        missing = [name for name in names if name not in self.collectors]
        if missing:
            raise InputError(
                f"{by} needs the collector {missing[0]!r}, but {self.directory} has "
                f"{', '.join(self.collectors)}; calibrate again with it"
            )


def layer_file(directory: Path, index: int) -> Path:
    """Name of the file of a layer that a walk visited."""
    return directory / f"layer_{index:03d}.safetensors"


def pass_file(directory: Path, name: str) -> Path:
    """Name of the file of a collector that looks at the whole model."""
    return directory / f"{name}.safetensors"


def write_pass(directory: Path, name: str, measured: Measured) -> None:
    """Keep what a collector measured on the whole model."""
    parts = {_WHOLE: measured.whole}
    parts |= {f"{index:03d}": tensors for index, tensors in enumerate(measured.layers)}
    with atomic_write(pass_file(directory, name)) as temporary:
        save_file(
            {
                f"{part}.{name}.{key}": value.contiguous()
                for part, tensors in parts.items()
                for key, value in tensors.items()
            },
            temporary,
        )


def open_stats(directory: Path) -> CalibrationStats:
    """Open statistics that `calibrate` finished.

    Raises:
        CheckpointError: If the directory holds none, not all of them, or a damaged record.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so {directory} holds no finished calibration")
    record = read_json(path)
    try:
        num_layers = int(record["num_layers"])
        collectors, passes = tuple(record["collectors"]), tuple(record["passes"])
        num_tokens, text = int(record["num_tokens"]), record["text"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was edited or is of another version ({error!r}); delete {directory} and "
            "calibrate again"
        ) from error
    files = [pass_file(directory, name) for name in passes]
    if set(collectors) - set(passes):
        files += [layer_file(directory, index) for index in range(num_layers)]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; delete {directory} and calibrate again")
    sensitivity: tuple[float, ...] = ()
    if "sensitivity" in passes:
        tensors = _read(pass_file(directory, "sensitivity"), prefix=f"{_WHOLE}.")
        sensitivity = tuple(tensors["sensitivity.mean_L"].tolist())
    return CalibrationStats(
        directory=directory,
        num_layers=num_layers,
        num_tokens=num_tokens,
        collectors=collectors,
        text=text,
        sensitivity=sensitivity,
        passes=passes,
    )


def _thin(name: str, value: Tensor, tokens: int) -> Tensor:
    """Some tokens of a tensor whose first axes they are, as the last letters of its name say.

    Blocks of tokens stay whole; one is kept at least.
    """
    axes = name.rpartition("_")[2]
    if axes.startswith("NS"):
        tokens = max(1, tokens // value.shape[1])
    elif not axes.startswith("T"):
        return value
    if len(value) <= tokens:
        return value
    return value[torch.linspace(0, len(value) - 1, tokens).long()]


def _read(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors whose names begin with a prefix, which is left out."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {
                name.removeprefix(prefix): tensors.get_tensor(name)
                for name in tensors.keys()  # noqa: SIM118 - no mapping
                if name.startswith(prefix)
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); delete {file.parent} and calibrate again"
        ) from error
