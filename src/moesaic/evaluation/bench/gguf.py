"""A mosaic in llama.cpp beside its dense parent: both as GGUF files, timed by its `llama-bench`.

Weights are random, and so is the router: every token takes some of the blocks beside the shared
one, which is what `moesaic export --format gguf` writes. `llama-bench` runs one file at a time in a
process of its own, so the files take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic._files import require_space
from moesaic._progress import SILENT, Progress
from moesaic.evaluation.bench import llama_cpp
from moesaic.evaluation.bench.cell import DENSE, OURS, document, require_memory, use_threads
from moesaic.evaluation.bench.models import SHAPES
from moesaic.models.export._base import FormatConfig
from moesaic.models.export.gguf import Gguf
from moesaic.models.mixture import fresh_mixture
from moesaic.nn.layer import LayerConfig

Weights = Literal["F32", "BF16", "Q8_0", "Q4_0"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufConfig:
    """What is measured.

    Attributes:
        model: `llama-1.1b` or `llama-tiny`: random weights of that shape.
        experts: Blocks of a layer, the shared one included.
        active: Fraction of them that every token uses, the shared one included.
        weights: How weights are stored, each in turn.
        prompt_tokens: Tokens of the prompt whose reading is timed.
        tokens: Tokens decoded, without a prompt.
        threads: Of llama.cpp; 0 for as many as torch has.
        rounds: How often each file has its turn.
        repeats: Of each test in a turn.
        seed: Of the weights.
    """

    model: str = "llama-1.1b"
    experts: int = 8
    active: float = 0.375
    weights: tuple[Weights, ...] = ("BF16", "Q8_0", "Q4_0")
    prompt_tokens: int = 512
    tokens: int = 64
    threads: int = 0
    rounds: int = 3
    repeats: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model not in SHAPES:
            raise InputError(f"model must be one of {', '.join(SHAPES)}, got {self.model!r}")
        unknown = [kind for kind in self.weights if kind not in get_args(Weights)]
        if unknown or not self.weights:
            raise InputError(
                f"weights must be some of {', '.join(get_args(Weights))}, got {self.weights}"
            )
        for name in ("prompt_tokens", "tokens", "rounds", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        num_active = self.active * self.experts
        # One is shared, and the format looks up the best two of the others.
        if not num_active.is_integer() or not 2 <= num_active < self.experts:
            raise InputError(
                "active times experts must be a whole number from 2 to experts - 1, got "
                f"{self.active} of {self.experts}; 0.375 of 8 is usual"
            )
        width = SHAPES[self.model]["intermediate_size"]
        if width % (32 * self.experts):
            raise InputError(
                f"blocks of {width} / {self.experts} neurons cannot be stored in groups of 32; "
                "choose another number of experts"
            )

    def to_plain(self) -> dict[str, Any]:
        """The `config` section of the document."""
        return asdict(self)


def gguf_bench_cost(config: GgufConfig) -> dict[str, float]:
    """Estimate what a run takes: cells, seconds and bytes of memory."""
    numbers = _num_parameters(config)
    # Both in float32 while they are written; a second machine may well differ by half.
    return {
        "cells": 2 * len(config.weights),
        "seconds": 1e-8 * numbers * len(config.weights) * (4 + 2 * config.rounds * config.repeats),
        "memory_bytes": 8.0 * numbers,
    }


def bench_gguf(config: GgufConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Time decoding and the reading of a prompt of both files, for every way to store weights.

    Args:
        config: What is measured.
        progress: Told of the stages.

    Returns:
        The document: machine, commit, and a row per file.

    Raises:
        InputError: If llama.cpp is missing, or memory or disk are too small.
        RunError: If llama.cpp reads another number of weights than were written, or fails.
    """
    program = llama_cpp.find()
    torch.manual_seed(config.seed)
    with torch.device("meta"):
        planned = _dense(config)
    if why := llama_cpp.why_not(program, planned, "bfloat16"):
        raise InputError(f"bench gguf needs llama.cpp, which is left out: {why}")
    assert program is not None
    require_memory(gguf_bench_cost(config)["memory_bytes"], config.model)
    use_threads(config.threads)
    cells = []
    with (
        tempfile.TemporaryDirectory() as folder,
        (progress or SILENT).stage("bench gguf", len(config.weights), "kinds of weights") as stage,
    ):
        require_space(Path(folder), 9 * _num_parameters(config), what="two GGUF files")
        models = {DENSE: _dense(config), OURS: _mosaic(config)}
        for weights in config.weights:
            files = {name: Path(folder, name, "model.gguf") for name in models}
            for name, model in models.items():
                files[name].parent.mkdir(exist_ok=True)
                if name == DENSE:
                    llama_cpp.write_gguf(model, files[name], weights)
                else:
                    write_mosaic(model, files[name], weights)
            cells += _time(program, files, models, weights, config)
            for file in files.values():
                file.unlink()
            stage.advance()
    return document("gguf", config, cells, dtype="float32")


