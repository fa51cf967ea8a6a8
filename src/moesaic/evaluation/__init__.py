"""Measuring models beside their dense parent: quality, cost, speed, and what they write."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.evaluation.activity import Activation
    from moesaic.evaluation.bounds.block_bound import block_bound
    from moesaic.evaluation.bounds.neuron_bound import neuron_bound
    from moesaic.evaluation.cost import Cost, model_cost
    from moesaic.evaluation.curve import threshold_curve
    from moesaic.evaluation.intervals import DomainQuality, Estimate, perplexity_ratio
    from moesaic.evaluation.machine import fastest_dtype, machine_info
    from moesaic.evaluation.perplexity import (
        QualityConfig,
        QualityResult,
        choose_blocks,
        evaluate_perplexity,
    )
    from moesaic.evaluation.questions import QuestionsConfig, build_tasks
    from moesaic.evaluation.record import EvaluationConfig, Subject, evaluate
    from moesaic.evaluation.speed import SpeedConfig, SpeedResult, measure_speed
    from moesaic.evaluation.tasks import TaskAccuracy, TasksConfig, check_tasks, evaluate_tasks
    from moesaic.nn.operating_point import threshold_at

# Imported on first use, so that the table of bounds is listed without torch.
_HOMES = {
    "Activation": "activity",
    "Cost": "cost",
    "DomainQuality": "intervals",
    "Estimate": "intervals",
    "EvaluationConfig": "record",
    "QualityConfig": "perplexity",
    "QualityResult": "perplexity",
    "QuestionsConfig": "questions",
    "SpeedConfig": "speed",
    "SpeedResult": "speed",
    "Subject": "record",
    "TaskAccuracy": "tasks",
    "TasksConfig": "tasks",
    "block_bound": "bounds.block_bound",
    "build_tasks": "questions",
    "check_tasks": "tasks",
    "choose_blocks": "perplexity",
    "evaluate": "record",
    "evaluate_perplexity": "perplexity",
    "evaluate_tasks": "tasks",
    "fastest_dtype": "machine",
    "machine_info": "machine",
    "measure_speed": "speed",
    "model_cost": "cost",
    "neuron_bound": "bounds.neuron_bound",
    "perplexity_ratio": "intervals",
    "threshold_at": "curve",
    "threshold_curve": "curve",
}

__all__ = [
    "Activation",
    "Cost",
    "DomainQuality",
    "Estimate",
    "EvaluationConfig",
    "QualityConfig",
    "QualityResult",
    "QuestionsConfig",
    "SpeedConfig",
    "SpeedResult",
    "Subject",
    "TaskAccuracy",
    "TasksConfig",
    "block_bound",
    "build_tasks",
    "check_tasks",
    "choose_blocks",
    "evaluate",
    "evaluate_perplexity",
    "evaluate_tasks",
    "fastest_dtype",
    "machine_info",
    "measure_speed",
    "model_cost",
    "neuron_bound",
    "perplexity_ratio",
    "threshold_at",
    "threshold_curve",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moesaic.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
