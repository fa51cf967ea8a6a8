"""Recipes: several steps as one YAML file, resumed at the step and layer by running it again."""

from moesaic.recipes.plan import plan
from moesaic.recipes.recipe import Recipe, Step, read_recipe
from moesaic.recipes.run import run_recipe

__all__ = ["Recipe", "Step", "plan", "read_recipe", "run_recipe"]
