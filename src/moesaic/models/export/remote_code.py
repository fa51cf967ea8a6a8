"""Our own directory: every model exactly, with the source files that load it anywhere.

It holds gates with a threshold, bypasses and whatever else we make. transformers and vLLM's
transformers backend load it with `trust_remote_code`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.models.export._base import Format
from moesaic.models.export._stock import (
    DTYPES,
    read_directory,
    round_model,
    stored_dtype,
    write_directory,
)


class RemoteCode(Format):
    """Writes a directory that loads with `trust_remote_code` where moesaic is not installed.

    Args:
        config: Settings.
    """

    name = "remote-code"
    layout = None
    kinds = tuple(DTYPES)

    def obstacle(self, config: Any) -> str:
        """Find none."""
        return ""

    def round(self, model: PreTrainedModel, dtype: torch.dtype) -> bool:
        """Round every weight."""
        return round_model(model, stored_dtype(self.config, dtype))

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        directory: Path,
        dtype: torch.dtype,
    ) -> None:
        """Save it."""
        stored = stored_dtype(self.config, dtype)
        write_directory(model, tokenizer, directory, stored)

    def read(self, directory: Path) -> PreTrainedModel:
        """Load it with our classes, which are the same code."""
        return read_directory(directory)
