"""Time and memory of a training step beside the dense step: the paper's way, and with skipping.

A step is forward, backward and AdamW of a Llama model with random weights; the dense one is that
of transformers, and the others are cut out of it. Memory is the growth of a fresh process for each.

Shapes: S tokens of the one sequence, V vocabulary, E experts.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic._hooks import hooked
from moesaic._progress import SILENT, Progress
from moesaic.evaluation.bench.cell import (
    DENSE,
    Method,
    Methods,
    document,
    require_memory,
    time_cell,
    use_threads,
)
from moesaic.evaluation.machine import peak_bytes
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.ffn import decoder_layers, fill_experts, read_ffn
from moesaic.models.mixture import fresh_mixture
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers, record_routing
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold

DSMOE, HARD_SKIP = "dsmoe", "hard-skip-"
_DTYPE = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBenchConfig:
    """Sizes of the model and of the measurement.

    Attributes:
        dim: Model width; the default shape is that of SmolLM2-135M.
        width: Neurons of the dense FFN.
        num_layers: Layers.
        num_heads: Attention heads; a third of them hold keys and values if that divides.
        vocab_size: Small, so that the head does not hide the layers.
        num_experts: E; it divides `width`.
        num_tokens: S.
        active: Fractions of experts that are on at which `hard-skip` is measured.
        trains: `all` parameters, or `routers` alone with the gradient flowing through the rest.
        threads: Of torch; 0 leaves what it has.
        seconds: Budget of the timing; 5 rounds are made even beyond it.
        memory: Whether to measure memory, in a process for each model.
    """

    dim: int = 576
    width: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    vocab_size: int = 4096
    num_experts: int = 8
    num_tokens: int = 512
    active: tuple[float, ...] = (0.5, 0.25)
    trains: Literal["all", "routers"] = "all"
    threads: int = 0
    seconds: float = 60.0
    memory: bool = True

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.width % self.num_experts:
            raise InputError(
                f"num_experts must divide width={self.width}, got {self.num_experts}; choose a "
                "divisor"
            )
        for name in ("num_layers", "num_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.threads < 0 or self.seconds <= 0:
            raise InputError(
                "threads must be at least 0 and seconds above 0, got "
                f"{self.threads} and {self.seconds}"
            )
        for fraction in self.active:
            if not 0.0 < fraction < 1.0:
                raise InputError(f"active must be in (0, 1), got {fraction}; 0.5 is usual")

    def to_plain(self) -> dict[str, Any]:
        """The `config` section of the document."""
        return asdict(self)


def train_bench_cost(config: TrainBenchConfig) -> dict[str, float]:
    """Estimate what a run takes: cells, seconds and bytes of memory."""
    with torch.device("meta"):
        numbers = sum(p.numel() for p in LlamaForCausalLM(_llama(config)).parameters())
    names = _names(config)
    # A training step does 6 FLOPs a number and token; 1e11 a second is a small machine.
    step_s = 6 * numbers * config.num_tokens / 1e11
    # What one model's forward keeps for its backward; every expert's output in the paper's way.
    kept = config.num_layers * (12 * config.dim + 4 * config.width)
    kept += config.num_layers * config.num_experts * config.dim + 3 * config.vocab_size
    return {
        "cells": 1,
        "seconds": max(config.seconds, 5 * step_s * len(names))
        + (2 * step_s + 10.0) * len(names) * (1 + config.memory),
        # Weights, gradients and the two of AdamW stay for every model.
        "memory_bytes": 4 * (4 * numbers * len(names) + kept * config.num_tokens),
    }


def bench_train(config: TrainBenchConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure a training step: dense, DSMoE as published, and `hard-skip`.

    Before that the logits, and so the loss, of DSMoE with all gates on must be the dense ones, and
    those of `hard-skip` must be those of DSMoE at the same thresholds.

    Args:
        config: Sizes; the default is the shape of SmolLM2-135M.
        progress: Told of the stages.

    Returns:
        The document: machine, commit, and a row per method (`dense`, `dsmoe`,
        `hard-skip-<active>`) with its time, its active fraction and, where memory was measured,
        `peak_bytes` above the process without a model and its `memory_ratio` to the dense step.

    Raises:
        InputError: If the models do not fit into memory.
        RunError: If a method is wrong, or the process that measures memory fails; nothing is
            reported then.
    """
    require_memory(train_bench_cost(config)["memory_bytes"], "the training of all models")
    use_threads(config.threads)
    names = _names(config)
    with (progress or SILENT).stage(
        "bench train", 1 + len(names) * config.memory, "steps"
    ) as stage:
        models = {name: _build(name, config) for name in names}
        active = {name: _active(models[name], config) for name in names}
        _, rows = time_cell(_methods(models, config), _DTYPE, seconds=config.seconds)
        models.clear()
        stage.advance()
        for row in rows:
            row["active"] = active[row["method"]]
            if config.memory:
                row["peak_bytes"] = _peak_bytes_of_process(row["method"], config)
                row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
                stage.advance()
    cell = {
        "shape": f"{config.num_layers}x{config.dim}x{config.width}",
        "experts": config.num_experts,
        "tokens": config.num_tokens,
        "trains": config.trains,
        "dtype": _DTYPE,
        "rows": rows,
    }
    return document("train", config, [cell], dtype=_DTYPE)


def _names(config: TrainBenchConfig) -> list[str]:
    """The dense step comes first."""
    return [DENSE, DSMOE, *(f"{HARD_SKIP}{fraction}" for fraction in config.active)]


