"""Measuring models beside their dense parent: quality, cost, speed, and what they write."""

from moesaic.evaluation.activity import Activation
from moesaic.evaluation.bounds import block_bound, neuron_bound
from moesaic.evaluation.cost import Cost, model_cost
from moesaic.evaluation.curve import threshold_at, threshold_curve
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
