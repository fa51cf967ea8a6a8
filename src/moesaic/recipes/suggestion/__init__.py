"""Advice before work: what each method is predicted to lose at each budget, from short trials."""

from moesaic.recipes.suggestion.calibrated import suggest_recipe, take_up
from moesaic.recipes.suggestion.cells import suggest_cells
from moesaic.recipes.suggestion.reading import TrialConfig
from moesaic.recipes.suggestion.run import BUDGETS, checked_budgets, suggest

__all__ = [
    "BUDGETS",
    "TrialConfig",
    "checked_budgets",
    "suggest",
    "suggest_cells",
    "suggest_recipe",
    "take_up",
]