def _methods(models: dict[str, PreTrainedModel], config: TrainBenchConfig) -> Methods:
    """Put every step beside the logits that its model must give."""
    dense_SV = _logits(models[DENSE], config)
    found = Methods()
    for name, model in models.items():
        expected_SV, checked = dense_SV, partial(_logits, model, config)
        if name == DSMOE:
            checked = partial(_all_gates_on_logits, model, config)
        elif name != DENSE:
            expected_SV = _logits(_faithful(model), config)
        found.running[name] = Method([_stepper(model, config)], expected_SV, checked)
    return found


def _logits(model: Any, config: TrainBenchConfig) -> Tensor:
    """Logits [S, V] of the training forward."""
    with torch.no_grad():
        logits_SV: Tensor = model(_ids(config)).logits[0]
    return logits_SV


def _all_gates_on_logits(model: PreTrainedModel, config: TrainBenchConfig) -> Tensor:
    """Logits with every gate on at one half, made up for by twice the down weights."""
    twin = copy.deepcopy(model)
    for layer, router in _routers(twin):
        router.threshold = 0.0
        assert layer.experts is not None
        with torch.no_grad():
            router.weight.zero_()
            layer.experts.weights().down.mul_(2.0)
    return _logits(twin, config)


def _faithful(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model that skips into one that computes every expert, in the plain way."""
    twin = copy.deepcopy(model)
    for layer, router in _routers(twin):
        router.config = dataclasses.replace(router.config, estimator="straight-through")
        assert layer.experts is not None
        layer.experts.backend = "reference"
    return twin


def _routers(model: PreTrainedModel) -> Iterator[tuple[MoELayer, SigmoidThreshold]]:
    for layer in moe_layers(model):
        assert isinstance(layer.router, SigmoidThreshold)
        yield layer, layer.router


def _llama(config: TrainBenchConfig) -> LlamaConfig:
    heads = config.num_heads
    return LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if heads % 3 else heads // 3,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.num_tokens,
        tie_word_embeddings=True,
    )


def _build(name: str, config: TrainBenchConfig) -> PreTrainedModel:
    """Build a model with random weights; one that skips has its thresholds at its fraction."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(_llama(config))
    if name != DENSE:
        model = _cut(model, config, "hard-skip" if name != DSMOE else "straight-through")
    if name.startswith(HARD_SKIP):
        _set_active(model, config, float(name.removeprefix(HARD_SKIP)))
    if config.trains == "routers":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(".router." in parameter_name)
    built: PreTrainedModel = model.train()
    return built


def _cut(dense: PreTrainedModel, config: TrainBenchConfig, estimator: str) -> PreTrainedModel:
    """Make a mosaic of a dense model."""
    layer = LayerConfig(
        num_experts=config.num_experts,
        width=config.width // config.num_experts,
        router="sigmoid-threshold",
        router_options={"estimator": estimator},
    )
    losses = {"sparsity": {"coef": 1e-3}}
    row = ARCHITECTURES["llama"]
    model = fresh_mixture(dense.config, [layer] * config.num_layers, losses)
    model.load_state_dict(dense.state_dict(), strict=False)
    for moe, parent in zip(moe_layers(model), decoder_layers(dense), strict=True):
        fill_experts(moe, read_ffn(parent, row, dense.config.hidden_act))
    return model


def _ids(config: TrainBenchConfig) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (1, config.num_tokens), generator=draw)


def _set_active(model: PreTrainedModel, config: TrainBenchConfig, fraction: float) -> None:
    """Put the threshold of each layer where this fraction of its gates is on."""

    def settle(router: SigmoidThreshold, args: tuple[Tensor]) -> None:
        gates_TE = (args[0] @ router.weight.T).sigmoid()
        router.threshold = gates_TE.float().flatten().quantile(1 - fraction).item()

    # Layer after layer in one pass: what a layer sees depends on the thresholds before it.
    routers = [router for layer in moe_layers(model) for router in layer.routers()]
    handles = [router.register_forward_pre_hook(settle) for router in routers]
    with hooked(handles), torch.no_grad():
        model(_ids(config))


def _active(model: PreTrainedModel, config: TrainBenchConfig) -> float:
    """The fraction of gates that are on."""
    if not moe_layers(model):
        return 1.0
    with torch.no_grad(), record_routing(model) as routings:
        model(_ids(config))
    return statistics.mean(r.active_TE().float().mean().item() for r in routings)


def _stepper(model: PreTrainedModel, config: TrainBenchConfig) -> Callable[[], object]:
    """One training step as a callable."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # So slow that the active fraction stays where it is.
    optimizer = torch.optim.AdamW(parameters, lr=1e-7) if parameters else None
    ids_BS = _ids(config)

    def step() -> None:
        embeds_BSD = model.get_input_embeddings()(ids_BS)
        if config.trains == "routers":
            # The frozen dense model, too, passes its gradient through every layer.
            embeds_BSD.requires_grad_()
        model(inputs_embeds=embeds_BSD, labels=ids_BS).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _peak_bytes_of_process(name: str, config: TrainBenchConfig) -> int:
    """Measure in a fresh process: the peak of this one cannot be taken back."""
    code = (
        "import sys; from moesaic.evaluation.bench import train; train._print_peak(*sys.argv[1:])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, name, json.dumps(asdict(config))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(
            f"the process that measures the memory of {name} failed with code {run.returncode} "
            f"({last}); lower num_tokens or num_layers, or set memory to false"
        )
    return int(run.stdout.strip().splitlines()[-1])


def _print_peak(name: str, values: str) -> None:
    fields = json.loads(values)
    config = TrainBenchConfig(**{**fields, "active": tuple(fields["active"])})
    before = psutil.Process().memory_info().rss
    step = _stepper(_build(name, config), config)
    # The first step makes the state of the optimiser; the second has all of it.
    for _ in range(2):
        step()
    print(peak_bytes() - before)  # noqa: T201
