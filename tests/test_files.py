"""Files are whole or absent."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from moesaic._errors import CheckpointError, InputError
from moesaic._files import (
    atomic_directory,
    atomic_write,
    read_json,
    require_space,
    sha256_of,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_failed_write_leaves_what_was(tmp_path, error, existing):
    path = tmp_path / "file.txt"
    if existing:
        path.write_text("before")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert names(tmp_path) == (["file.txt"] if existing else [])
    if existing:
        assert path.read_text() == "before"


def test_write_without_content_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file\.txt"), atomic_write(tmp_path / "file.txt"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_directory_replaces_the_whole(tmp_path, existing):
    path = tmp_path / "model"
    if existing:
        path.mkdir()
        (path / "stale").write_text("old")
    with atomic_directory(path) as temporary:
        (temporary / "fresh").write_text("new")
        assert names(path) == ["stale"] if existing else not path.exists()
    assert names(path) == ["fresh"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("existing", [False, True])
def test_failed_directory_leaves_what_was(tmp_path, existing):
    path = tmp_path / "model"
    if existing:
        path.mkdir()
        (path / "old").write_text("old")

    def fail() -> None:
        with atomic_directory(path) as temporary:
            (temporary / "half").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert names(tmp_path) == (["model"] if existing else [])
    if existing:
        assert names(path) == ["old"]


def test_directory_ignores_what_a_dead_process_left(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 77)
    leftover = tmp_path / ".model.77.tmp"
    leftover.mkdir()
    (leftover / "junk").write_text("junk")
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "fresh").write_text("new")
    assert names(tmp_path / "model") == ["fresh"]


def test_json_survives(tmp_path):
    path = tmp_path / "a.json"
    value = {"text": "\u00e9\u4e2d", "list": [1, 2.5, None, True]}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}"], ids=["empty", "cut", "bytes"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON \(.*\); write it again"):
        read_json(path)


def test_unwritable_json_leaves_what_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, object())
    assert read_json(path) == 1
    assert names(tmp_path) == ["a.json"]


def test_hash_is_of_the_whole_file(tmp_path):
    path = tmp_path / "big"
    content = bytes(range(256)) * 6000  # more than one piece of 1 MiB
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_too_little_space_is_refused_with_both_numbers(tmp_path, monkeypatch):
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=1_500_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    missing = tmp_path / "not" / "yet"
    require_space(missing, 1_500_000_000, what="the model")
    with pytest.raises(
        InputError,
        match=r"^the model needs 2\.00 GB in .*yet, which has 1\.50 GB free; free some space or ",
    ):
        require_space(missing, 2_000_000_000, what="the model")
    # The directory need not exist yet: its nearest parent is asked.
    assert asked == [tmp_path.resolve()] * 2
    assert names(tmp_path) == []
