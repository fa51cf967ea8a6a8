"""What text to read and how much of it: the settings of the data floor."""

from __future__ import annotations

from dataclasses import dataclass, field

from moesaic._errors import InputError
from moesaic.data.duplicates import DuplicateConfig

BUILTIN_SOURCES = ("builtin:docs", "builtin:prose", "builtin:code")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Settings of `prepare`.

    Attributes:
        sources: Where text comes from, one short string each: `builtin:docs`, `builtin:prose`,
            `builtin:code`; a file (`.jsonl` and `.parquet` hold one document a row, any other
            file is one text document), a directory or a glob; `hub:owner/name[/config]`.
            `#field` at the end names the text field of rows (default `text`), `domain=` in front
            names the domain. Sources that share a domain are packed together.
        block: Tokens of a block.
        heldout_fraction: Share of the documents that is held out, in (0, 1).
        max_tokens_per_domain: Bound on the training tokens of a domain.
        heldout_tokens_per_domain: Bound on the held-out tokens of a domain.
        max_characters_per_source: Reading of a source stops after this many characters.
        excerpt_characters: A longer document gives one excerpt of about this length from a place
            its hash chooses, so that a bounded number of tokens still sees many documents; null
            takes documents whole.
        section_characters: Cut documents at blank lines into sections of about this length, each
            a document of its own; for a domain that is one long file. Neighbouring sections can
            land on different sides of the split.
        duplicates: When a training document counts as a copy of a held-out one.
        seed: Chooses sides, order and excerpts, each from the content of a document alone.
    """

    sources: tuple[str, ...] = BUILTIN_SOURCES
    block: int = 512
    heldout_fraction: float = 0.2
    max_tokens_per_domain: int = 131_072
    heldout_tokens_per_domain: int = 16_384
    max_characters_per_source: int = 20_000_000
    excerpt_characters: int | None = 4_096
    section_characters: int | None = None
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("data.sources is empty; name a file, a directory or builtin:docs")
        _at_least("block", self.block, 2)
        if not 0.0 < self.heldout_fraction < 1.0:
            raise InputError(
                f"data.heldout_fraction must be in (0, 1), got {self.heldout_fraction}; "
                "0.1 holds out every tenth document"
            )
        for name in ("max_tokens_per_domain", "heldout_tokens_per_domain"):
            value = getattr(self, name)
            if value < self.block:
                raise InputError(
                    f"data.{name} must be at least one block={self.block}, got {value}; "
                    "raise it or lower block"
                )
        _at_least("max_characters_per_source", self.max_characters_per_source, 1)
        for name in ("excerpt_characters", "section_characters"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 16)


def _at_least(name: str, value: int, bound: int) -> None:
    if value < bound:
        raise InputError(f"data.{name} must be at least {bound}, got {value}; raise it")
