"""The end of an optimiser step, told to the layers of a model that the HF Trainer trains."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.nn.layer import end_step, forget_step


class EndStep(TrainerCallback):
    """Tells routers and experts of every optimiser step, of skipped ones and of checkpoints.

    A Trainer of one's own needs it where a router has a bias that moves (`cmoe`, and
    `sigmoid-top-k` with a `bias_step`) or a schedule (`progressive-top-k`, `growing-top-k`,
    `dense-to-sparse`), and where experts learn from the gradients of the step before (`subspace`).
    """

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell them; a step that mixed precision skipped is forgotten."""
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            forget_step(kwargs["model"])
        else:
            end_step(kwargs["model"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on as a run that is resumed from this checkpoint would."""
        forget_step(kwargs["model"])
