"""Predictions beside the results of a comparison: what short trials said before the cells did."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moesaic._config import build_config, to_plain
from moesaic._files import read_json, write_json
from moesaic.analysis.suggestion import Prediction

NAME = "predictions.json"


def read_predictions(directory: Path) -> list[Prediction]:
    """Read the predictions of a directory; none if there are none."""
    path = directory / NAME
    if not path.is_file():
        return []
    return [
        build_config(Prediction, values, where=f"{path}: prediction")
        for values in read_json(path)["predictions"]
    ]


def write_predictions(directory: Path, predictions: Iterable[Prediction]) -> None:
    """Replace the predictions of a directory."""
    write_json(directory / NAME, {"predictions": [to_plain(p) for p in predictions]})
