"""moesaic: turn a dense language model into a mosaic of experts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moesaic import _autoload

if TYPE_CHECKING:
    from moesaic.calibration import CalibrationConfig, calibrate
    from moesaic.compression.pruning.flap import FLAP
    from moesaic.conversion.api import convert
    from moesaic.conversion.dsmoe import DSMoE
    from moesaic.conversion.llama_moe import LLaMAMoE
    from moesaic.conversion.sparse_upcycling import SparseUpcycling
    from moesaic.data import DataConfig, prepare
    from moesaic.evaluation import EvaluationConfig, evaluate
    from moesaic.models.checkpoint import load, load_dense, save
    from moesaic.models.mixture import MixtureConfig, build_mixture
    from moesaic.nn.layer import LayerConfig, MoELayer, all_experts_on, record_routing
    from moesaic.nn.routing import Routing
    from moesaic.recipes.exporting import ExportConfig, export
    from moesaic.recipes.suggestion import suggest
    from moesaic.training import TrainConfig, train

    __version__: str

# Imported on first use, so that `import moesaic` needs neither torch nor transformers.
_HOMES = {
    "CalibrationConfig": "moesaic.calibration",
    "DSMoE": "moesaic.conversion.dsmoe",
    "DataConfig": "moesaic.data",
    "EvaluationConfig": "moesaic.evaluation",
    "ExportConfig": "moesaic.recipes.exporting",
    "FLAP": "moesaic.compression.pruning.flap",
    "LLaMAMoE": "moesaic.conversion.llama_moe",
    "LayerConfig": "moesaic.nn.layer",
    "MixtureConfig": "moesaic.models.mixture",
    "MoELayer": "moesaic.nn.layer",
    "Routing": "moesaic.nn.routing",
    "SparseUpcycling": "moesaic.conversion.sparse_upcycling",
    "TrainConfig": "moesaic.training",
    "all_experts_on": "moesaic.nn.layer",
    "build_mixture": "moesaic.models.mixture",
    "calibrate": "moesaic.calibration",
    "convert": "moesaic.conversion.api",
    "evaluate": "moesaic.evaluation",
    "export": "moesaic.recipes.exporting",
    "load": "moesaic.models.checkpoint",
    "load_dense": "moesaic.models.checkpoint",
    "prepare": "moesaic.data",
    "record_routing": "moesaic.nn.layer",
    "save": "moesaic.models.checkpoint",
    "suggest": "moesaic.recipes.suggestion",
    "train": "moesaic.training",
}

__all__ = [
    "FLAP",
    "CalibrationConfig",
    "DSMoE",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "LLaMAMoE",
    "LayerConfig",
    "MixtureConfig",
    "MoELayer",
    "Routing",
    "SparseUpcycling",
    "TrainConfig",
    "__version__",
    "all_experts_on",
    "build_mixture",
    "calibrate",
    "convert",
    "evaluate",
    "export",
    "load",
    "load_dense",
    "prepare",
    "record_routing",
    "save",
    "suggest",
    "train",
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
