"""A transformers directory as a format: which model it holds is all that differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moesaic.models.export._base import AUTO, Format, FormatConfig, Layout, check_kind

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An architecture of transformers to export to.

    Attributes:
        name: Registered name of the format.
        layout: What its layers may look like; none if they may be any of ours.
        obstacle: Says what of a converted model's config it cannot hold; empty for nothing.
        build: Makes its model around the tensors of a converted one without an obstacle.
    """

    name: str
    layout: Layout | None
    obstacle: Callable[[Any], str]
    build: Callable[[PreTrainedModel], Any]


class DirectoryFormat(Format):
    """Writes a directory that `AutoModelForCausalLM` loads.

    Args:
        target: What it holds.
        config: Settings.
    """

    def __init__(self, target: Target, config: FormatConfig) -> None:
        check_kind(target.name, config, tuple(DTYPES))
        self.name = target.name
        self.layout = target.layout
        self.config = config
        self._target = target

    def obstacle(self, config: Any) -> str:
        """Say what of a model it cannot hold."""
        return self._target.obstacle(config)

    @torch.no_grad()
    def round(self, model: PreTrainedModel, dtype: torch.dtype) -> bool:
        """Round every parameter; the bias of a choice, which stays in float32, is none."""
        changed = False
        for parameter in model.parameters():
            rounded = parameter.to(self._stored(dtype)).to(parameter.dtype)
            changed = changed or not torch.equal(rounded, parameter)
            parameter.copy_(rounded)
        return changed

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        directory: Path,
        dtype: torch.dtype,
    ) -> None:
        """Save model and tokenizer; in memory the model stays as it is."""
        built = self._target.build(model)
        before = [(parameter, parameter.data) for parameter in built.parameters()]
        try:
            for parameter, data in before:
                parameter.data = data.to(self._stored(dtype))
            built.save_pretrained(directory)
        finally:
            for parameter, data in before:
                parameter.data = data
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    def read(self, directory: Path) -> PreTrainedModel:
        """Load it as anyone would, in float32."""
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.config.weights == AUTO else DTYPES[self.config.weights]
