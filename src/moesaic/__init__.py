"""moesaic: turn a dense language model into a mosaic of experts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesaic import _autoload

if TYPE_CHECKING:
    from moesaic.models.checkpoint import load, load_dense, save
    from moesaic.nn.layer import LayerConfig, MoELayer, all_experts_on, record_routing
    from moesaic.nn.routing import Routing

    __version__: str

# Imported on first use, so that `import moesaic` needs neither torch nor transformers.
_HOMES = {
    "LayerConfig": "moesaic.nn.layer",
    "MoELayer": "moesaic.nn.layer",
    "Routing": "moesaic.nn.routing",
    "all_experts_on": "moesaic.nn.layer",
    "load": "moesaic.models.checkpoint",
    "load_dense": "moesaic.models.checkpoint",
    "record_routing": "moesaic.nn.layer",
    "save": "moesaic.models.checkpoint",
}

__all__ = [
    "LayerConfig",
    "MoELayer",
    "Routing",
    "__version__",
    "all_experts_on",
    "load",
    "load_dense",
    "record_routing",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use."""
    if name == "__version__":
        from importlib.metadata import version

        return version("moesaic")
    if name not in _HOMES:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


_autoload.install()
