"""Training health as a callback of the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from moesaic.training.health.config import HealthConfig
from moesaic.training.health.history import NAME
from moesaic.training.health.monitor import HealthMonitor


class TrainingHealth(TrainerCallback):
    """Watches the experts of whatever mixture a Trainer trains.

    `trainer.add_callback(TrainingHealth(trainer))`. The history is `health.jsonl` in the output
    directory, from which `moesaic report health` draws its page; a resumed run goes on with it.
    Where the Trainer logs, the numbers go to its reporters under `experts/`.

    Args:
        trainer: The Trainer, whose `log` reaches its reporters.
        config: Settings.
    """

    def __init__(self, trainer: Trainer, config: HealthConfig | None = None) -> None:
        self.trainer = trainer
        self.config = config or HealthConfig()
        self._monitor: HealthMonitor | None = None
        self._scalars: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the hooks in and take up the history of a run that goes on."""
        self.close()
        self._monitor = HealthMonitor(
            kwargs["model"],
            Path(str(args.output_dir)) / NAME,
            self.config,
            step=state.global_step,
            writes=state.is_world_process_zero,
        )
        self._monitor.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the step; its forward passes are all that gradients were accumulated over."""
        assert self._monitor is not None
        self._scalars = self._monitor.end_step(state.global_step) or self._scalars
        # Logging tells the Trainer that it has logged, and its own numbers are still to come.
        if control.should_log and self._scalars:
            self.trainer.log(dict(self._scalars))
            self._scalars = {}
            control.should_log = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write all that the checkpoint has seen."""
        assert self._monitor is not None
        self._scalars = self._monitor.flush() or self._scalars

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the rest and take the hooks out."""
        assert self._monitor is not None
        self._monitor.flush()
        self.close()

    def close(self) -> None:
        """Take the hooks out, as after a training that failed."""
        if self._monitor is not None:
            self._monitor.stop()
            self._monitor = None
