"""Small checks of the house rules that no linter covers: file sizes, ASCII, machine paths.

Run it as `python tools/house.py`; it prints one line per problem and exits 1 if there is any.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = {"src": 600, "tests": 800}
SOURCE_SUFFIXES = frozenset({".py", ".toml", ".yaml", ".yml", ".j2", ".css", ".js", ".md", ".cfg"})
TEXT_SUFFIXES = SOURCE_SUFFIXES | {".json", ".jsonl", ".txt", ".html", ".sh", ".svg", ""}
OUTPUT_FOLDERS = frozenset({"__pycache__", "build", "dist", "runs", "site"})

# Each pattern is spelt so that it does not match its own line.
FORBIDDEN = {
    "path of one machine": r"(?<![\w.])/(?:wor[k]|tm[p]|roo[t]|hom[e]/\w+|mn[t])/",
    "package registry": r"py[p]i\.|pythonhoste[d]|download\.pytorc[h]|index-ur[l]|artifactor[y]",
}


def files(root: Path = ROOT) -> Iterator[Path]:
    """Give every file of the project that a commit could hold, outputs left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in OUTPUT_FOLDERS
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name in {".ci", ".github"})
        )
        yield from (Path(folder, name) for name in sorted(names) if not name.endswith(".pyc"))


def file_sizes(root: Path = ROOT) -> list[str]:
    """Name the modules longer than their folder allows."""
    problems = []
    for folder, bound in MAX_LINES.items():
        for path in sorted((root / folder).rglob("*.py")):
            num_lines = len(path.read_text("utf-8").splitlines())
            if num_lines > bound:
                problems.append(
                    f"{path.relative_to(root)} has {num_lines} lines, more than {bound}; split it"
                )
    return problems


def non_ascii(root: Path = ROOT) -> list[str]:
    """Name the lines of source and prose that hold a character outside ASCII."""
    return [
        f"{path.relative_to(root)}:{number}: {character!a} is not ASCII; spell it another way"
        for path in files(root)
        if path.suffix in SOURCE_SUFFIXES
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        for character in re.findall(r"[^\x00-\x7f]", line)[:1]
    ]


def machine_words(root: Path = ROOT) -> list[str]:
    """Name the lines that only make sense on one machine or with one package registry."""
    problems = []
    for path in files(root):
        if path.suffix not in TEXT_SUFFIXES or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            for what, pattern in FORBIDDEN.items():
                if found := re.search(pattern, line):
                    problems.append(
                        f"{path.relative_to(root)}:{number}: {found.group()!r} is a {what}; "
                        "leave it out"
                    )
    return problems


def main() -> int:
    """Print every problem; the exit code is 1 if there is any."""
    problems = [*file_sizes(), *non_ascii(), *machine_words()]
    sys.stdout.writelines(f"{problem}\n" for problem in problems)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
