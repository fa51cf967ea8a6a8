"""From an active fraction to a threshold: measured once, on the model as it runs here.

Moving the threshold after training is ours; see `nn/operating_point.py`. The curve is read off
tokens of built-in text, so on other text a fraction is met approximately; every answer says what
it really used.

Shapes: T tokens, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from moesaic._errors import InputError
from moesaic.data import BUILTINS
from moesaic.inference.activity import ActiveShare
from moesaic.inference.batching import Stepper

# A threshold is placed between two measured ones that are at most this far apart.
_GAP = 0.04
_MOST = 24
_TOKENS = 192
_CHARACTERS = 1_500
_LAST = 0.999


class OperatingCurve:
    """The active fraction at each of some thresholds.

    Args:
        threshold_N: Rising.
        active_N: Fractions at these.
    """

    def __init__(self, threshold_N: Sequence[float], active_N: Sequence[float]) -> None:
        self._threshold_N = np.asarray(threshold_N)
        # Fewer gates are open at a higher threshold, but for what later layers make of that.
        self._active_N = np.minimum.accumulate(np.asarray(active_N))

    @property
    def least(self) -> float:
        """The smallest fraction that was seen."""
        return float(self._active_N[-1])

    def threshold(self, active: float) -> float:
        """The threshold at which a fraction is active.

        Raises:
            InputError: If no threshold is that cheap, or the fraction exceeds 1.
        """
        if not self.least <= active <= 1.0:
            raise InputError(
                f"active must be in [{self.least:.3f}, 1] for this model, got {active}; its gates "
                "reach no other fraction"
            )
        return float(np.interp(-active, -self._active_N, self._threshold_N))


def measure_curve(
    decoder: Stepper, share: ActiveShare, ids: Sequence[int], *, most: int = _MOST
) -> OperatingCurve:
    """Measure how much is active at which threshold, finest where it changes most.

    Args:
        decoder: Of a model whose routers are all sigmoid gates; the first slot is used.
        share: Of that model.
        ids: Text to read.
        most: Thresholds to try at most.
    """
    ids_T = torch.tensor(list(ids), dtype=torch.int64)
    position_T = torch.arange(len(ids_T))
    used_LTE = torch.empty((decoder.num_layers, len(ids_T), decoder.num_experts), dtype=torch.uint8)

    def at(threshold: float) -> float:
        threshold_T = torch.full((len(ids_T),), threshold, dtype=torch.float64)
        slot_T = torch.zeros_like(ids_T)
        options = {"threshold_T": threshold_T, "used_LTE": used_LTE}
        decoder.step(ids_T, slot_T, position_T, [], **options)
        return float(share.of(used_LTE).mean())

    points = [(threshold, at(threshold)) for threshold in (0.0, _LAST)]
    while len(points) < most:
        gaps = [left[1] - right[1] for left, right in pairwise(points)]
        widest = int(np.argmax(gaps))
        if gaps[widest] <= _GAP:
            break
        middle = (points[widest][0] + points[widest + 1][0]) / 2
        points.insert(widest + 1, (middle, at(middle)))
    return OperatingCurve(*zip(*points, strict=True))


def measuring_text(tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Tokens of built-in text to measure on.

    Args:
        tokenizer: Of the model.
        length: Tokens at most.
    """
    entries = [entry for name in ("docs", "prose") for entry in islice(BUILTINS[name].read(), 3)]
    text = "\n\n".join(entry.text[: _CHARACTERS // len(entries)] for entry in entries)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids[: min(length, _TOKENS)]
