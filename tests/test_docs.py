"""What the pages show exists: examples run, commands and their options are real."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
)
RUNNABLE = [
    *(ROOT / "docs" / "concepts").glob("*.md"),
    ROOT / "docs" / "methods" / "conversion.md",
    ROOT / "docs" / "data.md",
    ROOT / "docs" / "errors.md",
]


def blocks(page: Path, language: str) -> list[str]:
    """Give the fenced blocks of one language on a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_examples_run(page):
    # The blocks of a page continue each other.
    namespace = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}:{number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_import_what_exists(page):
    for block in blocks(page, "python"):
        for module, names in re.findall(r"^from (moesaic[\w.]*) import ([\w, ]+)", block, re.M):
            # As the page does it: a module has no attribute for a part that nobody imported yet.
            exec(f"from {module} import {names}", {})
        for name in re.findall(r"\bmo\.(\w+)", block):
            assert hasattr(importlib.import_module("moesaic"), name), f"moesaic.{name}"


COMMANDS = sorted(
    {
        re.sub(r"\s*#.*", "", line)
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("moesaic ")
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_and_its_options_exist(line, capsys):
    main = importlib.import_module("moesaic.cli.main").main
    _, command, *rest = line.split()
    # Each benchmark and each method has options of its own.
    kind = rest[:1] if command == "bench" else []
    if "--method" in rest:
        kind = rest[(place := rest.index("--method")) : place + 2]
    try:
        code = main([command, *kind, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code in (0, None)
    text = capsys.readouterr().out
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert option in text, f"moesaic {command} has no {option}"
