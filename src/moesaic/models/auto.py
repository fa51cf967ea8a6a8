"""Converted models among transformers' auto classes, without importing a modelling file.

Registering must cost nothing and must be possible while transformers itself is being imported, when
no class of an architecture can be: so a stand-in is registered for each config class, and becomes
the real one, with its model class, when the first config of that architecture is read.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedConfig

from moesaic.models.architectures import ARCHITECTURES, Architecture


@functools.cache
def register() -> None:
    """Let transformers' auto classes load converted models."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for row in ARCHITECTURES.values():
        AutoConfig.register(row.moesaic_type, _stand_in(row), exist_ok=True)


def _stand_in(row: Architecture) -> type[PreTrainedConfig]:
    """Make a config class whose instances are those of the real one."""

    def new(cls: type, *args: Any, **values: Any) -> Any:
        from moesaic.models.modeling import register_classes

        config_class, _ = register_classes(row)
        return config_class(*args, **values)

    return type(
        f"Moesaic{row.name}Config",
        (PreTrainedConfig,),
        {"__module__": __name__, "__new__": new, "model_type": row.moesaic_type},
    )
