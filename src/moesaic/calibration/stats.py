"""What one pass over text measured: one safetensors file a layer, read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moesaic._errors import CheckpointError, InputError
from moesaic._files import read_json

MANIFEST = "calibration.json"


@dataclass(frozen=True, slots=True)
class CalibrationStats:
    """Statistics of every layer.

    Attributes:
        directory: Where they are.
        num_layers: L.
        num_tokens: Tokens that every layer saw.
        collectors: Names of what was collected.
        text: Provenance of the text.
        sensitivity: Of every layer, if it was collected; see `layer_sensitivity`.
    """

    directory: Path
    num_layers: int
    num_tokens: int
    collectors: tuple[str, ...]
    text: dict[str, Any]
    sensitivity: tuple[float, ...] = ()

    def layer(self, index: int) -> dict[str, Tensor]:
        """Read the statistics of one layer, `collector.tensor` to tensor."""
        path = layer_file(self.directory, index)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); delete {self.directory} and calibrate again"
            ) from error

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
    """Name of a layer's file."""
    return directory / f"layer_{index:03d}.safetensors"


def open_stats(directory: Path) -> CalibrationStats:
    """Open statistics that `calibrate` finished.

    Raises:
        CheckpointError: If the directory holds none, not all layers, or a damaged record.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so {directory} holds no finished calibration")
    record = read_json(path)
    try:
        stats = CalibrationStats(
            directory=directory,
            num_layers=int(record["num_layers"]),
            num_tokens=int(record["num_tokens"]),
            collectors=tuple(record["collectors"]),
            text=record["text"],
            sensitivity=tuple(record["sensitivity"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} was edited or is of another version ({error!r}); delete {directory} and "
            "calibrate again"
        ) from error
    for index in range(stats.num_layers):
        if not layer_file(directory, index).is_file():
            raise CheckpointError(
                f"{layer_file(directory, index)} is missing; delete {directory} and calibrate again"
            )
    return stats
