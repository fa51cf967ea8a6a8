"""From a short source string to documents."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.data.builtin import builtin
from moesaic.data.config import DataConfig
from moesaic.data.documents import Document, sections
from moesaic.data.readers import field_of, read_file

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".md", ".parquet", ".txt")
ROW_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source string, taken apart.

    Attributes:
        text: The string as the user wrote it.
        kind: Who reads it.
        domain: Domain of its documents.
        location: Name of a built-in source, `owner/name[/config]` on the hub, or a path.
        field: Field that holds the text of rows.
        paths: The files behind a path, a directory or a glob.
    """

    text: str
    kind: Literal["builtin", "hub", "files"]
    domain: str
    location: str
    field: str = "text"
    paths: tuple[Path, ...] = ()


def parse_source(text: str) -> Source:
    """Take a source string apart and check that what it names exists.

    Raises:
        InputError: If it names nothing that exists; hub names are checked when they are read.
    """
    label, location = "", text
    # A path that exists means itself, whatever characters it has.
    if not Path(text).exists() and (match := re.match(r"([\w.-]+)=(.+)", text)):
        label, location = match.groups()
    if location.startswith("builtin:"):
        name = location.removeprefix("builtin:")
        builtin(name)
        return Source(text=text, kind="builtin", domain=label or name, location=name)
    field = ""
    if not Path(location).exists() and "#" in location:
        location, _, field = location.rpartition("#")
    if location.startswith("hub:"):
        location = location.removeprefix("hub:")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", location):
            raise InputError(
                f"data source {text!r} must look like hub:owner/name, hub:owner/name/config or "
                "hub:owner/name#field; correct it"
            )
        domain = label or location.split("/")[1]
        return Source(
            text=text, kind="hub", domain=domain, location=location, field=field or "text"
        )
    paths = _find_files(location, text)
    if field and not any(path.suffix in ROW_SUFFIXES for path in paths):
        raise InputError(
            f"data source {text!r} names the field {field!r}, but only .jsonl and .parquet files "
            "have fields; leave it out"
        )
    return Source(
        text=text,
        kind="files",
        domain=label or _domain_of(location),
        location=location,
        field=field or "text",
        paths=paths,
    )


def load_documents(config: DataConfig, progress: Progress | None = None) -> list[Document]:
    """Read the documents of every source, in order.

    Blank documents are left out. All source strings are checked before the first is read.

    Args:
        config: The sources and the bounds on reading them.
        progress: Told one unit per source.

    Raises:
        InputError: If a source does not exist, is empty, or is not text.
    """
    parsed = [parse_source(text) for text in config.sources]
    documents: list[Document] = []
    with (progress or SILENT).stage("read text", len(parsed), "source") as stage:
        for source in parsed:
            read = _read_bounded(source, config)
            if not read:
                raise InputError(
                    f"data source {source.text!r} has no documents with text; name another one"
                )
            documents += read
            stage.advance()
    return documents


def _read_bounded(source: Source, config: DataConfig) -> list[Document]:
    """Read one source up to the bound on its characters."""
    documents: list[Document] = []
    left = config.max_characters_per_source
    for document in _read(source, left):
        if len(document.text) > left:
            document = replace(document, text=document.text[:left])
        if not document.text.strip():
            continue
        left -= len(document.text)
        if config.section_characters is None:
            documents.append(document)
        else:
            documents += sections(document, config.section_characters)
        if left <= 0:
            logger.info(
                "reading of %s stopped at max_characters_per_source=%d",
                source.text,
                config.max_characters_per_source,
            )
            break
    return documents


def _read(source: Source, max_characters: int) -> Iterator[Document]:
    if source.kind == "builtin":
        found = builtin(source.location)
        for name, text in found.read():
            yield Document(
                text=text,
                domain=source.domain,
                source=source.text,
                licence=found.licence,
                name=name,
            )
    elif source.kind == "hub":
        yield from _read_hub(source)
    else:
        for path in source.paths:
            if path.stat().st_size == 0:
                if len(source.paths) == 1:
                    raise InputError(f"data file {path} is empty; name a file with text")
                logger.warning("data file %s is empty and was skipped", path)
                continue
            for name, text in read_file(path, source.field, max_characters):
                yield Document(text=text, domain=source.domain, source=source.text, name=name)


def _read_hub(source: Source) -> Iterator[Document]:
    """Stream the train split of a hub dataset; nothing is read beyond what is asked for."""
    # Importing datasets takes seconds.
    import datasets

    owner, name, *rest = source.location.split("/")
    try:
        stream = datasets.load_dataset(f"{owner}/{name}", *rest, split="train", streaming=True)
        licence = stream.info.license or "unstated"
        for number, row in enumerate(stream, start=1):
            where = f"{source.location}, row {number}"
            text = field_of(row, source.field, where=where)
            yield Document(
                text=text,
                domain=source.domain,
                source=source.text,
                licence=licence,
                name=f"row {number}",
            )
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data source {source.text!r} cannot be read from the hub ({reason}); check the name "
            "and the network, or name local files or builtin:docs"
        ) from error


def _find_files(location: str, text: str) -> tuple[Path, ...]:
    """List the files behind a path, a directory or a glob, sorted."""
    path = Path(location)
    if path.is_file():
        return (path,)
    if path.is_dir():
        paths = sorted(
            found
            for found in path.rglob("*")
            if found.is_file()
            and found.suffix in SUFFIXES
            and not any(part.startswith(".") for part in found.relative_to(path).parts)
        )
        if not paths:
            raise InputError(
                f"data source {text!r} is a directory without {', '.join(SUFFIXES)} files; "
                "name another directory or a glob"
            )
        return tuple(paths)
    if glob.has_magic(location):
        paths = sorted(
            found for name in glob.glob(location, recursive=True) if (found := Path(name)).is_file()
        )
        if not paths:
            raise InputError(f"data source {text!r} matches no file; correct the pattern")
        return tuple(paths)
    raise InputError(
        f"data source {text!r} does not exist; name a file, a directory, a glob, "
        "builtin:docs or hub:owner/name"
    )


def _domain_of(location: str) -> str:
    """Name the domain of a path: the file's stem, or the folder a glob starts in."""
    path = Path(location)
    if not glob.has_magic(location) or path.exists():
        return path.stem or path.resolve().name
    plain = [part for part in path.parent.parts if not glob.has_magic(part)]
    return Path(*plain).name or "text"
