"""Readers of data files; each gives (place, text) pairs and names the file when it is bad."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import unknown_name

Texts = Iterator[tuple[str, str]]


def read_file(path: Path, field: str, max_characters: int) -> Texts:
    """Read the documents of one file by its suffix: rows of .jsonl and .parquet, or plain text."""
    if path.suffix == ".jsonl":
        return read_jsonl(path, field)
    if path.suffix == ".parquet":
        return read_parquet(path, field)
    return read_text(path, max_characters)


def read_text(path: Path, max_characters: int) -> Texts:
    """Read a file as one document, at most `max_characters` of it."""
    try:
        with path.open(encoding="utf-8-sig") as handle:
            text = handle.read(max_characters)
    except UnicodeDecodeError as error:
        raise _not_text(path) from error
    # Binary files may be valid UTF-8 by chance, but text has no NUL.
    if "\0" in text:
        raise _not_text(path)
    yield path.name, text


def read_jsonl(path: Path, field: str) -> Texts:
    """Read one document from each line, a JSON object."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(
                        f"{where} is not valid JSON ({error.msg} at column {error.colno}); "
                        "each line must be one JSON object"
                    ) from error
                if not isinstance(row, dict):
                    raise InputError(
                        f"{where} is a {type(row).__name__}, not a JSON object; "
                        f'write each line as {{"{field}": "..."}}'
                    )
                yield f"{path.name}:{number}", field_of(row, field, where=where)
    except UnicodeDecodeError as error:
        raise _not_text(path) from error


def read_parquet(path: Path, field: str) -> Texts:
    """Read one document from each row, a few hundred rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise UnknownNameError(unknown_name(f"field of {path}", field, names))
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    yield (
                        f"{path.name}, row {number}",
                        field_of({field: value}, field, where=where),
                    )
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{path} is not a Parquet file that can be read ({str(error).splitlines()[0]}); "
            "write it again"
        ) from error


def field_of(row: Mapping[str, Any], field: str, *, where: str) -> str:
    """Give the text of a row; null counts as no text.

    Raises:
        InputError: If the field is missing or holds something else than text.
    """
    if field not in row:
        raise UnknownNameError(unknown_name(f"field of {where}", field, row))
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(
            f"field {field!r} of {where} must be text, got a {type(value).__name__}; "
            "name the text field with #field at the end of the source"
        )
    # JSON can spell half a surrogate pair, which no tokenizer accepts.
    return value.encode("utf-8", "replace").decode("utf-8")


def _not_text(path: Path) -> InputError:
    return InputError(
        f"{path} is not UTF-8 text; give a text, .jsonl or .parquet file, or convert it to UTF-8"
    )
