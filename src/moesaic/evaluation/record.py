"""The evaluation record: every model beside its dense parent, measured in one run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.data import TokenBlocks, tokenizer_fingerprint
from moesaic.evaluation.cost import model_cost
from moesaic.evaluation.curve import threshold_curve
from moesaic.evaluation.intervals import BlockLosses, Estimate, perplexity_ratio
from moesaic.evaluation.machine import machine_info
from moesaic.evaluation.perplexity import (
    QualityConfig,
    QualityResult,
    choose_blocks,
    evaluate_perplexity,
)
from moesaic.evaluation.samples import coloured_tokens, generate_text
from moesaic.evaluation.speed import SpeedConfig, check_speed, measure_speed
from moesaic.nn.layer import moe_layers
from moesaic.nn.operating_point import check_threshold, threshold_routers

SCHEMA = 1
# The kinds of the parent and the baselines, beside which the main model is read.
NOT_MAIN = ("dense", "static-pruning", "activation-sparsity")

logger = logging.getLogger(__name__)


class Subject(NamedTuple):
    """A model to evaluate.

    Attributes:
        model: In memory.
        kind: `dense` for the parent, `static-pruning` or `activation-sparsity` for a baseline, else
            what made it: `dsmoe`.
        path: Where it came from.
    """

    model: PreTrainedModel
    kind: str
    path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation.

    Attributes:
        blocks_per_domain: At most so many blocks of each domain are read by each model.
        quality: How they are read.
        thresholds: Points of the curve of quality against compute; empty for no curve.
        curve_blocks_per_domain: Blocks of each domain that are read at each point, of those above.
        measure_speed: Whether speed is measured.
        speed: How.
        examples_per_domain: Texts shown coloured by activity.
        example_tokens: Their length.
        prompts: Continued by every model.
        generate_tokens: By at most so many tokens.
        seed: Of the choice of blocks.
    """

    blocks_per_domain: int = 16
    quality: QualityConfig = field(default_factory=QualityConfig)
    thresholds: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8)
    curve_blocks_per_domain: int = 4
    measure_speed: bool = True
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    examples_per_domain: int = 1
    example_tokens: int = 96
    prompts: tuple[str, ...] = (
        "A mixture of experts is",
        "The list of prime numbers begins with",
        "def fibonacci(n):\n",
    )
    generate_tokens: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("blocks_per_domain", "curve_blocks_per_domain"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        for name in ("examples_per_domain", "generate_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}; raise it")
        if self.example_tokens < 1:
            raise InputError(f"example_tokens must be at least 1, got {self.example_tokens}")
        for threshold in self.thresholds:
            check_threshold(threshold)
        if not all(self.prompts):
            raise InputError("prompts must not be empty texts; remove the empty one")


def evaluate(
    models: Mapping[str, Subject],
    blocks: TokenBlocks,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig | None = None,
    progress: Progress | None = None,
    *,
    training: Sequence[Mapping[str, Any]] = (),
    manifest: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure quality, cost and speed of models beside their dense parent.

    The first model that is neither the parent nor a baseline is the one whose curve,
    activation and examples are recorded.

    Args:
        models: By name, one of them of kind `dense`; all in memory, on one device.
        blocks: Held-out text, packed with the tokenizer of the models.
        tokenizer: Of all the models.
        config: Settings.
        progress: Told of every stage.
        training: Metrics of the training of the main model, passed on.
        manifest: Of the main model, passed on.

    Returns:
        The evaluation record, plain data.

    Raises:
        InputError: If there is not exactly one dense parent, or a model cannot read the text.
        RunError: If a model gives values that are not finite.
    """
    config = config or EvaluationConfig()
    progress = progress or SILENT
    parent = _dense_parent(models)
    plain_models = {name: subject.model for name, subject in models.items()}
    if config.measure_speed:
        check_speed(plain_models, config.speed)
    if blocks.tokenizer and blocks.tokenizer != tokenizer_fingerprint(tokenizer):
        logger.warning(
            "the text was packed with another tokenizer than the one given, so examples and "
            "generated text may be garbled; give the tokenizer of the models"
        )
    block_N = choose_blocks(blocks, config.blocks_per_domain, config.seed)
    qualities = {
        name: evaluate_perplexity(
            models[name].model, blocks, config.quality, progress, block_N=block_N, name=name
        )
        for name in [parent, *(name for name in models if name != parent)]
    }
    for name, domain in qualities[parent].domains.items():
        if domain.documents < 2:
            logger.warning(
                "all evaluated text of domain %s is from one document, so its interval is over "
                "blocks and too narrow; evaluate on more documents",
                name,
            )
    dense_model = models[parent].model
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_info(
            str(dense_model.dtype).removeprefix("torch."), str(dense_model.device)
        ),
        "config": to_plain(config),
        "data": _data(blocks, qualities[parent]),
        "models": [
            {
                "name": name,
                "kind": subject.kind,
                "path": subject.path,
                "quality": quality_section(
                    qualities[name], qualities[parent].losses, config.quality
                ),
                "cost": cost_section(subject.model, qualities[name], blocks.block),
            }
            for name, subject in models.items()
        ],
        "curve": [],
        "activation": {},
        "examples": [],
    }
    if config.measure_speed:
        prompt_ids = blocks.ids_NS[block_N].reshape(-1)
        speeds = measure_speed(plain_models, config.speed, progress, prompt_ids=prompt_ids)
        for entry in record["models"]:
            entry["speed"] = asdict(speeds.models[entry["name"]])
            if entry["name"] in speeds.engine:
                entry["engine_speed"] = asdict(speeds.engine[entry["name"]])
    main = next((n for n, s in models.items() if s.kind not in NOT_MAIN), None)
    if main is not None:
        model, activation = models[main].model, qualities[main].activation
        if config.thresholds and threshold_routers(model):
            record["curve"] = threshold_curve(
                model,
                blocks,
                qualities[parent].losses,
                config.thresholds,
                config.quality,
                progress,
                block_N=choose_blocks(
                    blocks,
                    min(config.curve_blocks_per_domain, config.blocks_per_domain),
                    config.seed,
                ),
            )
        if activation is not None:
            record["activation"] = activation.to_plain()
            record["examples"] = _examples(model, blocks, block_N, tokenizer, config, progress)
    record["generations"] = _generations(plain_models, tokenizer, config, progress)
    record["training"] = [dict(entry) for entry in training]
    record["manifest"] = dict(manifest or {})
    return record


def _dense_parent(models: Mapping[str, Subject]) -> str:
    """Name of the one model beside which the others are read."""
    parents = [name for name, subject in models.items() if subject.kind == "dense"]
    if len(parents) != 1:
        raise InputError(
            f"an evaluation needs exactly 1 model of kind 'dense', got {len(parents)} among "
            f"{len(models)}; give the parent that the others come from"
        )
    return parents[0]


def _data(blocks: TokenBlocks, quality: QualityResult) -> dict[str, Any]:
    """What was read, and where it is from."""
    losses, length = quality.losses, blocks.block
    domains = {}
    for index, name in losses.present():
        domains[name] = {
            "tokens": int((losses.domain_N == index).sum()) * length,
            "documents": quality.domains[name].documents,
            "sources": [asdict(p) for p in blocks.provenance if p.domain == name],
        }
    return {"domains": domains, "block": length, "sha256": losses.text}


def quality_section(
    quality: QualityResult, dense: BlockLosses, config: QualityConfig
) -> dict[str, Any]:
    """Give the `quality` section of a model, beside what its dense parent lost on the same text."""
    ratio = perplexity_ratio(quality.losses, dense, config.resamples, config.seed)
    return {
        "domains": {
            name: {
                **_estimate("perplexity", domain.perplexity, "low", "high"),
                "tokens": domain.tokens,
                "documents": domain.documents,
            }
            for name, domain in quality.domains.items()
        },
        **_estimate("ratio", ratio, "ratio_low", "ratio_high"),
    }


def _estimate(name: str, estimate: Estimate, low: str, high: str) -> dict[str, float]:
    return {name: estimate.value, low: estimate.low, high: estimate.high}


def cost_section(model: PreTrainedModel, quality: QualityResult, context: int) -> dict[str, Any]:
    """Give the `cost` section of a model, at the activity that was measured with its quality."""
    active = None if quality.activation is None else quality.activation.mean_per_layer()
    return model_cost(model, active, context=context).to_plain()


def _examples(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    block_N: NDArray[np.int64],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The first tokens of some blocks of each domain, with what each used."""
    if all(layer.router is None for layer in moe_layers(model)):
        return []
    chosen = [
        (index, number)
        for index in np.unique(blocks.domain_N[block_N])
        for number in block_N[blocks.domain_N[block_N] == index][: config.examples_per_domain]
    ]
    examples = []
    with progress.stage("examples", len(chosen), "texts") as stage:
        for index, number in chosen:
            ids_S = blocks.ids_NS[number, : config.example_tokens]
            tokens = coloured_tokens(model, tokenizer, ids_S)
            examples.append({"domain": blocks.domains[index], "tokens": tokens})
            stage.advance()
    return examples


def _generations(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    progress: Progress,
) -> list[dict[str, Any]]:
    if not config.generate_tokens:
        return []
    generations = []
    with progress.stage("generation", len(config.prompts), "prompts") as stage:
        for prompt in config.prompts:
            texts = generate_text(models, tokenizer, prompt, config.generate_tokens)
            generations.append({"prompt": prompt, "texts": texts})
            stage.advance()
    return generations
