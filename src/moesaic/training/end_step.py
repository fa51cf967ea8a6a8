"""The end of an optimiser step, told to the routers of a model that the HF Trainer trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.nn.layer import end_step


class EndStep(TrainerCallback):
    """Tells routers of every optimiser step: they move their bias or follow their schedule.

    A Trainer of one's own needs it where a router has a bias that moves (`cmoe`, and
    `sigmoid-top-k` with a `bias_step`) or a schedule (`progressive-top-k`, `growing-top-k`,
    `dense-to-sparse`).
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the routers."""
        end_step(kwargs["model"])
