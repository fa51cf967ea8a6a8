"""Collectors that look at the whole model at once, where a walk shows one layer after another.

Each says which text it reads, beside the memory it holds. Methods name them like the others.

Shapes: N blocks of S tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from moesaic._progress import Progress
from moesaic.calibration.gradients import Gradients
from moesaic.calibration.sensitivity import layer_sensitivity
from moesaic.calibration.stats import Measured
from moesaic.data.blocks import TokenBlocks


class Pass(Protocol):
    """Gathers one kind of statistics of a model."""

    def measure(
        self, text: TokenBlocks, seed: int, progress: Progress, store: Path | None = None
    ) -> Measured:
        """Read the text that the calibration drew, or some of it.

        Args:
            text: What was drawn.
            seed: Of what is drawn here.
            progress: Told of every token.
            store: File for what an unfinished pass has so far; run again, it goes on from there.
        """
        ...


class Sensitivity:
    """How much an error of each layer moves the predictions, from the first 6 blocks.

    See `moesaic.calibration.sensitivity`; it holds what a backward pass over one block does.
    """

    num_blocks = 6

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def measure(
        self, text: TokenBlocks, seed: int, progress: Progress, store: Path | None = None
    ) -> Measured:
        """`mean_L`."""
        ids_NS = torch.from_numpy(text.ids_NS[: self.num_blocks]).long()
        values_L = layer_sensitivity(self.model, ids_NS, seed=seed, store=store, progress=progress)
        return Measured({"mean_L": torch.tensor(values_L, dtype=torch.float64)})


class Tokens:
    """The text itself: 4 * N * S bytes.

    For methods that prune layer after layer, each on what the pruned layers before it give: what a
    dense model shows to its layers does not serve them, so they walk themselves.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        pass

    def measure(
        self, text: TokenBlocks, seed: int, progress: Progress, store: Path | None = None
    ) -> Measured:
        """`ids_NS`."""
        return Measured({"ids_NS": torch.from_numpy(text.ids_NS)})


PASSES: dict[str, Callable[[PreTrainedModel], Pass]] = {
    "gradients": Gradients,
    "sensitivity": Sensitivity,
    "tokens": Tokens,
}
