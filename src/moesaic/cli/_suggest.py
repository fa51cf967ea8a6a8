"""`moesaic convert --suggest`: what to do, said before any of the work."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic._config import to_plain
from moesaic.analysis import Suggestion, advice
from moesaic.cli._common import show
from moesaic.cli._progress import TerminalProgress
from moesaic.recipes import Recipe, plan
from moesaic.recipes.suggestion import checked_budgets, suggest_recipe


def run_suggest(recipe: Recipe, options: Any, directory: Path) -> int:
    """Suggest what to do with the model of a recipe of one conversion.

    Args:
        recipe: The conversion.
        options: Of the command.
        directory: Where the calibration is left if the command has an output.
    """
    budgets = checked_budgets(options.budgets)
    if options.dry_run:
        facts = plan(dataclasses.replace(recipe, output=directory))
        show({**facts, "suggest": list(budgets)}, as_json=options.json)
        return 0
    with tempfile.TemporaryDirectory() as temporary, TerminalProgress() as progress:
        place = directory if options.output is not None else Path(temporary) / "work"
        recipe = dataclasses.replace(recipe, output=place)
        suggestion = suggest_recipe(recipe, budgets, progress=progress)
    sentences = advice(suggestion)
    if options.json:
        show({**to_plain(suggestion), "advice": sentences}, as_json=True)
        return 0
    Console(width=None if sys.stdout.isatty() else 110).print(suggestion_table(suggestion))
    for p in suggestion.predictions:
        if p.reason:
            print(f"{p.method} at {p.budget:g}: {p.reason}")
    for sentence in sentences:
        print(sentence)
    return 0


def suggestion_table(suggestion: Suggestion) -> Table:
    """Predicted ratios, a line for each method and a column for each budget."""
    table = Table("predicted perplexity / dense", box=None)
    for budget in suggestion.budgets:
        table.add_column(f"{budget:g} active", justify="right")
    cells = {(p.method, p.budget): p.text() for p in suggestion.predictions}
    kinds = {p.method: p for p in suggestion.predictions}
    for method, about in kinds.items():
        label = f"{method} (static)" if about.static else method
        table.add_row(label, *(cells[method, budget] for budget in suggestion.budgets))
    return table
