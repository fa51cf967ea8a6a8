"""The history of a run: JSON lines that a killed run and its continuation write as one would have.

A line holds `step`, the optimiser step it ends at, `steps`, how many it sums up, `tokens`, the
`layers` with their counts, and the `warnings` given at it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic.training.health.watch import LayerSums

NAME = "health.jsonl"


class History:
    """The lines of a run on disk.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def take_up(self, step: int) -> list[dict[str, Any]]:
        """Keep the lines up to a step, drop what a killed run wrote after it, and give them.

        Raises:
            InputError: If the file is another's.
        """
        kept: list[dict[str, Any]] = []
        if self.path.is_file():
            # A line that was cut short is the last, and newer than any checkpoint.
            for text in self.path.read_text("utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    break
                if not isinstance(line, dict) or not {"step", "layers"} <= line.keys():
                    raise InputError(
                        f"{self.path} is no history of training health; move it away or choose "
                        "another directory"
                    )
                if line["step"] > step:
                    break
                kept.append(line)
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        return kept

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def layers_of(line: Mapping[str, Any]) -> list[LayerSums]:
    """Read the layers of a line."""
    return [
        LayerSums(
            layer["name"],
            layer["tokens"],
            tuple(layer["counts"]),
            layer["entropy"],
            layer["saturation"],
        )
        for layer in line["layers"]
    ]
