"""What every kind of cell does in its process: claim its directory, take the time, refuse."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic._files import read_json, write_json
from moesaic.evaluation.machine import machine_info, peak_bytes, source_commit


class RefusedError(Exception):
    """A cell cannot be done as asked; its message is the sentence of what refuses it."""


def claim_cell(work: Path, settings: Mapping[str, Any]) -> bool:
    """Make a directory that of a cell; what other settings left goes. Tells whether to go on."""
    record = work / "cell.json"
    if record.is_file() and read_json(record) == settings:
        return True
    shutil.rmtree(work, ignore_errors=True)
    write_json(record, settings)
    return False


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write down what a block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 4)


def circumstances(
    model: PreTrainedModel, seconds: dict[str, float], *, resumed: bool
) -> dict[str, Any]:
    """What a line says of how it was measured.

    Args:
        model: What was measured.
        seconds: Of every part. An interrupted cell says what its last part took.
        resumed: Whether it was interrupted.
    """
    return {
        "resumed": resumed,
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "machine": machine_info(str(model.dtype).removeprefix("torch."), str(model.device)),
        "versions": {"moesaic": version("moesaic"), "commit": source_commit()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
