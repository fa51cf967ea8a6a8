"""Time and memory of a training step beside the dense step: the paper's way, and with skipping.

A step is forward, backward and AdamW of a Llama model with random weights; the dense one is that
of transformers. Steps are timed in turns, so that a machine shared with others slows all of them;
memory is the growth of a fresh process for each model.

Shapes: S tokens of the one sequence, E experts.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic.evaluation.machine import machine_info
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.modeling import moesaic_classes
from moesaic.nn.layer import moe_layers, record_routing
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold


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
        repeats: Timed steps of each model.
        warmup: Untimed steps of each model before.
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
    repeats: int = 5
    warmup: int = 1
    memory: bool = True

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.width % self.num_experts:
            raise InputError(
                f"num_experts must divide width={self.width}, got {self.num_experts}; choose a "
                "divisor"
            )
        for name in ("num_layers", "num_tokens", "repeats", "warmup"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for fraction in self.active:
            if not 0.0 < fraction < 1.0:
                raise InputError(f"active must be in (0, 1), got {fraction}; 0.5 is usual")


def train(config: TrainBenchConfig | None = None) -> dict[str, Any]:
    """Measure a training step: dense, DSMoE as published, and `hard-skip`.

    Args:
        config: Sizes; the default is the shape of SmolLM2-135M.

    Returns:
        `config`, `machine` and `cases`: by name (`dense`, `dsmoe`, `hard-skip-<active>`) the
        median and quartiles of the seconds of a step, the median and quartiles of its ratio to
        the dense step of the same round, the active fraction, and, where memory was measured,
        `peak_bytes` above the process without a model and its ratio.

    Raises:
        RunError: If the process that measures memory fails.
    """
    config = TrainBenchConfig() if config is None else config
    names = ["dense", "dsmoe", *(f"hard-skip-{fraction}" for fraction in config.active)]
    models = {name: _build(name, config) for name in names}
    seconds = in_turns(
        {name: _stepper(model, config) for name, model in models.items()},
        repeats=config.repeats,
        warmup=config.warmup,
    )
    cases: dict[str, Any] = {}
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds["dense"], strict=True)]
        cases[name] = {
            "step_s": _quartiles(seconds[name]),
            "time_ratio": _quartiles(ratios),
            "active": 1.0 if name == "dense" else _active(models[name], config),
        }
    models.clear()
    if config.memory:
        for name in names:
            cases[name]["peak_bytes"] = _peak_bytes_of_process(name, config)
            ratio = cases[name]["peak_bytes"] / cases["dense"]["peak_bytes"]
            cases[name]["memory_ratio"] = ratio
    return {"config": asdict(config), "machine": machine_info(), "cases": cases}


def in_turns(
    steps: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Time callables round by round; gives the seconds of each, by name."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": median, "low": low, "high": high}


def _build(name: str, config: TrainBenchConfig) -> PreTrainedModel:
    """Build a model with random weights; one that skips has its thresholds at its fraction."""
    torch.manual_seed(0)
    heads = config.num_heads
    dense = LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads if heads % 3 else heads // 3,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.num_tokens,
        tie_word_embeddings=True,
    )
    if name == "dense":
        model: Any = LlamaForCausalLM(dense)
    else:
        skips = name.startswith("hard-skip")
        layer = {
            "num_experts": config.num_experts,
            "width": config.width // config.num_experts,
            "router": "sigmoid-threshold",
            "router_options": {"estimator": "hard-skip" if skips else "straight-through"},
        }
        losses = {"sparsity": {"coef": 1e-3}}
        values = {k: v for k, v in dense.to_dict().items() if k != "model_type"}
        values["moesaic"] = {"layers": [layer] * config.num_layers, "losses": losses}
        config_class, model_class = moesaic_classes(ARCHITECTURES["llama"])
        model = model_class(config_class(**values))
        if skips:
            _set_active(model, config, float(name.removeprefix("hard-skip-")))
    if config.trains == "routers":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(".router." in parameter_name)
    built: PreTrainedModel = model.train()
    return built


def _ids(config: TrainBenchConfig) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (1, config.num_tokens), generator=draw)


def _set_active(model: PreTrainedModel, config: TrainBenchConfig, fraction: float) -> None:
    """Put the threshold of each layer where this fraction of its gates is on."""

    def settle(router: SigmoidThreshold, args: tuple[Tensor]) -> None:
        gates_TE = (args[0] @ router.weight.T).sigmoid()
        router.threshold = gates_TE.float().flatten().quantile(1 - fraction).item()

    # Layer after layer in one pass: what a layer sees depends on the thresholds before it.
    handles = [layer.router.register_forward_pre_hook(settle) for layer in moe_layers(model)]  # type: ignore[union-attr]
    with torch.no_grad():
        model(_ids(config))
    for handle in handles:
        handle.remove()


def _active(model: PreTrainedModel, config: TrainBenchConfig) -> float:
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
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)  # noqa: T201
