"""The dense parent of a run: kept once, dequantised and in one dtype, and opened from there."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel

from moesaic._files import read_json
from moesaic._progress import Progress
from moesaic.evaluation import fastest_dtype
from moesaic.models.checkpoint import MANIFEST, load_dense, load_tokenizer, new_manifest, save

logger = logging.getLogger(__name__)


def keep_parent(source: str, dtype: str, path: Path, progress: Progress) -> None:
    """Keep a dense model as a run means it; nothing happens if it is there already.

    Args:
        source: A directory, hub name, .gguf file or `package:NAME`.
        dtype: Of the weights; `auto` measures which is fastest here.
        path: Its directory.
        progress: Told when it is done.
    """
    if (path / MANIFEST).is_file():
        return
    if dtype == "auto":
        dtype = fastest_dtype()
        logger.info("weights are %s, the fastest here", dtype)
    with progress.stage("load the parent", 1, "models") as stage:
        model = load_dense(source, dtype=dtype)
        save(model, path, new_manifest(source, model), load_tokenizer(source))
        stage.advance()


def open_parent(path: Path) -> PreTrainedModel:
    """Load what `keep_parent` kept."""
    return load_dense(str(path), dtype=read_json(path / "config.json")["dtype"])
