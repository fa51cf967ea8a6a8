"""Every conversion at settings that fit the tiny model, its statistics, and interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from calibration_cases import LLAMA, Killed, make_text
from model_cases import Case, dense_model

from moesaic.calibration import CalibrationConfig, CalibrationStats, calibrate
from moesaic.conversion._table import CONVERSIONS

TOKENS = CalibrationConfig(tokens=96, batch_blocks=2)

# Right for most methods, where they have the setting; a new line of the table is tested with these.
_COMMON: dict[str, Any] = {"experts": 4, "active": 0.5}
_OWN: dict[str, dict[str, Any]] = {
    "dsmoe": {"fit_steps": 3},
    "sparse-upcycling": {"copies": 3},
}


def settings_of(name: str, **options: Any) -> Any:
    """Settings of a conversion that are quick on the tiny model."""
    config = CONVERSIONS.load_config(name)
    fields = {field.name for field in dataclasses.fields(config)}
    common = {key: value for key, value in _COMMON.items() if key in fields}
    return config(**{**common, **_OWN.get(name, {}), **options})


def stats_for(config: Any, directory: Any, case: Case = LLAMA) -> CalibrationStats | None:
    """What the settings need to know of the tiny model."""
    if not config.collectors():
        return None
    return calibrate(dense_model(case), make_text(), config.collectors(), TOKENS, directory)


class CutAfter:
    """Progress that ends a conversion after some layers, whatever else it is told of."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[_Stage]:
        yield _Stage(self.num_layers if name == "convert" else math.inf)


class _Stage:
    def __init__(self, left: float) -> None:
        self.left = left

    def advance(self, n: float = 1.0) -> None:
        self.left -= n
        if self.left <= 0:
            raise Killed
