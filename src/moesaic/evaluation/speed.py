"""Tokens per second of several models, measured in one run and in turns.

A machine shared with others speeds up and slows down; models measured one after the other would
each meet another machine. Here every repeat runs every model, and what is compared is medians.

Shapes: S tokens of the prompt.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic._progress import SILENT, Progress
from moesaic.evaluation._mode import measuring, rotated
from moesaic.evaluation.machine import machine_info
from moesaic.inference.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedConfig:
    """Settings of the measurement of speed.

    Attributes:
        prefill_tokens: Length of the prompt whose reading is timed.
        prompt_tokens: Length of the prompt before the decoding that is timed.
        decode_tokens: Tokens decoded greedily, one at a time, with the cache.
        repeats: Timed runs of each model; 5 give a median and a spread.
        warmup: Untimed runs of each model before.
        engine: Whether the decode engine is timed beside transformers, where it can run the models.
        engine_weights: How it stores weights.
    """

    prefill_tokens: int = 512
    prompt_tokens: int = 64
    decode_tokens: int = 32
    repeats: int = 5
    warmup: int = 1
    engine: bool = True
    engine_weights: Literal["float32", "bfloat16", "int8"] = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("prefill_tokens", "prompt_tokens", "decode_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.warmup < 0:
            raise InputError(f"warmup must be at least 0, got {self.warmup}; 1 is usual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second over the repeats: the median and the quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Speed of one model at batch size 1."""

    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """Speeds measured in one run.

    Attributes:
        models: Speed of each model in transformers.
        engine: Speed of each in the decode engine; empty if it cannot run one of them.
        machine: What they ran on, with the number of threads.
    """

    models: Mapping[str, Speed]
    engine: Mapping[str, Speed]
    machine: Mapping[str, Any]


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    config: SpeedConfig | None = None,
    progress: Progress | None = None,
    *,
    prompt_ids: NDArray[Any] | None = None,
) -> SpeedResult:
    """Time the prefill and the decoding of every model, in turns.

    Args:
        models: By name; all in memory.
        config: Settings.
        progress: Told of every run.
        prompt_ids: Token ids of real text, [S], repeated to the length needed. A sparse model's
            speed depends on the text; random ids if none.

    Raises:
        InputError: If there is no model, or one cannot read the prompt.
        RunError: If a model does not produce the tokens it was asked for.
    """
    config = config or SpeedConfig()
    if not models:
        raise InputError("speed needs at least 1 model, got 0; name one")
    check_speed(models, config)
    ids_S = _prompt(models, config, prompt_ids)
    runs: dict[tuple[str, str], Callable[[], tuple[float, float]]] = {
        ("transformers", name): partial(_run, name, model, ids_S, config)
        for name, model in models.items()
    }
    for name, engine in _engines(models, config).items():
        runs["engine", name] = partial(_run_engine, engine, ids_S, config)
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runs}
    rounds = config.warmup + config.repeats
    keys = list(runs)
    with (progress or SILENT).stage("speed", rounds * len(runs), "runs") as stage:
        for i in range(rounds):
            for key in rotated(keys, i):
                with measuring(models[key[1]]):
                    times = runs[key]()
                if i >= config.warmup:
                    seconds[key].append(times)
                stage.advance()
    first = next(iter(models.values()))
    speeds = {
        key: Speed(
            prefill_tokens_per_s=_rate([config.prefill_tokens / s for s, _ in times]),
            decode_tokens_per_s=_rate([config.decode_tokens / s for _, s in times]),
        )
        for key, times in seconds.items()
    }
    return SpeedResult(
        models={name: speeds["transformers", name] for name in models},
        engine={name: speed for (runtime, name), speed in speeds.items() if runtime == "engine"},
        machine=machine_info(str(first.dtype).removeprefix("torch."), str(first.device)),
    )


def _engines(models: Mapping[str, PreTrainedModel], config: SpeedConfig) -> dict[str, Engine]:
    """An engine for each model, or none at all: what is compared must run in the same place."""
    if not config.engine:
        return {}
    length = max(config.prefill_tokens, config.prompt_tokens + config.decode_tokens)
    try:
        return {
            name: Engine(model, weight_format=config.engine_weights, length=length)
            for name, model in models.items()
        }
    except (InputError, RunError) as error:
        logger.warning("speed is measured in transformers alone: %s", error)
        return {}


