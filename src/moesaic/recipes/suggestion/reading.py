"""What a trial loses, on text that no trial was calibrated on: no more of it than it takes.

Ratios of perplexities near one settle on a few blocks; those of a broken model differ from
document to document. So every trial reads a few blocks of each domain, and as many again as before
while its interval is wide.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.data import TokenBlocks
from moesaic.evaluation import Estimate, QualityConfig, evaluate_perplexity, perplexity_ratio
from moesaic.evaluation.intervals import BlockLosses

# An interval this narrow is not read further; the high end over the low one.
_NARROW = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """How much work the trials are.

    Attributes:
        first_blocks: Blocks of each domain that every trial reads.
        most_blocks: Blocks of each domain that it reads at most, where the interval stays wide.
        fit_steps: Steps of the fit of each DSMoE router.
        fit_tokens: Calibration tokens of that fit, and of Wanda.
        sample_tokens: Calibration tokens of TEAL.
    """

    first_blocks: int = 2
    most_blocks: int = 12
    fit_steps: int = 20
    fit_tokens: int = 4096
    sample_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("first_blocks", "fit_steps", "fit_tokens", "sample_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.most_blocks < self.first_blocks:
            raise InputError(
                f"most_blocks must be at least first_blocks={self.first_blocks}, got "
                f"{self.most_blocks}; raise it"
            )


class Lost(NamedTuple):
    """What a trial lost.

    Attributes:
        ratio: Perplexity over the dense parent's.
        blocks: That it read.
        active: The measured active fraction; none if the model's layers do not tell.
    """

    ratio: Estimate
    blocks: int
    active: float | None


class Reading:
    """Text that trials are measured on, with what their dense parent loses on it.

    Args:
        dense: The parent.
        text: The training text.
        num_calibrated: Blocks that calibration drew from it.
        seed: Of that draw.
        config: How much is read.
        progress: Told of every batch.

    Raises:
        InputError: If calibration left no block.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        text: TokenBlocks,
        num_calibrated: int,
        seed: int,
        config: TrialConfig,
        progress: Progress = SILENT,
    ) -> None:
        self._text = text.take(len(text), seed=seed)
        self._quality = QualityConfig()
        self._progress = progress
        self._rounds = unseen_blocks(self._text, num_calibrated, config)
        blocks = np.concatenate(self._rounds)
        self._dense = evaluate_perplexity(
            dense, self._text, self._quality, progress, block_N=blocks, name="dense"
        ).losses

    def measure(self, model: PreTrainedModel, name: str, *, once: bool = False) -> Lost:
        """Read the text with a trial.

        Args:
            model: The trial, in place.
            name: For progress and messages.
            once: Whether to read no more than the first blocks, however wide the interval.
        """
        losses: BlockLosses | None = None
        used, read = 0.0, 0
        tells = True
        for block_N in self._rounds:
            result = evaluate_perplexity(
                model, self._text, self._quality, self._progress, block_N=block_N, name=name
            )
            losses = result.losses if losses is None else losses.joined(result.losses)
            if result.activation is None:
                tells = False
            else:
                used += result.activation.mean() * block_N.size
            read += block_N.size
            ratio = perplexity_ratio(
                losses,
                self._dense.at(losses.block_N),
                self._quality.resamples,
                self._quality.seed,
            )
            if once or ratio.high <= _NARROW * ratio.low:
                break
        return Lost(ratio, read, used / read if tells else None)


def unseen_blocks(
    drawn: TokenBlocks, num_calibrated: int, config: TrialConfig
) -> list[NDArray[np.int64]]:
    """Choose blocks that calibration did not see, of documents that it did not see while they last.

    Args:
        drawn: All blocks in the order in which calibration draws them.
        num_calibrated: How many it drew.
        config: How many of each domain are read.

    Returns:
        Numbers of the blocks of each round: every round reads as much as all before it.

    Raises:
        InputError: If calibration drew all blocks.
    """
    seen = set(drawn.document_N[:num_calibrated].tolist())
    chosen: list[list[int]] = []
    for domain in range(len(drawn.domains)):
        turns: Counter[int] = Counter()
        order = []
        for block in range(num_calibrated, len(drawn)):
            if drawn.domain_N[block] == domain:
                document = int(drawn.document_N[block])
                order.append((document in seen, turns[document], block))
                turns[document] += 1
        chosen.append([block for _, _, block in sorted(order)][: config.most_blocks])
    rounds = []
    start, end = 0, config.first_blocks
    while blocks := [block for of_domain in chosen for block in of_domain[start:end]]:
        rounds.append(np.asarray(blocks, np.int64))
        start, end = end, 2 * end
    if not rounds:
        raise InputError(
            f"calibration reads all {len(drawn)} blocks of the text, so none is left to measure "
            "on; lower calibration.tokens or give more text"
        )
    return rounds
