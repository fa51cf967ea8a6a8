"""`moesaic.export`: fix the number of blocks where the target needs it, write, verify, record.

What it costs is measured on held-out text, when there is some: the dense parent, the checkpoint
with its own number of blocks for every token, the same with a fixed number, that after a training
to recover, and once more after the weights were rounded to what the format stores.

Shapes: N blocks of S tokens.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError, MoesaicError
from moesaic._files import atomic_directory, require_space
from moesaic._progress import SILENT, Progress
from moesaic.conversion.fix_k import FixK, fix_k
from moesaic.data import TokenBlocks
from moesaic.evaluation import QualityConfig, choose_blocks, evaluate_perplexity, perplexity_ratio
from moesaic.evaluation.intervals import BlockLosses
from moesaic.models.checkpoint import (
    add_step,
    load,
    load_parent,
    load_tokenizer,
    read_config,
    verify_files,
    write_manifest,
)
from moesaic.models.export._base import Format, FormatConfig
from moesaic.models.export._obstacles import THRESHOLD, read_layers
from moesaic.models.export.check import check_model, make_format
from moesaic.models.export.verify import verify
from moesaic.training import TrainConfig, train

logger = logging.getLogger(__name__)

_PROMPTS = 20
_PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Settings of an export.

    Attributes:
        weights: How weights are stored; see `FormatConfig`.
        fix_k: How a number of blocks for every token is chosen, where the format needs one.
        calibration_tokens: Training text that is read to choose it.
        recovery_tokens: Training text on which the model of a fixed number of blocks is then
            trained to give the dense parent's logits, routers left alone; 0 for none.
        recovery_rate: Peak learning rate of that.
        blocks_per_domain: Held-out blocks of each domain that the loss is measured on.
        quality: How they are read.
        seed: Of their choice.
    """

    weights: str = "auto"
    fix_k: FixK = field(default_factory=FixK)
    calibration_tokens: int = 16_384
    recovery_tokens: int = 0
    recovery_rate: float = 1e-4
    blocks_per_domain: int = 8
    quality: QualityConfig = field(default_factory=QualityConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, usual in (("calibration_tokens", 16_384), ("blocks_per_domain", 8)):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} must be at least 1, got {getattr(self, name)}; {usual} is usual"
                )
        if self.recovery_tokens < 0 or not self.recovery_rate > 0:
            raise InputError(
                "recovery_tokens must be at least 0 and recovery_rate above 0, got "
                f"{self.recovery_tokens} and {self.recovery_rate}"
            )


def plan_export(model: str | Path, format: str, config: ExportConfig) -> tuple[Format, bool]:
    """Check an export before anything expensive.

    Args:
        model: A converted checkpoint.
        format: Name of a registered format.
        config: Settings.

    Returns:
        The format, and whether the number of blocks has to be fixed, which takes text.

    Raises:
        InputError: If the format cannot hold the model; says which can.
    """
    made = make_format(format, FormatConfig(weights=config.weights))
    found = read_config(str(model))
    check_model(made, found)
    routers = {layer.router for layer in read_layers(found)}
    fixes = made.layout is not None and THRESHOLD in routers
    if config.recovery_tokens and not fixes:
        raise InputError(
            f"recovery_tokens must be 0 for {format}, got {config.recovery_tokens}: no number of "
            "blocks is fixed here, so nothing is lost that training could recover"
        )
    return made, fixes


def check_output(output: Path) -> None:
    """Refuse to write over what is there."""
    if output.exists():
        raise InputError(f"out {output} exists; delete it or choose another")


