"""A partition as the setting of a conversion: its own settings, and what it must measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic._config import build_config
from moesaic.conversion.partition._table import PARTITIONS

_NEEDS = "needs:"


def partition_settings(name: str, options: Mapping[str, Any]) -> Any:
    """Build the settings of a registered partition, checked.

    Raises:
        InputError: If the name or an option is unknown, or a value is wrong.
    """
    return build_config(PARTITIONS.load_config(name), options, where=f"partition {name}")


def partition_collectors(name: str) -> set[str]:
    """Names of the calibration collectors that a registered partition needs."""
    needs = {
        ability.removeprefix(_NEEDS)
        for ability in PARTITIONS[name].abilities
        if ability.startswith(_NEEDS)
    }
    # These are in the model.
    return needs - {"weights"}
