"""A partition as the setting of a conversion: its own settings, and what it must measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic._config import build_config
from moesaic.conversion.partition._base import require_package
from moesaic.conversion.partition._table import PARTITIONS


def partition_settings(name: str, options: Mapping[str, Any]) -> Any:
    """Build the settings of a registered partition, checked.

    Raises:
        InputError: If the name or an option is unknown, or a value is wrong.
    """
    return build_config(PARTITIONS.load_config(name), options, where=f"partition {name}")


def partition_collectors(name: str) -> set[str]:
    """Name the calibration collectors that a registered partition needs.

    Raises:
        InputError: If it needs a package that is not installed; better now than after calibration.
    """
    abilities = [ability.partition(":")[::2] for ability in PARTITIONS[name].abilities]
    for kind, package in abilities:
        if kind == "package":
            require_package(name, package)
    # Weights are in the model.
    return {what for kind, what in abilities if kind == "needs" and what != "weights"}
