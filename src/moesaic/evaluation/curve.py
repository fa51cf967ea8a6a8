"""Quality against compute from one checkpoint: the threshold of its gates is moved.

Source of the threshold: DSMoE, arXiv 2502.12455, section 3.2; moving it after training is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import Progress
from moesaic.data import TokenBlocks
from moesaic.evaluation.intervals import BlockLosses, perplexity_ratio
from moesaic.evaluation.perplexity import QualityConfig, evaluate_perplexity
from moesaic.nn.layer import moe_layers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold


def threshold_routers(model: nn.Module) -> list[SigmoidThreshold]:
    """The routers of a model whose operating point can be moved."""
    return [
        layer.router for layer in moe_layers(model) if isinstance(layer.router, SigmoidThreshold)
    ]


@contextmanager
def threshold_at(model: nn.Module, threshold: float) -> Iterator[None]:
    """Set the threshold of every sigmoid gate while it lasts; each gets its own back.

    Raises:
        InputError: If the threshold is out of range, or no router has one.
    """
    check_threshold(threshold)
    routers = threshold_routers(model)
    if not routers:
        raise InputError(
            "no router of this model is a sigmoid-threshold, so it has no threshold to move; "
            "convert with that router"
        )
    before = [router.threshold for router in routers]
    try:
        for router in routers:
            router.threshold = threshold
        yield
    finally:
        for router, value in zip(routers, before, strict=True):
            router.threshold = value


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that no sigmoid can be on both sides of."""
    if not 0.0 <= threshold < 1.0:
        raise InputError(f"threshold must be in [0, 1), got {threshold}; 0.5 is the paper's")


def threshold_curve(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    dense: BlockLosses,
    thresholds: Sequence[float],
    config: QualityConfig,
    progress: Progress | None = None,
    *,
    block_N: NDArray[Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure the model at each threshold.

    Args:
        model: With sigmoid-threshold routers; unchanged afterwards.
        blocks: Held-out text.
        dense: What the dense parent lost on these blocks, or on more of them.
        thresholds: In [0, 1); higher is cheaper.
        config: Settings.
        progress: Told of every batch.
        block_N: Numbers of the blocks to read; all if none.

    Returns:
        The `curve` section of the evaluation record, in order of thresholds.
    """
    points = []
    for threshold in sorted(thresholds):
        with threshold_at(model, threshold):
            result = evaluate_perplexity(
                model,
                blocks,
                config,
                progress,
                block_N=block_N,
                name=f"threshold {threshold:g}",
            )
        assert result.activation is not None
        ratio = perplexity_ratio(
            result.losses, dense.at(result.losses.block_N), config.resamples, config.seed
        )
        points.append(
            {
                "threshold": threshold,
                "active_ffn_fraction": result.activation.mean(),
                "ratio": ratio.value,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "domains": {name: q.perplexity.value for name, q in result.domains.items()},
            }
        )
    return points
