"""Perplexity of a model on packed text, and how much of the model each domain used.

Shapes: N blocks, B blocks of a batch, S tokens of a block, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic._progress import SILENT, Progress
from moesaic.data import TokenBlocks
from moesaic.evaluation._mode import measuring
from moesaic.evaluation.activity import Activation, ActivityMeter
from moesaic.evaluation.intervals import BlockLosses, DomainQuality, domain_quality
from moesaic.models.ffn import dense_ffn_width

logger = logging.getLogger(__name__)

# Positions whose log-softmax is held at a time, on top of the logits themselves.
_POSITIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """Settings of the measurement of perplexity.

    Attributes:
        batch_blocks: Blocks read at a time. Logits take batch_blocks * S * V * 4 bytes: 0.2 GB
            for 2 blocks of 512 and 49k tokens of vocabulary.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """

    batch_blocks: int = 2
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_blocks < 1:
            raise InputError(
                f"batch_blocks must be at least 1, got {self.batch_blocks}; 2 is usual"
            )
        if self.resamples < 100:
            raise InputError(
                f"resamples must be at least 100 for a 95% interval, got {self.resamples}; "
                "1000 is usual"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityResult:
    """What one reading of the text measured.

    Attributes:
        domains: Perplexity by domain.
        losses: Per block; two of them give a paired ratio (`perplexity_ratio`).
        activation: What was in use; none for a dense model.
    """

    domains: Mapping[str, DomainQuality]
    losses: BlockLosses
    activation: Activation | None


def choose_blocks(blocks: TokenBlocks, per_domain: int, seed: int) -> NDArray[np.int64]:
    """Choose blocks of each domain at random, from as many documents as there are.

    A second block of a document is taken only when every document has given its first, because an
    interval over documents narrows with their number. Fewer blocks are always some of more.

    Args:
        blocks: The text.
        per_domain: At most so many of each domain.
        seed: Of the choice.

    Returns:
        Their numbers, in order.

    Raises:
        InputError: If there is no text or none is asked for.
    """
    if per_domain < 1:
        raise InputError(f"blocks per domain must be at least 1, got {per_domain}; raise it")
    _check_text(blocks)
    present = set(np.unique(blocks.domain_N).tolist())
    absent = [name for i, name in enumerate(blocks.domains) if i not in present]
    if absent:
        logger.warning("no held-out text of domain %s; it is left out", ", ".join(absent))
    chosen: list[int] = []
    for domain in sorted(present):
        of_domain = np.flatnonzero(blocks.domain_N == domain)
        order = np.random.default_rng([seed, domain]).permutation(of_domain)
        taken: Counter[int] = Counter()
        turns = []
        for block in order.tolist():
            document = int(blocks.document_N[block])
            turns.append((taken[document], block))
            taken[document] += 1
        # Sorting is stable: within a turn the order stays random.
        turns.sort(key=lambda turn: turn[0])
        chosen += [block for _, block in turns[:per_domain]]
    return np.sort(np.asarray(chosen, np.int64))


def evaluate_perplexity(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    config: QualityConfig | None = None,
    progress: Progress | None = None,
    *,
    block_N: NDArray[np.int64] | None = None,
    name: str = "model",
) -> QualityResult:
    """Measure perplexity per domain and, in the same reading, how much of the model was in use.

    Every token of a block but its first is predicted, from the tokens before it in the block.
    The loss is taken in float32 whatever the dtype of the model and summed in float64.

    Args:
        model: Dense or converted; its mode and thresholds are as before afterwards.
        blocks: Held-out text.
        config: Settings.
        progress: Told of every batch.
        block_N: Numbers of the blocks to read; all if none.
        name: Of the model, for progress and messages.

    Raises:
        InputError: If there is no text, or the model cannot read it.
        RunError: If a loss is not finite.
    """
    config = config or QualityConfig()
    _check_text(blocks)
    _check_fit(model, blocks)
    if block_N is None:
        block_N = np.arange(len(blocks.ids_NS), dtype=np.int64)
    domain_N = np.asarray(blocks.domain_N, np.int64)[block_N]
    # One domain after the other, so that a batch counts for one.
    order_N = np.argsort(domain_N, kind="stable")
    block_N, domain_N = block_N[order_N], domain_N[order_N]
    meter = ActivityMeter(model, dense_ffn_width(model.config))
    nll_N = np.zeros(block_N.size)
    progress = progress or SILENT
    with measuring(model), progress.stage(f"perplexity of {name}", block_N.size, "blocks") as stage:
        start = 0
        while start < block_N.size:
            end = min(
                start + config.batch_blocks,
                int(np.searchsorted(domain_N, domain_N[start], "right")),
            )
            domain = blocks.domains[domain_N[start]]
            ids_BS = _tensor(blocks.ids_NS[block_N[start:end]], model)
            with meter.reading(domain, ids_BS.numel()):
                nll_N[start:end] = _block_losses(model, ids_BS)
            if not np.isfinite(nll_N[start:end]).all():
                raise RunError(
                    f"the loss of {name} on domain {domain!r} is not finite; load the model in "
                    "float32, or train it again with a lower learning rate"
                )
            stage.advance(end - start)
            start = end
    losses = BlockLosses(
        nll_N=nll_N,
        tokens_N=np.full(block_N.size, blocks.block - 1, np.int64),
        block_N=block_N,
        domain_N=domain_N,
        document_N=np.asarray(blocks.document_N, np.int64)[block_N],
        domains=tuple(blocks.domains),
        text=blocks.fingerprint(),
    )
    return QualityResult(
        domains=domain_quality(losses, config.resamples, config.seed),
        losses=losses,
        activation=meter.result(),
    )


def _tensor(ids_BS: NDArray[Any], model: PreTrainedModel) -> Tensor:
    return torch.from_numpy(ids_BS.astype(np.int64)).to(model.device)


def _block_losses(model: PreTrainedModel, ids_BS: Tensor) -> NDArray[np.float64]:
    """Sum of the losses of each block, [B] float64; its logits live no longer than this call."""
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
    nll_B = torch.zeros(ids_BS.shape[0], dtype=torch.float64)
    length = ids_BS.shape[1]
    for row, (logits_SV, ids_S) in enumerate(zip(logits_BSV, ids_BS, strict=True)):
        for start in range(0, length - 1, _POSITIONS):
            end = min(start + _POSITIONS, length - 1)
            nll_S = nnf.cross_entropy(
                logits_SV[start:end].float(), ids_S[start + 1 : end + 1], reduction="none"
            )
            nll_B[row] += nll_S.double().sum().cpu()
    return nll_B.numpy()


def _check_text(blocks: TokenBlocks) -> None:
    """Refuse text that holds nothing to predict."""
    if blocks.ids_NS.shape[0] == 0:
        raise InputError("the held-out text has 0 blocks, at least 1 is needed; add documents")
    if blocks.block < 2:
        raise InputError(f"blocks must hold at least 2 tokens, got {blocks.block}; 512 is usual")


def _check_fit(model: PreTrainedModel, blocks: TokenBlocks) -> None:
    """Refuse text that the model cannot read, before it reads any."""
    highest, vocabulary = int(blocks.ids_NS.max()), int(model.config.vocab_size)
    if highest >= vocabulary:
        raise InputError(
            f"the text holds token {highest}, the model knows {vocabulary}; pack the text again "
            "with the tokenizer of this model"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    length = blocks.block
    if limit is not None and length > limit:
        raise InputError(
            f"blocks of {length} tokens are longer than the model's {limit} positions; "
            "pack the text in shorter blocks"
        )
