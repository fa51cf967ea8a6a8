"""Methods put in place at a budget, at little cost.

Most are simply applied, to a copy of the parent; those that go by the size of activations with few
calibration tokens. DSMoE, whose routers are what takes time, has them fitted once, in few steps, on
few tokens and at half of the network; its layers are then settled on every budget. How much more so
short a fit loses is measured on a few layers that are fitted in full as well: to first order a
model loses the sum of what its layers do.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._progress import SILENT, Progress
from moesaic.calibration import CalibrationStats
from moesaic.conversion.dsmoe import DSMoE, fit_dsmoe, settle, settled_error
from moesaic.evaluation import block_bound, neuron_bound
from moesaic.nn.experts.thresholded import Thresholded
from moesaic.nn.layer import moe_layers
from moesaic.recipes.recipe import METHODS
from moesaic.recipes.suggestion.reading import TrialConfig

# Where routers are fitted that then settle on every budget.
_FIT_AT = 0.5
# Layers that are fitted in full as well, evenly spaced.
_IN_FULL = 3


class Placed(NamedTuple):
    """A model at a budget.

    Attributes:
        model: To be measured while it is in place.
        active: The active fraction that the method says it has; none if it does not say.
        in_full: What the method loses in full over what the trial does, in nats.
    """

    model: PreTrainedModel
    active: float | None = None
    in_full: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A method that can be put in place at a budget.

    Attributes:
        name: Of the method.
        kind: `convert`, `compress` or `bound`.
        static: Whether the same weights serve every token.
        at: Puts it in place, or raises `InputError` where it cannot meet the budget.
    """

    name: str
    kind: str
    static: bool
    at: Callable[[float], AbstractContextManager[Placed]]


@dataclass(frozen=True, kw_only=True)
class Parent:
    """What trials are made of.

    Attributes:
        dense: The parent, which stays as it is.
        stats: Its statistics, with what all methods need; none if they need nothing.
        config: How much work the trials are.
        progress: Told of every layer.
    """

    dense: PreTrainedModel
    stats: CalibrationStats | None
    config: TrialConfig
    progress: Progress = SILENT

    def trial(self, name: str, kind: str, method: str, at: Callable[[float], Any]) -> Trial:
        """A registered method.

        Args:
            name: What it is called.
            kind: `convert` or `compress`, or what else has a table of methods.
            method: Registered name.
            at: Gives its settings at a budget.
        """
        static = "static" in METHODS[kind][method].abilities
        stats = self.stats
        # What goes by the size of activations needs no more.
        enough = {"teal": self.config.sample_tokens, "wanda": self.config.fit_tokens}
        if stats is not None and method in enough:
            stats = stats.thinned(enough[method])

        @contextmanager
        def place(budget: float) -> Iterator[Placed]:
            config = at(budget)
            if isinstance(config, DSMoE) and config.init == "gram" and budget < 1:
                with self.fitted(config).at(budget) as placed:
                    yield placed
                return
            apply = METHODS[kind].load(method)
            model, results = apply(copy.deepcopy(self.dense), stats, config, progress=self.progress)
            yield Placed(model, results.get("active"))

        return Trial(name=name, kind=kind, static=static, at=place)

    def fitted(self, config: DSMoE) -> Fitted:
        """DSMoE with some settings, fitted once for budgets that are asked about in a row."""
        config = dataclasses.replace(config, active=_FIT_AT)
        key = json.dumps(to_plain(config), sort_keys=True)
        if key not in self._fitted:
            # Each holds a model: of many settings the last two stay.
            while len(self._fitted) > 1:
                del self._fitted[next(iter(self._fitted))]
            self._fitted[key] = Fitted(self, config)
        return self._fitted[key]

    @cached_property
    def _fitted(self) -> dict[str, Fitted]:
        return {}

    def neurons(self) -> Trial:
        """The bound on neurons, by what they contribute."""

        @contextmanager
        def place(budget: float) -> Iterator[Placed]:
            with neuron_bound(self.dense, budget) as active:
                yield Placed(self.dense, active)

        return Trial(name="neuron-bound", kind="bound", static=False, at=place)

    def blocks(self, config: DSMoE) -> Trial:
        """The bound on the blocks that some settings of DSMoE cut."""

        @contextmanager
        def place(budget: float) -> Iterator[Placed]:
            model = self.fitted(config).model
            with block_bound(model, budget) as active:
                yield Placed(model, active)

        return Trial(name="block-bound", kind="bound", static=False, at=place)


class Fitted:
    """DSMoE fitted shortly.

    Args:
        parent: What it is made of.
        config: Settings, those of a fit in full.
    """

    def __init__(self, parent: Parent, config: DSMoE) -> None:
        assert parent.stats is not None
        self.parent, self.full = parent, config
        steps = min(config.fit_steps, parent.config.fit_steps)
        self.short = dataclasses.replace(config, fit_steps=steps)
        self.stats = parent.stats.thinned(parent.config.fit_tokens)
        self.model = copy.deepcopy(parent.dense)
        self.fits: list[tuple[float, ...]] = fit_dsmoe(
            self.model, self.stats, self.short, progress=parent.progress
        )

    @contextmanager
    def at(self, budget: float) -> Iterator[Placed]:
        """Settle the layers on a budget."""
        in_full = self._in_full(budget)
        # What blocks make of their input; the rest of what settling writes it does not read.
        parts = [layer.experts for layer in moe_layers(self.model) if layer.experts]
        before = [part.weights().down.detach().clone() for part in parts]
        settle(self.model, self.fits, self.stats, dataclasses.replace(self.short, active=budget))
        try:
            yield Placed(self.model, in_full=in_full)
        finally:
            with torch.no_grad():
                for part, down_EDF in zip(parts, before, strict=True):
                    part.weights().down.copy_(down_EDF)
                    if isinstance(part, Thresholded):
                        part.set_thresholds(0.0, 0.0)
                        part.keep()

    def _in_full(self, budget: float) -> float:
        """What a few layers lose fitted in full over what they lose fitted shortly."""
        dense, stats = self.parent.dense, self.parent.stats
        assert stats is not None
        full, short = (
            dataclasses.replace(config, active=budget) for config in (self.full, self.short)
        )
        layers = moe_layers(self.model)
        some = range(len(layers) // (2 * _IN_FULL), len(layers), -(-len(layers) // _IN_FULL))
        lost = lost_shortly = 0.0
        for index in some:
            lost += settled_error(dense, index, stats, full)
            layer = copy.deepcopy(layers[index])
            lost_shortly += settled_error(dense, index, self.stats, short, fitted=layer)
        # Neither is lost where a budget is so high that all blocks are on.
        return lost / lost_shortly if lost_shortly else 1.0
