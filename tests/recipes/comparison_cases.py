"""A protocol on a tiny model, and cells measured in this process."""

from __future__ import annotations

import json
from pathlib import Path

from moesaic.recipes.comparison.process import do_piece

BOUNDS = {
    "neurons": {"bound": "neuron-bound"},
    "gates": {"bound": "neuron-bound", "options": {"by": "gate"}},
    "blocks": {
        "bound": "block-bound",
        "options": {"convert": "dsmoe", "options": {"experts": 4, "init": "open"}},
    },
}
VOLATILE = ("seconds", "peak_bytes", "created", "machine", "versions", "resumed")


def values(root, **options):
    """A protocol of two methods and two budgets, as plain data."""
    root = Path(root)
    return {
        "model": str(root / "dense"),
        "data": {"sources": [f"notes={root / 'text'}"], "block": 32},
        "calibration": {"tokens": 128, "batch_blocks": 2},
        "heldout": {"blocks_per_domain": 4},
        "train": {"tokens": 256, "batch_blocks": 2, "checkpoint_every": 2},
        "budgets": [0.75, 0.5],
        "seeds": [0],
        "methods": {
            "dsmoe": {"convert": "dsmoe", "options": {"experts": 4, "fit_steps": 3}},
            "flap": {"compress": "flap", "options": {"multiple": 1}},
        },
    } | options


def in_process(piece, log, progress):
    """Spare the seconds that a fresh process takes to import torch."""
    return do_piece(json.loads(json.dumps(piece)), progress)


def stable(lines):
    """What two runs of one cell have in common."""
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]
