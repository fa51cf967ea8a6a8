"""Training health in a loop of one's own; the callback for the Trainer is made of it."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from torch import distributed, nn

from moesaic._errors import InputError
from moesaic.training.health.config import HealthConfig
from moesaic.training.health.findings import dead, findings, join, load
from moesaic.training.health.history import History, layers_of
from moesaic.training.health.watch import LayerSums, Watch

_LOGGER = logging.getLogger(__name__)
# Of a measure of all layers, the number for a log.
_WORST: dict[str, Callable[[list[float]], float]] = {
    "load": max,
    "dead": sum,
    "entropy": min,
    "saturation": max,
}


class HealthMonitor:
    """Watches the experts of a model and writes their history.

    What is counted: every token that is not padding, in every forward pass of the model in training
    mode with gradients, once, whether or not layers are recomputed. Passes add up until `end_step`.
    Under data parallelism the tokens of all processes are added, and the first writes; where
    several processes route the same tokens (tensor parallelism) these count once for each.

    Args:
        model: The model that trains.
        path: File of JSON lines.
        config: Settings.
        step: Step that training goes on from; lines after it are dropped.
        writes: Whether this process writes; the first one if not said.

    Raises:
        InputError: If the model has no experts to watch, or the file is something else.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path | str,
        config: HealthConfig | None = None,
        *,
        step: int = 0,
        writes: bool | None = None,
    ) -> None:
        self.config = config or HealthConfig()
        self.history = History(Path(path))
        self._watch = Watch(model)
        self._writes = _is_first() if writes is None else writes
        self._step = self._from = step
        # Stretches of steps that are in a line already, the newest last.
        self._lines: deque[tuple[int, list[LayerSums]]] = deque()
        self._warned: set[tuple[str, str]] = set()
        if self._writes:
            for line in self.history.take_up(step):
                layers = layers_of(line)
                if [(layer.name, len(layer.counts)) for layer in layers] != self._watch.layers:
                    raise InputError(
                        f"{path} is the history of a model with other experts; move it away or "
                        "choose another directory"
                    )
                self._lines.append((line["steps"], layers))
                self._warned |= {(w["kind"], w["layer"]) for w in line["warnings"]}
        self._drop_old()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()
        self.stop()

    def start(self) -> None:
        """Begin to watch."""
        self._watch.start()

    def stop(self) -> None:
        """Take all hooks out of the model."""
        self._watch.stop()

    def end_step(self, step: int | None = None) -> dict[str, float]:
        """Close an optimiser step; every process calls it.

        Args:
            step: Its number; one more than the last if not said.

        Returns:
            Numbers for a log, if a line was written: the worst of all layers, and those of each
            layer where the settings ask for them.
        """
        self._step = self._step + 1 if step is None else step
        if self._step - self._from < self.config.every:
            return {}
        return self.flush()

    def flush(self) -> dict[str, float]:
        """Write what was counted since the last line, as before a checkpoint."""
        steps = self._step - self._from
        if steps < 1:
            return {}
        self._from = self._step
        layers = self._watch.take()
        if not layers or not self._writes:
            return {}
        self._lines.append((steps, layers))
        self._drop_old()
        warnings = self._warn()
        self.history.add(
            {
                "step": self._step,
                "steps": steps,
                "tokens": max(layer.tokens for layer in layers),
                "layers": [dataclasses.asdict(layer) for layer in layers],
                "warnings": warnings,
            }
        )
        return self._scalars(layers)

    def _window(self) -> tuple[int, list[LayerSums]]:
        """The layers over the last steps, and how many those are."""
        by_layer = zip(*(layers for _, layers in self._lines), strict=True)
        return sum(steps for steps, _ in self._lines), [join(parts) for parts in by_layer]

    def _drop_old(self) -> None:
        while (
            self._lines
            and sum(steps for steps, _ in self._lines) - self._lines[0][0] >= self.config.window
        ):
            self._lines.popleft()

    def _warn(self) -> list[dict[str, Any]]:
        """Say once for each kind and layer what is wrong."""
        steps, window = self._window()
        if steps < self.config.window:
            return []
        new = []
        for finding in (f for layer in window for f in findings(layer, steps, self.config)):
            if (finding.kind, finding.layer) not in self._warned:
                self._warned.add((finding.kind, finding.layer))
                _LOGGER.warning("step %d, %s", self._step, finding.sentence)
                new.append(finding.plain())
        return new

    def _scalars(self, layers: list[LayerSums]) -> dict[str, float]:
        _, window = self._window()
        values: dict[str, list[float | None]] = {
            "load": [load(layer.counts) for layer in layers],
            "dead": [float(len(dead(layer.counts, self.config))) for layer in window],
            "entropy": [layer.entropy for layer in layers],
            "saturation": [layer.saturation for layer in layers],
        }
        scalars = {
            f"experts/{name}": _WORST[name](known)
            for name, each in values.items()
            if (known := [value for value in each if value is not None])
        }
        if self.config.log_layers:
            scalars |= {
                f"experts/{layer.name}/{name}": value
                for name, each in values.items()
                for layer, value in zip(layers, each, strict=True)
                if value is not None
            }
        return scalars


def _is_first() -> bool:
    spread = distributed.is_available() and distributed.is_initialized()
    return not spread or distributed.get_rank() == 0
