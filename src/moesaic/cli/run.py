"""Do the steps of a YAML recipe; the same command resumes it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from moesaic._files import read_json
from moesaic.cli._common import Overrides, parse, quiet_libraries, show, show_table
from moesaic.cli._progress import TerminalProgress
from moesaic.recipes import plan, read_recipe, run_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Do the steps of a YAML recipe; run it again to resume.

    Attributes:
        recipe: The YAML file.
        set: Overrides such as `steps.train.tokens=2000`.
        dry_run: Check everything, say what would be done, do nothing.
        json: Print one JSON document.
    """

    recipe: tyro.conf.Positional[Path]
    set: Overrides = ()
    dry_run: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "run")
    quiet_libraries()
    recipe = read_recipe(options.recipe, tuple(itertools.chain.from_iterable(options.set)))
    if options.dry_run:
        show(plan(recipe), as_json=options.json)
        return 0
    with TerminalProgress() as progress:
        result = run_recipe(recipe, progress)
    if "record" in result:
        record = read_json(Path(result["record"]))
        if not options.json:
            show_table(record)
            for generation in record.get("generations", []):
                print(f"\n> {generation['prompt']}", file=sys.stdout)
                for name, text in generation["texts"].items():
                    print(f"{name}: {text.strip()}")
            print()
    show(result, as_json=options.json)
    return 0