def export(
    model: str | Path,
    output: str | Path,
    format: str,
    config: ExportConfig | None = None,
    *,
    text: TokenBlocks | None = None,
    heldout: TokenBlocks | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Write a converted checkpoint in the form of other software, and check what was written.

    Args:
        model: A converted checkpoint; it stays as it is.
        output: Directory to write, which must not exist.
        format: Name of a registered format; `moesaic ls formats` lists them.
        config: Settings.
        text: Training text, packed with the tokenizer of the model, to choose a fixed number of
            blocks on.
        heldout: Text to measure the loss on; none measures nothing.
        progress: Told of every stage.

    Returns:
        What was decided, verified and lost, as the manifest of the output holds it.

    Raises:
        InputError: If the format cannot hold the model, or text is missing.
        RunError: If what was written is not the model; nothing is left then.
    """
    config = config or ExportConfig()
    output = Path(output)
    made, fixes = plan_export(model, format, config)
    check_output(output)
    if fixes and text is None:
        raise InputError(
            f"{format} needs the same number of blocks for every token, which is chosen on text; "
            "give text, or export remote-code"
        )
    manifest = verify_files(Path(model))
    tokenizer = load_tokenizer(str(model)) if _has_tokenizer(Path(model)) else None
    if tokenizer is not None and (found := made.tokenizer_obstacle(tokenizer)):
        raise InputError(f"{format} cannot hold {found}; glm4_moe takes any tokenizer")
    dtype = torch.float32
    stored = getattr(read_config(str(model)), "dtype", None)
    if isinstance(stored, torch.dtype):
        dtype = stored
    loaded = load(model, dtype="float32", verify=False)
    require_space(output.parent, loaded.get_memory_footprint(), what="the export")
    losses: dict[str, BlockLosses] = {}
    block_N = None
    if heldout is not None:
        block_N = choose_blocks(heldout, config.blocks_per_domain, config.seed)

    def measure(name: str, subject: PreTrainedModel = loaded) -> None:
        if heldout is not None:
            losses[name] = evaluate_perplexity(
                subject, heldout, config.quality, progress, block_N=block_N, name=name
            ).losses

    recovers = config.recovery_tokens > 0
    parent: PreTrainedModel | None = None
    if heldout is not None or recovers:
        parent = _parent(manifest, dtype, needed=recovers)
    if parent is not None:
        measure("dense", parent)
    if not recovers:
        # Its memory is wanted by the others.
        parent = None
    measure("variable" if fixes else "checkpoint")
    results: dict[str, Any] = {"format": format}
    if fixes:
        assert text is not None
        assert made.layout is not None
        ids_NS = _drawn(text, config.calibration_tokens)
        _, decided = fix_k(loaded, ids_NS, made.layout, config.fix_k, progress)
        results |= decided
        measure("fixed")
        if parent is not None:
            results["recovery"] = _recover(loaded, parent, text, config, output.parent, progress)
            measure("recovered")
    if made.round(loaded, dtype):
        measure("exported")
    with atomic_directory(output) as temporary:
        made.write(loaded, tokenizer, temporary, dtype)
        prompts_BS = _prompts(heldout if heldout is not None else text, loaded)
        results |= to_plain(verify(made.read(temporary), loaded, prompts_BS))
        if losses:
            results["quality"] = _quality(losses, config.quality)
        settings = {"format": format, **to_plain(config)}
        write_manifest(temporary, add_step(manifest, f"export {format}", settings, results))
    return results


def _parent(
    manifest: dict[str, Any], dtype: torch.dtype, *, needed: bool
) -> PreTrainedModel | None:
    """The dense parent in float32; none, and a word why, where it is no longer what it was."""
    try:
        parent: Any = load_parent(manifest, dtype=str(dtype).removeprefix("torch."))
    except MoesaicError as error:
        if needed:
            raise
        logger.warning("what was lost against the dense parent is not measured: %s", error)
        return None
    whole: PreTrainedModel = parent.float()
    return whole


def _recover(
    model: PreTrainedModel,
    parent: PreTrainedModel,
    text: TokenBlocks,
    config: ExportConfig,
    near: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train a model of a fixed number of blocks, in place, to give its parent's logits.

    Routers keep their rows: some are scaled so far down that a usual step would undo their order.

    Args:
        model: In float32.
        parent: In float32; it is frozen.
        text: Training text.
        config: Settings.
        near: Directory on the disk that holds what the training writes meanwhile.
        progress: Told of every token.

    Returns:
        Steps, tokens, and the loss of the first and the last step.
    """
    settings = TrainConfig(
        tokens=config.recovery_tokens,
        trains="ffn",
        learning_rate=config.recovery_rate,
        router_learning_rate=0.0,
        active=0.0,
        seed=config.seed,
    )
    with tempfile.TemporaryDirectory(dir=near) as directory:
        _, found = train(model, text, settings, Path(directory), progress, teacher=parent)
    first, last = found["log"][0]["loss"], found["log"][-1]["loss"]
    return {
        "steps": found["steps"],
        "tokens": found["tokens"],
        "first_loss": first,
        "last_loss": last,
    }


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()


def _drawn(text: TokenBlocks, tokens: int) -> Tensor:
    num_blocks = min(len(text), max(1, tokens // text.block))
    return torch.from_numpy(text.take(num_blocks).ids_NS).long()


def _prompts(text: TokenBlocks | None, model: PreTrainedModel) -> Tensor:
    """The beginnings of blocks, [B, S]; random tokens where there is no text."""
    if text is None:
        draw = torch.Generator().manual_seed(0)
        vocabulary = int(model.config.vocab_size)
        return torch.randint(vocabulary, (_PROMPTS, _PROMPT_TOKENS), generator=draw)
    length = min(_PROMPT_TOKENS, text.block)
    # A block gives more than one where there are few.
    pieces_BS = torch.from_numpy(text.ids_NS).long().unfold(1, length, length).flatten(0, 1)
    step = max(1, len(pieces_BS) // _PROMPTS)
    return pieces_BS[::step][:_PROMPTS]


def _quality(losses: dict[str, BlockLosses], config: QualityConfig) -> dict[str, Any]:
    """Perplexity of every stage, and its ratio to the stages before it."""
    record: dict[str, Any] = {}
    for name, found in losses.items():
        nll, tokens = float(found.nll_N.sum()), int(found.tokens_N.sum())
        record[name] = {
            "perplexity": float(torch.tensor(nll / tokens, dtype=torch.float64).exp()),
            "ratio": {
                other: to_plain(
                    perplexity_ratio(found, losses[other], config.resamples, config.seed)
                )
                for other in losses
                if other != name and list(losses).index(other) < list(losses).index(name)
            },
        }
    return record
