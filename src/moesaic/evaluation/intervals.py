"""Perplexity and its uncertainty, from the loss of every block.

Text within a document is alike, so documents, not tokens, are the sample: the intervals come from
drawing documents with replacement (Efron's percentile bootstrap, Annals of Statistics 7, 1979).
Two models that read the same blocks are drawn with the same documents, which makes the interval of
their ratio far narrower than that of either perplexity.

Shapes: N blocks, U documents, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic._errors import InputError

_PERCENTILES = (2.5, 97.5)
_ARRAYS = ("nll_N", "tokens_N", "block_N", "domain_N", "document_N")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLosses:
    """What a model lost on each block of text.

    Attributes:
        nll_N: Sum of the negative log likelihoods of a block's predicted tokens, float64, nats.
        tokens_N: Predicted tokens of each block.
        block_N: Number of each block in the text that was read, so that results can be matched.
        domain_N: Index of its domain.
        document_N: Document of each block.
        domains: Names of the domains.
        text: Fingerprint of the text the blocks are from.
    """

    nll_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]
    block_N: NDArray[np.int64]
    domain_N: NDArray[np.int64]
    document_N: NDArray[np.int64]
    domains: tuple[str, ...]
    text: str

    def at(self, block_N: NDArray[np.int64]) -> BlockLosses:
        """The losses of some of the blocks, by number.

        Raises:
            InputError: If one of them was not read.
        """
        place = {int(block): i for i, block in enumerate(self.block_N)}
        missing = [int(block) for block in block_N if int(block) not in place]
        if missing:
            raise InputError(
                f"block {missing[0]} of the text was not evaluated; evaluate every model on the "
                "same blocks"
            )
        index_N = np.array([place[int(block)] for block in block_N], np.int64)
        return BlockLosses(
            nll_N=self.nll_N[index_N],
            tokens_N=self.tokens_N[index_N],
            block_N=self.block_N[index_N],
            domain_N=self.domain_N[index_N],
            document_N=self.document_N[index_N],
            domains=self.domains,
            text=self.text,
        )

    def joined(self, other: BlockLosses) -> BlockLosses:
        """These and those of other blocks of the same text."""
        if other.text != self.text:
            raise InputError("losses of two texts cannot be joined; read blocks of one text")
        arrays = {n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in _ARRAYS}
        return BlockLosses(**arrays, domains=self.domains, text=self.text)

    def to_plain(self) -> dict[str, Any]:
        """The losses as plain data, for a record that others are paired with later."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return {**arrays, "domains": list(self.domains), "text": self.text}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> BlockLosses:
        """What `to_plain` gave.

        Raises:
            KeyError: If a field is missing.
        """
        return cls(
            nll_N=np.asarray(plain["nll_N"], np.float64),
            tokens_N=np.asarray(plain["tokens_N"], np.int64),
            block_N=np.asarray(plain["block_N"], np.int64),
            domain_N=np.asarray(plain["domain_N"], np.int64),
            document_N=np.asarray(plain["document_N"], np.int64),
            domains=tuple(plain["domains"]),
            text=plain["text"],
        )

    def present(self) -> Iterator[tuple[int, str]]:
        """Index and name of every domain that has a block."""
        for index in np.unique(self.domain_N):
            yield int(index), self.domains[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainQuality:
    """Perplexity of one domain.

    Attributes:
        perplexity: With its interval.
        tokens: Predicted tokens.
        documents: Documents they are from. The interval is over these; of a single one it is over
            its blocks, and too narrow.
    """

    perplexity: Estimate
    tokens: int
    documents: int


def domain_quality(losses: BlockLosses, resamples: int, seed: int) -> dict[str, DomainQuality]:
    """Perplexity of each domain with a 95% interval over its documents.

    Args:
        losses: What a model lost.
        resamples: R; 1000 settles the interval to about a percent of its width.
        seed: Of the drawing; a domain's draws depend on it, its index and its documents alone.

    Returns:
        By domain, in the order of the text's domains.
    """
    result = {}
    for index, name in losses.present():
        mean, mean_R = _means(losses, index, resamples, seed)
        in_domain = losses.domain_N == index
        num_documents = int(np.unique(losses.document_N[in_domain]).size)
        result[name] = DomainQuality(
            perplexity=_estimate(mean, mean_R),
            tokens=int(losses.tokens_N[in_domain].sum()),
            documents=num_documents,
        )
    return result


def perplexity_ratio(
    losses: BlockLosses, dense: BlockLosses, resamples: int, seed: int
) -> Estimate:
    """Geometric mean over domains of perplexity over another model's, with its paired interval.

    Args:
        losses: What the model lost.
        dense: What the other, most often its dense parent, lost on the same blocks.
        resamples: R.
        seed: Of the drawing.

    Raises:
        InputError: If the two did not read the same blocks.
    """
    if losses.text != dense.text or not np.array_equal(losses.block_N, dense.block_N):
        raise InputError(
            "a ratio of perplexities needs both models on the same blocks; evaluate them with the "
            "same text, seed and number of blocks"
        )
    logs, logs_R = [], []
    for index, _ in losses.present():
        mean, mean_R = _means(losses, index, resamples, seed)
        dense_mean, dense_R = _means(dense, index, resamples, seed)
        logs.append(mean - dense_mean)
        logs_R.append(mean_R - dense_R)
    return _estimate(float(np.mean(logs)), np.mean(logs_R, axis=0))


def _means(
    losses: BlockLosses, domain: int, resamples: int, seed: int
) -> tuple[float, NDArray[np.float64]]:
    """Mean loss per token of a domain, as read and in each resample, [R]."""
    in_domain = losses.domain_N == domain
    units, unit_N = np.unique(losses.document_N[in_domain], return_inverse=True)
    if units.size < 2:
        # One document says nothing of others: its blocks are then the only sample there is.
        unit_N = np.arange(int(in_domain.sum()))
    nll_U = np.bincount(unit_N, weights=losses.nll_N[in_domain])
    tokens_U = np.bincount(unit_N, weights=losses.tokens_N[in_domain])
    rng = np.random.default_rng([seed, domain])
    draws_RU = rng.multinomial(nll_U.size, np.full(nll_U.size, 1 / nll_U.size), size=resamples)
    return float(nll_U.sum() / tokens_U.sum()), (draws_RU @ nll_U) / (draws_RU @ tokens_U)


def _estimate(log_value: float, log_R: NDArray[np.float64]) -> Estimate:
    low, high = np.percentile(log_R, _PERCENTILES)
    return Estimate(
        value=float(np.exp(log_value)), low=float(np.exp(low)), high=float(np.exp(high))
    )
