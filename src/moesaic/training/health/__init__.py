"""Whether the experts of a model in training are well: loads, dead experts, routers that are stuck.

It reads any mixture of experts of transformers, and our own layers, through hooks on their routers.
"""

from moesaic.training.health.callback import TrainingHealth
from moesaic.training.health.config import HealthConfig
from moesaic.training.health.monitor import HealthMonitor

__all__ = ["HealthConfig", "HealthMonitor", "TrainingHealth"]
