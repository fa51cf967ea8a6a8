"""Quality against compute from one checkpoint: the threshold of its gates is moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedModel

from moesaic._progress import Progress
from moesaic.data import TokenBlocks
from moesaic.evaluation.intervals import BlockLosses, perplexity_ratio
from moesaic.evaluation.perplexity import QualityConfig, evaluate_perplexity
from moesaic.nn.operating_point import threshold_at


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
