"""The passes of a training step, for parts that act when the step ends."""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger(__name__)
# Passes that nobody accumulates into one step; who never ends a step hears of it once.
_MANY_PASSES = 1000


class PassCount:
    """Counts passes whose step has not ended, and says where it seems that none ever does.

    Args:
        waiting: What of them waits, such as "loads".
        why: What for, such as "to move a router's bias".
    """

    def __init__(self, waiting: str, why: str) -> None:
        self.waiting = waiting
        self.why = why
        self._passes = 0

    def add(self) -> None:
        """Count a pass."""
        self._passes += 1
        if self._passes == _MANY_PASSES:
            _LOGGER.warning(
                "the %s of %d passes wait %s; call moesaic.nn.layer.end_step(model) after "
                "optimizer.step()",
                self.waiting,
                _MANY_PASSES,
                self.why,
            )

    def reset(self) -> None:
        """Begin a step."""
        self._passes = 0
