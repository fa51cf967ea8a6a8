"""Settings of training health: how much is written, and from where on it warns."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic._errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """Settings of training health.

    Attributes:
        every: Optimiser steps that a line of the history sums up; 1 for short runs. A line takes
            about five bytes for each expert of each layer.
        window: Steps that a warning is judged over; none comes before as many were seen.
        min_tokens: Tokens that the mean expert must have had in the window for a warning about
            loads; with fewer, chance alone leaves experts out.
        max_load: Warn where the busiest expert has more than this many times the mean load.
        dead_share: An expert is dead if in the window it had less than this part of the mean load.
        min_entropy: Warn where the entropy of the router is less than this part of its largest,
            the logarithm of the number of experts.
        max_saturation: Warn where more than this part of the gates is above 0.99.
        log_layers: Give the reporters the numbers of every layer, and not the worst alone.
    """

    every: int = 1
    window: int = 50
    min_tokens: int = 100
    max_load: float = 4.0
    dead_share: float = 0.01
    min_entropy: float = 0.05
    max_saturation: float = 0.9
    log_layers: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "window", "min_tokens"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} must be at least 1, got {value}; raise it")
        if self.window < self.every:
            raise InputError(
                f"window must be at least every={self.every}, got {self.window}; raise it"
            )
        if not self.max_load > 1.0:
            raise InputError(f"max_load must be above 1, got {self.max_load}; 1 is even load")
        for name in ("dead_share", "min_entropy", "max_saturation"):
            if not 0.0 <= (part := getattr(self, name)) <= 1.0:
                raise InputError(f"{name} must be in [0, 1], got {part}; it is a part")
