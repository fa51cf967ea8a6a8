"""Whether a format can hold a model, before anything expensive; and which others can."""

from __future__ import annotations

from typing import Any

from moesaic._errors import InputError
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.export._base import Format, FormatConfig
from moesaic.models.export._table import FORMATS


def make_format(name: str, config: FormatConfig) -> Format:
    """Make a registered format with its settings."""
    made: Format = FORMATS.load(name)(config)
    return made


def check_model(made: Format, config: Any) -> None:
    """Refuse a model that a format cannot hold.

    Args:
        made: The format.
        config: Of the converted model.

    Raises:
        InputError: Naming the property that stands in the way and the formats that can hold it, or
            the package that is missing.
    """
    if config.model_type in ARCHITECTURES:
        raise InputError("the model is dense, so its own tools export it; convert it first")
    if found := made.obstacle(config):
        others = [
            other
            for other in FORMATS
            if other != made.name and not make_format(other, FormatConfig()).obstacle(config)
        ]
        raise InputError(f"{made.name} cannot hold {found}; {' and '.join(others)} can")
    if package := made.missing():
        raise InputError(
            f"{made.name} needs {package}, which is not installed; pip install 'moesaic[{package}]'"
        )
