"""Recovering quality: self-distillation inside the HF Trainer, at a requested compute budget."""

from moesaic.training.config import TrainConfig
from moesaic.training.end_step import EndStep
from moesaic.training.health import HealthConfig, HealthMonitor, TrainingHealth
from moesaic.training.run import train

__all__ = ["EndStep", "HealthConfig", "HealthMonitor", "TrainConfig", "TrainingHealth", "train"]
