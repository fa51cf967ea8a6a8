"""The rules of the house: sizes, spelling, and what every registered method owes its reader."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moesaic import catalog

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


house = load(ROOT / "tools" / "house.py")
# The site generator does the same while it loads a hook.
sys.path.insert(0, str(ROOT / "docs"))
hooks = load(ROOT / "docs" / "hooks.py")
sys.path.remove(str(ROOT / "docs"))
METHODS = [
    pytest.param(table, name, id=f"{family}:{name}")
    for family, table in catalog.tables().items()
    for name in table
]


@pytest.mark.parametrize("check", [house.file_sizes, house.non_ascii, house.machine_words])
def test_project_keeps_the_rule(check):
    assert check() == []


def test_rules_notice_what_they_forbid(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    (source / "long.py").write_text("x = 1\n" * 601, "utf-8")
    (source / "words.py").write_text("a = '\u00e9'\nb = '/wo" + "rk/main'\n", "utf-8")
    assert [p.partition(" ")[0] for p in house.file_sizes(tmp_path)] == ["src/long.py"]
    assert [p.partition(" ")[0] for p in house.non_ascii(tmp_path)] == ["src/words.py:1:"]
    assert [p.partition(" ")[0] for p in house.machine_words(tmp_path)] == ["src/words.py:2:"]


def test_tables_import_without_torch():
    code = (
        "import sys; from moesaic import catalog; catalog.tables(); "
        "print(*sorted({'torch', 'transformers', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize(("table", "name"), METHODS)
def test_method_resolves(table, name):
    assert callable(table.load(name))
    config = table.load_config(name)
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(config))


@pytest.mark.parametrize(("table", "name"), METHODS)
def test_method_is_described(table, name):
    record = table[name]
    # Formats have the names that transformers gives their architectures.
    separator = "[-_]" if table.family == "format" else "-"
    assert re.fullmatch(rf"[a-z0-9]+({separator}[a-z0-9]+)*", name)
    assert 10 <= len(record.summary) <= 80
    assert record.paper


@pytest.mark.parametrize(("table", "name"), METHODS)
def test_file_of_method_names_its_paper(table, name):
    record = table[name]
    module = importlib.import_module(record.target.partition(":")[0])
    if record.paper == "ours":
        return
    ids = re.findall(r"\d{4}\.\d{5}", record.paper)
    text = " ".join(module.__doc__.split())
    assert all(words in text for words in ids or [record.paper])


def test_docs_show_every_family():
    shown = {
        family
        for page in (ROOT / "docs").rglob("*.md")
        for family in hooks.families_in(page.read_text("utf-8"))
    }
    assert shown == set(catalog.tables())


@pytest.mark.parametrize(("table", "name"), METHODS)
def test_docs_mention_every_method(table, name):
    page = hooks.render(f"<!-- methods: {table.family} -->")
    assert f"`{name}`" in page
    assert table[name].summary in page


def test_docs_list_every_system():
    page = hooks.render("<!-- systems -->")
    assert all(f"`{system.id}`" in page for system in catalog.systems())
