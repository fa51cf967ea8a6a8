"""What can be known before any work: whether a recipe can run, and what it will take."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from moesaic._errors import InputError
from moesaic._files import require_space
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.data import load_documents
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.checkpoint import check_weights, read_config
from moesaic.models.ffn import dense_ffn_width
from moesaic.recipes.recipe import Recipe
from moesaic.training.config import TrainConfig


def plan(recipe: Recipe) -> dict[str, Any]:
    """Check a recipe against its model and text, before anything expensive, and say what it does.

    Returns:
        Plain data: the steps, the tokens that they read, and the disk and memory that they take.

    Raises:
        InputError: If a step cannot work.
    """
    config = read_config(recipe.model)
    mixture = config.model_type not in ARCHITECTURES
    if mixture and not recipe.from_mixture:
        raise InputError(f"model {recipe.model!r} is converted already; give its dense parent")
    if recipe.from_mixture and not mixture:
        raise InputError(
            f"model {recipe.model!r} is dense, {recipe.steps[0].method} changes the experts of a "
            "mixture; convert it first"
        )
    check_weights(recipe.model)
    width = dense_ffn_width(config)
    for step in recipe.steps:
        # The mixture that a recipe makes on the way is not known yet.
        if step.kind in ("convert", "compress") and step.from_mixture == mixture:
            check_model(step.config, config)
        if step.kind == "train":
            check_train(step.config, recipe.data.block)
    check_positions(_positions(recipe), getattr(config, "max_position_embeddings", None))
    if recipe.collectors() and recipe.calibration.tokens < recipe.data.block:
        raise InputError(
            f"calibration.tokens must be at least one block of {recipe.data.block}, got "
            f"{recipe.calibration.tokens}; raise it or lower data.block"
        )
    reads = bool(recipe.collectors()) or any(s.kind in ("train", "evaluate") for s in recipe.steps)
    documents = load_documents(recipe.data) if reads else ()
    parameters = estimate_parameters(config)
    size = 2 if recipe.dtype in ("bfloat16", "float16") else 4
    trains = any(step.kind == "train" for step in recipe.steps)
    models = 1 + sum(step.kind != "evaluate" for step in recipe.steps)
    disk = parameters * size * (models + (6 if trains else 0)) + _statistics(recipe, config, width)
    if not (recipe.output / "run.json").is_file():
        require_space(recipe.output, disk, what="the run")
    return {
        "model": recipe.model,
        "output": str(recipe.output),
        "parameters": parameters,
        "documents": len(documents),
        "calibration_tokens": recipe.calibration.tokens if recipe.collectors() else 0,
        "train_tokens": sum(s.config.tokens for s in recipe.steps if s.kind == "train"),
        "steps": [next(iter(step.plain())) for step in recipe.steps],
        "disk_bytes": disk,
        "memory_bytes": parameters * size * (5 if trains else 3),
    }


def check_model(settings: Any, config: Any) -> None:
    """Refuse settings of a method that do not fit a model, as far as its config tells.

    Settings with a method `check_model` are asked themselves.

    Args:
        settings: Of a registered method.
        config: Of the dense parent.

    Raises:
        InputError: Naming the field, the value and the nearest that work.
    """
    experts = getattr(settings, "experts", None)
    if experts is not None:
        validate_num_experts(dense_ffn_width(config), experts)
    if hasattr(settings, "check_model"):
        settings.check_model(config)


def check_train(config: TrainConfig, block: int) -> None:
    """Refuse a training that cannot start.

    Args:
        config: Its settings.
        block: Tokens of a block of its text.

    Raises:
        InputError: If there is no whole step, or an optional package is missing.
    """
    if config.tokens < config.batch_blocks * block:
        raise InputError(
            f"train.tokens must be at least one step of {config.batch_blocks * block}, got "
            f"{config.tokens}; raise it or lower train.batch_blocks"
        )
    for used, field, package in (
        (config.trains == "lora", "trains lora", "peft"),
        (config.tensorboard, "tensorboard", "tensorboard"),
    ):
        if used and importlib.util.find_spec(package) is None:
            raise InputError(
                f"train.{field} needs {package}, which is not installed; "
                "pip install 'moesaic[train]'"
            )


def _positions(recipe: Recipe) -> dict[str, int]:
    """The longest texts that a recipe has read, by the setting that says so."""
    wanted = {"data.block": recipe.data.block}
    for step in recipe.steps:
        if step.kind == "evaluate" and step.config.measure_speed:
            speed = step.config.speed
            wanted["evaluate.speed.prefill_tokens"] = speed.prefill_tokens
            both = "evaluate.speed.prompt_tokens + decode_tokens"
            wanted[both] = speed.prompt_tokens + speed.decode_tokens
    return wanted


def check_positions(wanted: Mapping[str, int], limit: int | None) -> None:
    """Refuse texts longer than the model reads.

    Args:
        wanted: Their lengths in tokens, by the setting that asks for them.
        limit: Positions of the model, or none if it has no bound.

    Raises:
        InputError: Naming the setting that asks for more.
    """
    for name, value in wanted.items():
        if limit is not None and value > limit:
            raise InputError(
                f"{name} must be at most the {limit} positions of the model, got {value}; lower it"
            )


def _statistics(recipe: Recipe, config: Any, width: int) -> int:
    """Bytes that calibration writes, near enough to plan with."""
    tokens, dim = recipe.calibration.tokens, config.hidden_size
    sizes = {
        "adjacency": 4 * width * width,
        "inputs": 2 * tokens * dim,
        "moments": 4 * dim * dim,
        "neurons": 4 * width * (width + 4),
    }
    needed = recipe.collectors()
    per_layer = sum(sizes.get(name, 0) for name in needed)
    return int(config.num_hidden_layers * per_layer + (4 * tokens * dim if needed else 0))


def estimate_parameters(config: Any) -> int:
    """Parameters of a decoder, near enough to plan with; a head that is the embedding once."""
    dim, layers, width = config.hidden_size, config.num_hidden_layers, dense_ffn_width(config)
    tables = 1 if getattr(config, "tie_word_embeddings", False) else 2
    return int(config.vocab_size * dim * tables + layers * (4 * dim * dim + 3 * dim * width))
