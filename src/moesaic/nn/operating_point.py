"""The operating point of a converted model: the threshold of its gates, moved after training.

Source of the threshold: DSMoE, arXiv 2502.12455, section 3.2; moving it after training is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moesaic._errors import InputError
from moesaic.nn.layer import moe_layers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold


def threshold_routers(model: nn.Module) -> list[SigmoidThreshold]:
    """The routers of a model whose operating point can be moved."""
    return [
        layer.router for layer in moe_layers(model) if isinstance(layer.router, SigmoidThreshold)
    ]


@contextmanager
def threshold_at(model: nn.Module, threshold: float) -> Iterator[None]:
    """Set the threshold of every sigmoid gate while it lasts; each gets its own back.

    Raises:
        InputError: If the threshold is out of range, or no router has one.
    """
    check_threshold(threshold)
    routers = threshold_routers(model)
    if not routers:
        raise InputError(
            "no router of this model is a sigmoid-threshold, so it has no threshold to move; "
            "convert with that router"
        )
    before = [router.threshold for router in routers]
    try:
        for router in routers:
            router.threshold = threshold
        yield
    finally:
        for router, value in zip(routers, before, strict=True):
            router.threshold = value


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that no sigmoid can be on both sides of."""
    if not 0.0 <= threshold < 1.0:
        raise InputError(f"threshold must be in [0, 1), got {threshold}; 0.5 is the paper's")
