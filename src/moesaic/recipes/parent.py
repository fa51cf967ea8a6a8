"""The model that a run starts from: kept once, dequantised and in one dtype, and opened there."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel

from moesaic._files import read_json
from moesaic._progress import Progress
from moesaic.evaluation import fastest_dtype
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.checkpoint import (
    MANIFEST,
    load_any,
    load_dense,
    load_tokenizer,
    new_manifest,
    read_manifest,
    save,
)

logger = logging.getLogger(__name__)


def keep_parent(source: str, dtype: str, path: Path, progress: Progress) -> None:
    """Keep a model as a run means it; nothing happens if it is there already.

    Args:
        source: A directory, hub name, .gguf file or `package:NAME`; a mixture of ours keeps the
            record of what was done to it.
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
        model = load_any(source, dtype=dtype)
        dense = model.config.model_type in ARCHITECTURES
        manifest = new_manifest(source, model) if dense else read_manifest(Path(source))
        save(model, path, manifest, load_tokenizer(source))
        stage.advance()


def open_parent(path: Path) -> PreTrainedModel:
    """Load the dense model that `keep_parent` kept."""
    return load_dense(str(path), dtype=read_json(path / "config.json")["dtype"])
