"""A tiny model on disk with a byte tokenizer, and a recipe that runs all steps on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from model_cases import Case, dense_model

from moesaic.models import byte_tokenizer


def write_model(directory: Path) -> Path:
    """Save a tiny dense Llama and its tokenizer."""
    model = dense_model(Case("llama", {"vocab_size": 260, "max_position_embeddings": 512}))
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_text(directory: Path) -> Path:
    """Write a few documents."""
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(12):
        words = [f"word{(index * 37 + i * i) % 101}" for i in range(150)]
        (directory / f"text{index}.txt").write_text(" ".join(words))
    return directory


def recipe_values(root: Path) -> dict[str, Any]:
    """A recipe of every step, as plain data."""
    return {
        "model": str(root / "dense"),
        "output": str(root / "run"),
        "data": {"sources": [f"notes={root / 'text'}"], "block": 32},
        "calibration": {"tokens": 128, "batch_blocks": 2},
        "steps": [
            {"convert": {"method": "dsmoe", "experts": 4, "active": 0.6, "fit_steps": 3}},
            {"compress": {"method": "flap", "active": 0.6}},
            {
                "train": {
                    "tokens": 256,
                    "batch_blocks": 2,
                    "active": 0.6,
                    "checkpoint_every": 2,
                }
            },
            {
                "evaluate": {
                    "blocks_per_domain": 4,
                    "curve_blocks_per_domain": 1,
                    "thresholds": [0.4, 0.6],
                    "measure_speed": False,
                    "generate_tokens": 4,
                    "prompts": ["word1 "],
                }
            },
        ],
    }


def write_recipe(root: Path, values: dict[str, Any] | None = None) -> Path:
    """Write a recipe, with its model and text."""
    if not (root / "dense").exists():
        write_model(root / "dense")
        write_text(root / "text")
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values or recipe_values(root)))
    return path
