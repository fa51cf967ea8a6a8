"""Where a suggestion leaves its work, and how a conversion that follows takes it up."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from moesaic._progress import SILENT, Progress
from moesaic.analysis.suggestion import Suggestion
from moesaic.recipes.claim import claim, held, holds_run
from moesaic.recipes.plan import plan
from moesaic.recipes.recipe import Recipe, method_step
from moesaic.recipes.run import Run
from moesaic.recipes.suggestion.reading import TrialConfig
from moesaic.recipes.suggestion.run import checked_budgets, collectors_of, suggest_from

# What a conversion and a suggestion have in common.
_PARTS = ("parent", "data", "calibration")


def suggest_recipe(
    recipe: Recipe,
    budgets: tuple[float, ...],
    trials: TrialConfig | None = None,
    progress: Progress = SILENT,
) -> Suggestion:
    """Suggest what to do instead of, or after, the one conversion of a recipe.

    Args:
        recipe: Its output holds the parent, the text and the statistics afterwards; run again, it
            goes on with them.
        budgets: Active fractions.
        trials: How much work the trials are.
        progress: Told of every stage.

    Raises:
        InputError: Before any work, if the recipe cannot work or its directory is another's.
    """
    budgets = checked_budgets(budgets)
    (step,) = recipe.steps
    # Static pruning and thresholds are calibrated with it.
    others = (method_step("compress", {"method": name}) for name in ("flap", "teal"))
    run = Run(dataclasses.replace(recipe, steps=(step, *others)), progress)
    plan(run.recipe)
    with held(recipe.output):
        claim(recipe.output, _common(recipe, collectors_of(step.config)), "suggestion")
        run.check_text()
        run.save_parent()
        stats = run.stats()
        assert stats is not None
        return suggest_from(
            run.dense(),
            step.config,
            stats,
            run.split().train,
            budgets=budgets,
            seed=recipe.calibration.seed,
            trials=trials or TrialConfig(),
            progress=progress,
        )


def take_up(suggested: Path, recipe: Recipe) -> bool:
    """Begin a recipe with what a suggestion calibrated, if that is what the recipe calibrates.

    Args:
        suggested: Directory of the suggestion, which is gone afterwards.
        recipe: What is to be run; nothing happens if it was begun before.

    Returns:
        Whether it was taken up.
    """
    if recipe.output.exists() or not holds_run(suggested, _common(recipe, recipe.collectors())):
        return False
    with held(suggested), held(recipe.output):
        claim(recipe.output, recipe.plain(), "recipe")
        for name in _PARTS:
            if (suggested / name).is_dir():
                os.replace(suggested / name, recipe.output / name)
    shutil.rmtree(suggested)
    return True


def _common(recipe: Recipe, collectors: tuple[str, ...]) -> dict[str, Any]:
    plain = recipe.plain()
    common = {name: plain[name] for name in ("model", "dtype", "data", "calibration")}
    return {**common, "collectors": list(collectors)}
