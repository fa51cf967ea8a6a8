"""LLM-Pruner, channel-wise: the channels whose weights the loss feels least go everywhere at once.

Source: LLM-Pruner, arXiv 2305.11627, section 3.2. The group is a channel of the residual stream: a
column of the embedding, an entry of every norm, a column of every matrix that reads the stream, a
row of every one that writes it. Its importance is the gradient's, summed over all of them
(`moesaic.calibration.gradients`). As in the paper's code, what stays keeps its weights: norms then
take the mean over fewer channels. No training follows, where its recipe adapts with LoRA.

`active` is the fraction of channels that stay, so the fraction of the dense feed-forward weights
that a token uses; attention, embeddings and head shrink by it too. At the same `active` this model
is smaller in all than one whose networks alone are pruned: compare it by total active parameters
as well. What is left is an ordinary dense model of transformers.

Shapes: D model width, K channels that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.compression.pruning._base import check_active, check_measured, ranked
from moesaic.models.channels import check_narrowable, keep_channels

_STATISTICS = {
    "first": "gradients.channel_importance_D",
    "second": "gradients.channel_second_D",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMPrunerChannel:
    """Settings of the pruning.

    Attributes:
        active: Fraction of channels to keep, in (0, 1]; it must leave a multiple of the number of
            heads, as the config of Llama demands.
        order: Of the importance: `first` sums |w dL/dw|, `second` the square of w times the mean
            squared gradient.
    """

    active: float = 0.75
    order: Literal["first", "second"] = "first"

    def __post_init__(self) -> None:
        check_active(self.active)

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return ("gradients",)

    def check_model(self, config: Any) -> None:
        """Refuse a model by its config alone, so before any text is read.

        Raises:
            InputError: If its architecture cannot lose channels, or they leave no whole heads.
        """
        check_narrowable(config, by="llm-pruner-channel")
        kept_channels(self.active, config.hidden_size, config.num_attention_heads)


def prune_channels(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: LLMPrunerChannel,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Prune a dense model in place.

    Args:
        model: A dense model whose config has a size of heads beside its width; it is consumed.
        stats: Its calibration with the collector `gradients`.
        config: Settings.
        store: Not used: all that takes time is in the calibration.
        progress: Told when it is done.

    Returns:
        The same model with fewer channels, in evaluation mode, and what came out: the fraction
        `active` that is left and the number of `channels`.

    Raises:
        InputError: Before the model is touched, if its architecture cannot lose channels, or the
            settings do not fit it or the statistics.
    """
    config.check_model(model.config)
    stats = check_measured(model, stats, config.collectors(), by="llm-pruner-channel")
    dim = model.config.hidden_size
    num_kept = kept_channels(config.active, dim, model.config.num_attention_heads)
    score_D = stats.whole()[_STATISTICS[config.order]]
    if score_D.shape != (dim,):
        raise InputError(
            f"{stats.directory} was measured on {score_D.shape[0]} channels, the model has {dim}; "
            "calibrate this model"
        )
    if not bool(score_D.isfinite().all()):
        raise InputError(
            f"the statistics of channels in {stats.directory} have values that are not finite; "
            "calibrate again in float32 or bfloat16"
        )
    with progress.stage("prune", 1, "models") as stage:
        keep_channels(model, ranked(score_D)[:num_kept].sort().values)
        stage.advance()
    return model.eval(), {"active": num_kept / dim, "channels": num_kept}


def kept_channels(active: float, dim: int, num_heads: int) -> int:
    """Number of channels that stay: the fraction asked for, rounded to whole channels.

    Args:
        active: Fraction to keep.
        dim: D.
        num_heads: Heads of attention.

    Raises:
        InputError: If that is no multiple of the heads; names the nearest fractions that are.
    """
    num_kept = round(active * dim)
    below = num_kept - num_kept % num_heads
    if num_kept != below or num_kept == 0:
        near = [f"{n / dim:.6g}" for n in (below, below + num_heads) if 0 < n <= dim]
        raise InputError(
            f"active={active} leaves {num_kept} of {dim} channels, which must be a positive "
            f"multiple of the {num_heads} heads; use {' or '.join(near)}"
        )
    return num_kept
