"""From a config and a tokenizer to training and held-out blocks that share no document."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from moesaic._config import build_config, to_plain
from moesaic._errors import CheckpointError, InputError
from moesaic._files import atomic_directory, read_json, write_json
from moesaic._progress import SILENT, Progress
from moesaic.data.blocks import TokenBlocks
from moesaic.data.config import DataConfig
from moesaic.data.documents import Document, Draw, draw, excerpt
from moesaic.data.duplicates import NearDuplicates
from moesaic.data.packing import Line, build_blocks
from moesaic.data.sources import load_documents
from moesaic.data.tokenizing import Tokenizer, encode, require_end_mark, tokenizer_fingerprint

logger = logging.getLogger(__name__)

# Part of the cache key: raise it when the same documents would give other blocks.
_RECIPE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainReport:
    """What became of the documents of one domain.

    Attributes:
        domain: Label of the domain.
        documents: Documents read.
        characters: Characters read.
        exact_duplicates: Documents dropped for having the text of an earlier one.
        near_duplicates: Training documents dropped for resembling a held-out one.
        train_documents: Documents in the training blocks.
        train_tokens: Tokens of the training blocks.
        heldout_documents: Documents in the held-out blocks.
        heldout_tokens: Tokens of the held-out blocks.
        dropped_tokens: Tokens of both sides left over after the last whole block.
    """

    domain: str
    documents: int
    characters: int
    exact_duplicates: int
    near_duplicates: int
    train_documents: int
    train_tokens: int
    heldout_documents: int
    heldout_tokens: int
    dropped_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What preparing the data did, for people and for the manifest.

    Attributes:
        key: Fingerprint of the config, the documents and the tokenizer.
        block: Tokens of a block.
        domains: One record per domain.
    """

    key: str
    block: int
    domains: tuple[DomainReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSplit:
    """Training and held-out blocks without a common document.

    Attributes:
        train: Blocks to learn from.
        heldout: Blocks to measure on.
        report: Counts.
    """

    train: TokenBlocks
    heldout: TokenBlocks
    report: DataReport

    def save(self, path: str | Path) -> None:
        """Write a directory of three files, atomically."""
        with atomic_directory(Path(path)) as temporary:
            self.train.save(temporary / "train.safetensors")
            self.heldout.save(temporary / "heldout.safetensors")
            write_json(temporary / "report.json", to_plain(self.report))

    @classmethod
    def load(cls, path: str | Path) -> DataSplit:
        """Read what `save` wrote.

        Raises:
            CheckpointError: If a file is missing, truncated or edited.
        """
        path = Path(path)
        record = path / "report.json"
        if not record.is_file():
            raise CheckpointError(f"{path} holds no prepared data; prepare it again")
        return cls(
            train=TokenBlocks.load(path / "train.safetensors"),
            heldout=TokenBlocks.load(path / "heldout.safetensors"),
            report=build_config(DataReport, read_json(record), where=str(record)),
        )


@dataclass(slots=True, kw_only=True)
class Sides:
    """Documents of one domain, each on its side, in the order they will be used.

    Attributes:
        train: Documents to learn from.
        heldout: Documents to measure on.
    """

    train: list[tuple[Document, Draw]] = field(default_factory=list)
    heldout: list[tuple[Document, Draw]] = field(default_factory=list)


def split_documents(
    documents: Sequence[Document], config: DataConfig
) -> tuple[dict[str, Sides], Counter[tuple[str, str]]]:
    """Put each document on the side that its own text and the seed decide.

    A text that occurs more than once, in whatever domain, stays once: its first place counts.

    Args:
        documents: What `load_documents` read.
        config: Held-out fraction and seed.

    Returns:
        The sides of each domain, and how many duplicates were dropped by domain and source.

    Raises:
        InputError: If a domain has no document on one of the sides.
    """
    domains: dict[str, Sides] = {}
    dropped: Counter[tuple[str, str]] = Counter()
    seen: set[bytes] = set()
    for document in documents:
        sides = domains.setdefault(document.domain, Sides())
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            dropped[document.domain, document.source] += 1
            continue
        seen.add(digest)
        chance = draw(document.text, config.seed)
        held = chance.side < config.heldout_fraction
        (sides.heldout if held else sides.train).append((document, chance))
    for domain, sides in domains.items():
        num_documents = len(sides.train) + len(sides.heldout)
        for side, members, remedy in (
            ("held-out", sides.heldout, "raise"),
            ("training", sides.train, "lower"),
        ):
            if not members:
                raise InputError(
                    f"domain {domain!r} has no {side} document out of {num_documents} at "
                    f"data.heldout_fraction={config.heldout_fraction}; {remedy} it, change "
                    "data.seed, add documents, or cut long ones with data.section_characters"
                )
            members.sort(key=lambda member: member[1].order)
    return domains, dropped


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> DataSplit:
    """Read, split, tokenise and pack text.

    Held-out documents are tokenised first. A training document that resembles one of them is
    dropped. Tokenising a side of a domain stops at its bound, so a large corpus is not tokenised
    whole.

    Args:
        config: What text, and how much.
        tokenizer: Called as `tokenizer(text, add_special_tokens=False)["input_ids"]`.
        cache_dir: Where prepared data is kept and found again, by the fingerprint of config,
            documents and tokenizer.
        progress: Told the sources read and the lines of tokens made.

    Returns:
        Blocks of both sides and counts.

    Raises:
        InputError: If a source is bad, or a side of a domain has less text than one block.
    """
    require_end_mark(tokenizer)
    documents = load_documents(config, progress)
    domains, exact_duplicates = split_documents(documents, config)
    fingerprint = tokenizer_fingerprint(tokenizer)
    key = _key(config, documents, fingerprint)
    place = None if cache_dir is None else Path(cache_dir) / f"data-{key[:16]}"
    if place is not None and (found := _cached(place, key)) is not None:
        return found

    with (progress or SILENT).stage("tokenise", 2 * len(domains), "line") as stage:
        heldout = []
        measured: list[str] = []
        for domain, sides in domains.items():
            line = _fill(Line(domain=domain), sides.heldout, tokenizer, config, held=True)
            # Whole texts: a copy may have drawn another excerpt.
            measured += [document.text for document, _ in sides.heldout[: len(line.documents)]]
            heldout.append(line)
            stage.advance()
        guard = NearDuplicates(measured, config.duplicates)
        train = []
        for domain, sides in domains.items():
            line = Line(domain=domain)
            _fill(line, sides.train, tokenizer, config, held=False, guard=guard)
            train.append(line)
            stage.advance()

    built = {
        held: build_blocks(
            lines,
            block=config.block,
            max_tokens=_max_tokens(config, held=held),
            tokenizer=fingerprint,
            exact_duplicates=exact_duplicates,
        )
        for held, lines in ((False, train), (True, heldout))
    }
    records = tuple(
        _domain_report(line, documents, built[False], built[True], exact_duplicates)
        for line in train
    )
    report = DataReport(key=key, block=config.block, domains=records)
    split = DataSplit(train=built[False], heldout=built[True], report=report)
    for record in report.domains:
        logger.info("prepared %s", record)
    if place is not None:
        split.save(place)
    return split


def _max_tokens(config: DataConfig, *, held: bool) -> int:
    return config.heldout_tokens_per_domain if held else config.max_tokens_per_domain


def _fill(
    line: Line,
    members: Sequence[tuple[Document, Draw]],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    held: bool,
    guard: NearDuplicates | None = None,
) -> Line:
    """Tokenise documents in order until the line has as many tokens as it may have."""
    limit = _max_tokens(config, held=held)
    num_tokens = 0
    for document, chance in members:
        if num_tokens >= limit:
            break
        if guard is not None and guard.matches(document.text):
            line.near_duplicates[document.source] += 1
            continue
        part = excerpt(document.text, config.excerpt_characters, chance.place)
        ids = encode(tokenizer, part)
        line.documents.append(replace(document, text=part))
        line.ids.append(ids)
        num_tokens += len(ids)
    if num_tokens < config.block:
        side = "held-out" if held else "training"
        copies = line.near_duplicates.total()
        lost = f" after {copies} near-duplicates of held-out documents left" if copies else ""
        raise InputError(
            f"domain {line.domain!r} has {num_tokens} {side} tokens{lost}, fewer than one "
            f"block={config.block}; add text or lower data.block"
        )
    return line


def _key(config: DataConfig, documents: Sequence[Document], tokenizer: str) -> str:
    """Hash everything that decides the blocks."""
    digest = hashlib.sha256(
        json.dumps([_RECIPE, to_plain(config), tokenizer], sort_keys=True).encode()
    )
    for document in documents:
        for part in (document.domain, document.source, document.text):
            # Each part is hashed by itself, so that no two lists of parts look the same.
            digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def _cached(place: Path, key: str) -> DataSplit | None:
    """Give the prepared data of an earlier run, or None if there is none that is whole."""
    if not place.exists():
        return None
    try:
        found = DataSplit.load(place)
    except CheckpointError as error:
        logger.warning("cached data is made again: %s", error)
        return None
    if found.report.key != key:
        return None
    logger.info("prepared data found in %s", place)
    return found


def _domain_report(
    line: Line,
    documents: Sequence[Document],
    train: TokenBlocks,
    heldout: TokenBlocks,
    exact_duplicates: Counter[tuple[str, str]],
) -> DomainReport:
    domain = line.domain
    mine = [document for document in documents if document.domain == domain]
    learnt = [p for p in train.provenance if p.domain == domain]
    measured = [p for p in heldout.provenance if p.domain == domain]
    return DomainReport(
        domain=domain,
        documents=len(mine),
        characters=sum(len(document.text) for document in mine),
        exact_duplicates=sum(n for (d, _), n in exact_duplicates.items() if d == domain),
        near_duplicates=line.near_duplicates.total(),
        train_documents=sum(p.documents for p in learnt),
        train_tokens=sum(p.tokens for p in learnt),
        heldout_documents=sum(p.documents for p in measured),
        heldout_tokens=sum(p.tokens for p in measured),
        dropped_tokens=sum(p.dropped_tokens for p in [*learnt, *measured]),
    )
