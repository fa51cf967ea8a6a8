"""The interface of an export format, and what its experts and routers may look like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._errors import InputError

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layers that a format can hold: all alike, the same number of blocks for every token.

    Attributes:
        router: Registered name of the only router it knows.
        min_shared: Blocks that have to be always on.
        max_shared: Blocks that may be; none if any number may.
        dense_layers: Whether some layers may be without a router, all their blocks always on.
    """

    router: str
    min_shared: int = 0
    max_shared: int | None = None
    dense_layers: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatConfig:
    """Settings of an export.

    Attributes:
        weights: How weights are stored: `float32`, `bfloat16` or `float16` in directories, `F32`,
            `BF16`, `F16`, `Q8_0` or `Q4_0` in GGUF files; `auto` as the checkpoint has them.
    """

    weights: str = AUTO


class Format(ABC):
    """A form in which other software reads a model.

    Attributes:
        name: Registered name.
        layout: What its layers may look like; none if it takes any layer of ours.
    """

    name: str
    layout: Layout | None

    @abstractmethod
    def obstacle(self, config: Any) -> str:
        """Say which property of a model the format cannot hold.

        Args:
            config: Of the converted model, as in its checkpoint.

        Returns:
            It in words that follow "cannot hold"; empty if there is none.
        """

    def tokenizer_obstacle(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Say what of a tokenizer the format cannot hold, as `obstacle` does of a model."""
        return ""

    def missing(self) -> str:
        """Name the package that writing needs and that is not installed; empty if none."""
        return ""

    @abstractmethod
    def round(self, model: PreTrainedModel, dtype: torch.dtype) -> bool:
        """Make of the weights of a model, in place, what is left of them once they are stored.

        Args:
            model: In float32.
            dtype: Of the checkpoint.

        Returns:
            Whether any weight changed.
        """

    @abstractmethod
    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        directory: Path,
        dtype: torch.dtype,
    ) -> None:
        """Write a model without an obstacle.

        Args:
            model: Whose layers fit the layout, in float32.
            tokenizer: Of the model.
            directory: Empty.
            dtype: Of the checkpoint.
        """

    @abstractmethod
    def read(self, directory: Path) -> PreTrainedModel:
        """Load what `write` wrote, in float32."""


def check_kind(name: str, config: FormatConfig, kinds: Sequence[str]) -> None:
    """Refuse a way to store weights that a format does not have."""
    if config.weights not in (AUTO, *kinds):
        raise InputError(
            f"weights of {name} must be one of {', '.join((AUTO, *kinds))}, got {config.weights!r}"
        )
