"""The dense parent itself, which leaves nothing out.

Ours. Trained as the methods of a comparison are, it says what that training gives by itself:
next to nothing against the parent as teacher, and on the text alone a model that has seen more of
such text. What a trained method gains beyond that is its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """Settings of the dense parent.

    Attributes:
        active: Fraction of its weights that a token uses: 1.
    """

    active: float = 1.0

    def __post_init__(self) -> None:
        if self.active != 1.0:
            raise InputError(
                f"active must be 1, since the dense parent uses all of its weights, got "
                f"{self.active}; give it budgets: [1.0]"
            )

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that it needs: none."""
        return ()


def keep_dense(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: Dense,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Leave a dense model as it is.

    Args:
        model: A dense model.
        stats: Not used.
        config: Settings.
        store: Not used: there is nothing to go on with.
        progress: Not told: nothing takes time.

    Returns:
        The same model, and nothing to tell of it.
    """
    return model, {}