def _run_engine(engine: Engine, ids_S: Tensor, config: SpeedConfig) -> tuple[float, float]:
    """Seconds of one prefill and of one greedy decoding in the engine."""
    ids = ids_S.tolist()
    start = time.perf_counter()
    engine.prefill(ids[: config.prefill_tokens])
    prefill_s = time.perf_counter() - start
    token = int(engine.prefill(ids[: config.prompt_tokens]).argmax())
    start = time.perf_counter()
    for i in range(config.decode_tokens):
        token = int(engine.prefill([token], start=config.prompt_tokens + i).argmax())
    return prefill_s, time.perf_counter() - start


def greedy_tokens(model: PreTrainedModel, ids_BS: Tensor, num_tokens: int) -> tuple[Tensor, float]:
    """Decode greedily with the cache, ending at no token.

    Args:
        model: In evaluation mode.
        ids_BS: The prompt, [1, S].
        num_tokens: How many.

    Returns:
        The new tokens, [1, num_tokens], and the seconds from the end of the prompt's reading.
    """
    out = model(input_ids=ids_BS, use_cache=True, logits_to_keep=1)
    next_B1 = out.logits[:, -1:].argmax(-1)
    tokens = []
    _synchronize(model)
    start = time.perf_counter()
    for _ in range(num_tokens):
        tokens.append(next_B1)
        out = model(
            input_ids=next_B1, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
        )
        next_B1 = out.logits[:, -1:].argmax(-1)
    _synchronize(model)
    return torch.cat(tokens, dim=1), time.perf_counter() - start


def _run(
    name: str, model: PreTrainedModel, ids_S: Tensor, config: SpeedConfig
) -> tuple[float, float]:
    """Seconds of one prefill and of one decoding."""
    ids_BS = ids_S.to(model.device)[None]
    _synchronize(model)
    start = time.perf_counter()
    logits_BSV = model(
        input_ids=ids_BS[:, : config.prefill_tokens], use_cache=True, logits_to_keep=1
    ).logits
    _synchronize(model)
    prefill_s = time.perf_counter() - start
    if not bool(torch.isfinite(logits_BSV).all()):
        raise RunError(f"{name} gives logits that are not finite; load it in float32")
    tokens_BS, decode_s = greedy_tokens(
        model, ids_BS[:, : config.prompt_tokens], config.decode_tokens
    )
    if tokens_BS.shape[1] != config.decode_tokens:
        raise RunError(
            f"{name} decoded {tokens_BS.shape[1]} tokens, not {config.decode_tokens}; "
            "its forward does not return the logits of the last position"
        )
    return prefill_s, decode_s


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _rate(rates: list[float]) -> Rate:
    low, high = np.percentile(rates, (25, 75))
    return Rate(median=statistics.median(rates), low=float(low), high=float(high))


def _prompt(
    models: Mapping[str, PreTrainedModel], config: SpeedConfig, given: NDArray[Any] | None
) -> Tensor:
    """Token ids as long as the longest prompt."""
    length = max(config.prefill_tokens, config.prompt_tokens)
    vocabulary = min(int(model.config.vocab_size) for model in models.values())
    if given is None:
        given = np.random.default_rng(0).integers(0, vocabulary, length)
    if given.size == 0 or int(given.max()) >= vocabulary:
        raise InputError(
            f"prompt_ids must hold 1 or more tokens below {vocabulary}, got {given.size} up to "
            f"{given.max(initial=0)}; use the tokenizer of these models"
        )
    return torch.from_numpy(np.resize(given, length).astype(np.int64))


def check_speed(models: Mapping[str, PreTrainedModel], config: SpeedConfig) -> None:
    """Refuse a measurement that a model has too few positions for."""
    longest = max(config.prefill_tokens, config.prompt_tokens + config.decode_tokens)
    for name, model in models.items():
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise InputError(
                f"prefill_tokens, and prompt_tokens + decode_tokens, must be at most the {limit} "
                f"positions of {name}, got {longest}; lower them"
            )
