"""`convert` and `compress`: a recipe of one step whose model lands where it was asked for."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.calibration import CalibrationConfig
from moesaic.cli._common import Overrides, parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.cli._suggest import run_suggest
from moesaic.data import DataConfig
from moesaic.models.checkpoint import read_manifest
from moesaic.recipes import Recipe, plan, run_recipe
from moesaic.recipes.claim import holds_run
from moesaic.recipes.recipe import DEFAULT_METHODS, apply_override, method_step
from moesaic.recipes.suggestion import BUDGETS, take_up


@dataclass(frozen=True, kw_only=True)
class Options:
    """Apply a method to a model and save the result as a transformers directory.

    Attributes:
        model: A directory, hub name, .gguf file or `package:NAME`; dense, but for the compressions
            of a mixture.
        output: Directory of the checkpoint.
        method: Registered name; see `moesaic ls conversions` or `moesaic ls compressions`. The
            settings below are those of the method.
        preset: Named settings, such as `paper`, that other options start from.
        set: Settings by their path, such as `router.threshold=0.4`, values in YAML.
        dtype: Of the weights; `auto` measures which is fastest here.
        data: Text, where the method calibrates.
        calibration: How much of it is read.
        dry_run: Check everything, say what would be done, do nothing.
        json: Print one JSON document.
    """

    model: tyro.conf.Positional[str]
    output: tyro.conf.Positional[Path | None] = None
    method: str = ""
    preset: str = ""
    set: Overrides = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    dry_run: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Turn a dense model into a mixture of experts and save it as a transformers directory.

    Attributes:
        suggest: Convert nothing: predict from short trials what these settings, static pruning and
            thresholds lose at each budget, and say what to do. With an output, the same command
            without it takes up the calibration.
        budgets: Active fractions to predict.
    """

    suggest: bool = False
    budgets: tuple[float, ...] = BUDGETS


def run_method(kind: str, argv: Sequence[str]) -> int:
    """Run one of the two commands."""
    method = _value_of("--method", argv) or DEFAULT_METHODS[kind]
    preset = _value_of("--preset", argv)
    start = method_step(kind, {"method": method, **({"preset": preset} if preset else {})}).config
    base = ConvertOptions if kind == "convert" else Options
    options: Any = parse(_with_settings(start, base), argv, kind)
    quiet_libraries()
    settings = to_plain(options.settings)
    for override in itertools.chain.from_iterable(options.set):
        apply_override(settings, override)
    for name in {"method", "preset"} & settings.keys():
        raise InputError(f"--set cannot choose the {name}; write --{name} {settings[name]}")
    step = method_step(kind, {"method": method, **settings})
    suggests = kind == "convert" and options.suggest
    if options.output is None and not suggests:
        raise InputError("output is missing; name a directory for the checkpoint after the model")
    work = _beside(options.output, "partial")
    recipe = Recipe(
        model=options.model,
        output=work,
        dtype=options.dtype,
        data=options.data,
        calibration=options.calibration,
        steps=(step,),
    )
    suggested = _beside(options.output, "suggested")
    if suggests:
        return run_suggest(recipe, options, suggested)
    made = work / f"01-{kind}"
    if options.output.exists():
        # An earlier run may have been cut between its last two acts.
        moved = (made / "done.json").is_file() and not (made / "model").exists()
        if not moved or not holds_run(work, recipe.plain()):
            raise InputError(f"output {options.output} exists; delete it or choose another")
    elif options.dry_run:
        facts = plan(recipe)
        show({**facts, "output": str(options.output)}, as_json=options.json)
        return 0
    else:
        take_up(suggested, recipe)
        with TerminalProgress() as progress:
            run_recipe(recipe, progress)
        os.replace(made / "model", options.output)
    shutil.rmtree(work)
    results = read_manifest(options.output)["steps"][-1]["results"]
    result = {"output": str(options.output), "method": step.method, **results}
    show(result, as_json=options.json)
    return 0


def _beside(output: Path | None, what: str) -> Path:
    """A directory of work beside the checkpoint."""
    return Path(what) if output is None else output.with_name(f"{output.name}.{what}")


def _with_settings(config: Any, base: type) -> type:
    """Add the settings of a method to the options, under their own names."""
    settings: Any = Annotated[type(config), tyro.conf.arg(name="")]
    return dataclasses.make_dataclass(
        "MethodOptions",
        [("settings", settings, field(default=config))],
        bases=(base,),
        namespace={"__doc__": base.__doc__},
        frozen=True,
        kw_only=True,
    )


def _value_of(flag: str, argv: Sequence[str]) -> str:
    """Read one option ahead of the others, which depend on it."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == flag:
            return "" if following.startswith("--") else following
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return ""
