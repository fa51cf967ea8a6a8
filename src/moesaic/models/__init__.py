"""The bridge to transformers: find networks, swap them, load and save."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.models.auto import register
    from moesaic.models.byte_level import byte_tokenizer
    from moesaic.models.checkpoint import (
        add_step,
        load,
        load_dense,
        load_tokenizer,
        new_manifest,
        save,
    )
    from moesaic.models.mixture import MixtureConfig, build_mixture, fresh_mixture
    from moesaic.models.modeling import adopt

# Imported on first use: configs are registered while transformers is still being imported, and
# must not pull in modelling files then.
_HOMES = {
    "MixtureConfig": "moesaic.models.mixture",
    "add_step": "moesaic.models.checkpoint",
    "adopt": "moesaic.models.modeling",
    "build_mixture": "moesaic.models.mixture",
    "byte_tokenizer": "moesaic.models.byte_level",
    "fresh_mixture": "moesaic.models.mixture",
    "load": "moesaic.models.checkpoint",
    "load_dense": "moesaic.models.checkpoint",
    "load_tokenizer": "moesaic.models.checkpoint",
    "new_manifest": "moesaic.models.checkpoint",
    "register": "moesaic.models.auto",
    "save": "moesaic.models.checkpoint",
}

__all__ = [
    "MixtureConfig",
    "add_step",
    "adopt",
    "build_mixture",
    "byte_tokenizer",
    "fresh_mixture",
    "load",
    "load_dense",
    "load_tokenizer",
    "new_manifest",
    "register",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
