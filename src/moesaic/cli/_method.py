"""`convert` and `compress`: a recipe of one step whose model lands where it was asked for."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from moesaic._errors import InputError
from moesaic.calibration import CalibrationConfig
from moesaic.cli._common import Overrides, parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.data import DataConfig
from moesaic.models.checkpoint import read_manifest
from moesaic.recipes import Recipe, plan, run_recipe
from moesaic.recipes.recipe import apply_override, method_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Apply a method to a dense model and save the result as a transformers directory.

    Attributes:
        model: A directory, hub name, .gguf file or `package:NAME`.
        output: Directory of the checkpoint.
        method: Registered name; see `moesaic ls conversions` or `moesaic ls compressions`.
        preset: Named settings, such as `paper`.
        set: Settings of the method, such as `experts=16` or `router.threshold=0.4`.
        dtype: Of the weights; `auto` measures which is fastest here.
        data: Text, where the method calibrates.
        calibration: How much of it is read.
        dry_run: Check everything, say what would be done, do nothing.
        json: Print one JSON document.
    """

    model: tyro.conf.Positional[str]
    output: tyro.conf.Positional[Path]
    method: str = ""
    preset: str = ""
    set: Overrides = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    dry_run: bool = False
    json: bool = False


def run_method(kind: str, argv: Sequence[str]) -> int:
    """Run one of the two commands."""
    options = parse(Options, argv, kind)
    quiet_libraries()
    settings: dict[str, Any] = {}
    for override in itertools.chain.from_iterable(options.set):
        apply_override(settings, override)
    if options.method:
        settings["method"] = options.method
    if options.preset:
        settings["preset"] = options.preset
    step = method_step(kind, settings)
    work = options.output.with_name(f"{options.output.name}.partial")
    recipe = Recipe(
        model=options.model,
        output=work,
        dtype=options.dtype,
        data=options.data,
        calibration=options.calibration,
        steps=(step,),
    )
    if options.output.exists():
        raise InputError(f"output {options.output} exists; delete it or choose another")
    if options.dry_run:
        facts = plan(recipe)
        show({**facts, "output": str(options.output)}, as_json=options.json)
        return 0
    with TerminalProgress() as progress:
        run_recipe(recipe, progress)
    shutil.move(work / f"01-{kind}" / "model", options.output)
    shutil.rmtree(work)
    results = read_manifest(options.output)["steps"][-1]["results"]
    result = {"output": str(options.output), "method": step.method, **results}
    show(result, as_json=options.json)
    return 0