def write_mosaic(model: PreTrainedModel, file: Path, weights: Weights) -> None:
    """Export a model of ours, without a tokenizer, into a directory of its own."""
    Gguf(FormatConfig(weights=weights)).write(model, None, file.parent, torch.float32)
    file.with_name(f"model-{weights}.gguf").rename(file)


def _time(
    program: Path,
    files: dict[str, Path],
    models: dict[str, PreTrainedModel],
    weights: Weights,
    config: GgufConfig,
) -> list[dict[str, Any]]:
    """Give the files their turns; one cell for decoding and one for the prompt."""
    tests = {"decode": (0, config.tokens), "prefill": (config.prompt_tokens, 0)}
    seconds: dict[tuple[str, str], list[float]] = {(t, name): [] for t in tests for name in files}
    for turn in range(config.rounds):
        # Each round in the other order, so that neither is always the one after a pause.
        for name in sorted(files, reverse=bool(turn % 2)):
            found = llama_cpp.run_tests(
                program, files[name], list(tests.values()), repeats=config.repeats
            )
            expected = sum(x.numel() for x in models[name].state_dict().values())
            if found.num_parameters != expected:
                raise RunError(
                    f"llama.cpp reads {found.num_parameters} weights of the {name} file and "
                    f"{expected} were written; no speed is reported until they are the same"
                )
            for test, sizes in tests.items():
                seconds[test, name] += found.seconds[sizes]
    return [
        {
            "shape": config.model,
            "test": test,
            "weights": weights,
            "experts": config.experts,
            "active": config.active,
            "tokens": sum(sizes),
            "rows": _rows({name: seconds[test, name] for name in files}, sum(sizes)),
        }
        for test, sizes in tests.items()
    ]


def _rows(seconds: dict[str, Sequence[float]], tokens: int) -> list[dict[str, Any]]:
    medians = {name: float(np.median(samples)) for name, samples in seconds.items()}
    rows = []
    for name, samples in seconds.items():
        low, median, high = (1e3 * np.percentile(samples, (25, 50, 75))).tolist()
        rows.append(
            {
                "method": name,
                "median_ms": median,
                "low_ms": low,
                "high_ms": high,
                "samples": len(samples),
                "tokens_per_s": tokens / medians[name],
                "faster_than_dense": medians[DENSE] / medians[name],
            }
        )
    return rows


def _num_parameters(config: GgufConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in _dense(config).parameters())


def _llama(config: GgufConfig) -> LlamaConfig:
    return LlamaConfig(**SHAPES[config.model], tie_word_embeddings=False)


def _dense(config: GgufConfig) -> PreTrainedModel:
    model: Any = LlamaForCausalLM(_llama(config))
    made: PreTrainedModel = model.eval()
    return made


def _mosaic(config: GgufConfig) -> PreTrainedModel:
    """The same shape with one shared block, and k of the others for every token."""
    llama = _llama(config)
    width = llama.intermediate_size // config.experts
    others = config.experts - 1
    layer = LayerConfig(
        num_experts=others,
        width=width,
        shared_width=width,
        router="sigmoid-top-k",
        router_options={"top_k": round(config.active * config.experts) - 1},
    )
    made = fresh_mixture(llama, [layer] * llama.num_hidden_layers, {})
    made.eval()
    return made
