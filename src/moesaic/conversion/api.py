"""`moesaic.convert`: any registered conversion, in one call."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic._registry import MethodInfo, load_object
from moesaic.calibration import CalibrationConfig, CalibrationStats, calibrate
from moesaic.conversion._table import CONVERSIONS
from moesaic.data import DataConfig, TokenBlocks, prepare
from moesaic.models.checkpoint import load_dense, load_tokenizer


def convert(
    model: str | PreTrainedModel,
    config: Any,
    *,
    stats: CalibrationStats | None = None,
    text: TokenBlocks | None = None,
    calibration: CalibrationConfig | None = None,
    progress: Progress = SILENT,
) -> PreTrainedModel:
    """Turn a dense model into a mixture of experts.

    Args:
        model: A dense model, which is consumed, or where to load one from.
        config: Settings of a conversion, such as `moesaic.DSMoE(experts=8)`; they choose it.
        stats: What the settings need to know of the model, if it was measured before.
        text: Training text to measure it on otherwise; see `moesaic.prepare`. The built-in text
            if none and `model` says where its tokenizer is.
        calibration: How much of the text is read.
        progress: Told of every stage.

    Returns:
        The converted model in evaluation mode.

    Raises:
        InputError: If the settings do not fit the model, or need text and there is none.
    """
    info = conversion_of(config)
    dense = load_dense(model) if isinstance(model, str) else model
    apply = load_object(info.target)
    needed = config.collectors()
    if stats is not None or not needed:
        converted: PreTrainedModel = apply(dense, stats, config, progress=progress)[0]
        return converted
    if text is None:
        if not isinstance(model, str):
            raise InputError(
                f"{info.name} with these settings measures {', '.join(needed)}; give text, such as "
                "moesaic.prepare(DataConfig(), tokenizer).train, or stats"
            )
        text = prepare(DataConfig(), load_tokenizer(model), progress=progress).train
    with tempfile.TemporaryDirectory() as directory:
        stats = calibrate(
            dense, text, needed, calibration or CalibrationConfig(), Path(directory), progress
        )
        measured: PreTrainedModel = apply(dense, stats, config, progress=progress)[0]
    return measured


def conversion_of(config: Any) -> MethodInfo:
    """The conversion that some settings belong to.

    Raises:
        InputError: If they are of none.
    """
    for info in CONVERSIONS.values():
        if isinstance(config, load_object(info.config)):
            return info
    raise InputError(
        f"config must be the settings of a conversion ({', '.join(CONVERSIONS)}), got "
        f"{type(config).__name__}; moesaic.DSMoE() is one"
    )
