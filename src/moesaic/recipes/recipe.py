"""A recipe as data: parsed strictly, so that a typo is an error before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from moesaic._config import build_config, method_config, to_plain
from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import unknown_name
from moesaic.calibration.run import CalibrationConfig
from moesaic.compression._table import COMPRESSIONS
from moesaic.conversion._table import CONVERSIONS
from moesaic.data import DataConfig
from moesaic.evaluation import EvaluationConfig
from moesaic.recipes._yaml import load_yaml
from moesaic.training.config import TrainConfig

_KINDS = ("compress", "convert", "evaluate", "train")
METHODS = {"convert": CONVERSIONS, "compress": COMPRESSIONS}
DEFAULT_METHODS = {"convert": "dsmoe", "compress": "flap"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a recipe.

    Attributes:
        kind: What it does: `convert`, `compress`, `train` or `evaluate`.
        method: Registered name, for the first two.
        config: Its settings, resolved.
    """

    kind: str
    method: str
    config: Any

    @property
    def from_mixture(self) -> bool:
        """Whether it changes the experts of a model and does not start from its dense parent."""
        return bool(self.method) and "mixture" in METHODS[self.kind][self.method].abilities

    @property
    def makes_mixture(self) -> bool:
        """Whether it leaves a mixture, which later steps go on with."""
        return self.kind in ("convert", "train") or self.from_mixture

    def plain(self) -> dict[str, Any]:
        """The step as data, every setting spelt out."""
        options = to_plain(self.config)
        return {self.kind: {"method": self.method, **options} if self.method else options}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What a recipe says beside its steps."""

    model: str
    output: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    steps: Any = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that a run needs.

    Attributes:
        model: The dense parent: a directory, hub name, .gguf file or `package:NAME`. Or a mixture,
            where all steps start from one.
        output: Directory of all results.
        dtype: Of the weights; `auto` measures which is fastest here.
        data: The text.
        calibration: How much of it is read to calibrate.
        steps: What is done, in order. `convert` and `compress` start from the dense parent, `train`
            and the compressions of a mixture from the converted model before them.
    """

    model: str
    output: Path
    dtype: str
    data: DataConfig
    calibration: CalibrationConfig
    steps: tuple[Step, ...]

    def plain(self) -> dict[str, Any]:
        """The recipe as data, every setting spelt out."""
        return {
            "model": self.model,
            "output": str(self.output),
            "dtype": self.dtype,
            "data": to_plain(self.data),
            "calibration": to_plain(self.calibration),
            "steps": [step.plain() for step in self.steps],
        }

    @property
    def from_mixture(self) -> bool:
        """Whether its model is a mixture and not a dense parent: no step makes it one first."""
        return self.steps[0].from_mixture

    def collectors(self) -> tuple[str, ...]:
        """Everything that must be measured on the dense parent, so that text is read once."""
        needed: set[str] = set()
        for step in self.steps:
            if step.kind in ("convert", "compress"):
                needed.update(step.config.collectors())
        return tuple(sorted(needed))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: A YAML file.
        overrides: `a.b=value` each, the value in YAML; a step goes by its kind, as in
            `train.tokens=2000`, or its place, as in `steps.2.train.tokens=2000`.

    Returns:
        The recipe, all names and values checked.

    Raises:
        InputError: Naming the field, the value and the remedy.
    """
    return build_recipe(read_values(path, "recipe", "model, output and steps", overrides))


def read_values(path: Path, kind: str, parts: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Read a YAML file of settings and apply overrides.

    Args:
        path: The file.
        kind: What it is called in messages.
        parts: What it must have, for a message.
        overrides: `a.b=value` each, the value in YAML.

    Raises:
        InputError: Naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise InputError(f"{kind} {path} does not exist; check the path")
    try:
        values = load_yaml(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{kind} {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise InputError(f"{kind} {path} must be a mapping with {parts}")
    for override in overrides:
        apply_override(values, override)
    return values


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain data; see `read_recipe`."""
    head = build_config(_Head, values, where="recipe")
    if not isinstance(head.steps, (list, tuple)) or not head.steps:
        raise InputError("recipe.steps must be a list with at least one step; add convert")
    steps = tuple(_step(item, index) for index, item in enumerate(head.steps))
    converted = False
    for step in steps:
        converted = converted or step.kind == "convert"
        if steps[0].from_mixture and not step.from_mixture:
            raise InputError(
                f"recipe.steps has {step.kind} after {steps[0].method}, whose model is a mixture "
                "already; put convert first"
            )
        if step.from_mixture and not (converted or steps[0].from_mixture):
            raise InputError(
                f"recipe.steps has {step.method} before any convert; put convert first"
            )
        if step.kind == "train" and not converted:
            raise InputError("recipe.steps has train before any convert; put convert first")
    if sum(step.kind == "convert" for step in steps) > 1:
        raise InputError("recipe.steps has convert twice; a recipe makes one converted model")
    return Recipe(
        model=head.model,
        output=Path(head.output),
        dtype=head.dtype,
        data=head.data,
        calibration=head.calibration,
        steps=steps,
    )


def _step(item: Any, index: int) -> Step:
    where = f"recipe.steps[{index}]"
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise InputError(f"{where} must be one step with its options, got {item!r}")
    kind, options = next(iter(item.items()))
    if kind not in _KINDS:
        raise UnknownNameError(unknown_name("recipe step", str(kind), _KINDS))
    if options is not None and not isinstance(options, dict):
        raise InputError(f"{where}.{kind} must be a mapping of options, got {options!r}")
    options = dict(options or {})
    if kind == "train":
        return Step(kind=kind, method="", config=build_config(TrainConfig, options, where=kind))
    if kind == "evaluate":
        config: Any = build_config(EvaluationConfig, options, where=kind)
        return Step(kind=kind, method="", config=config)
    return method_step(kind, options)


def method_step(kind: str, options: Mapping[str, Any]) -> Step:
    """Build a step of a registered method; `preset` gives defaults, other options override them."""
    options = dict(options)
    method = options.pop("method", DEFAULT_METHODS[kind])
    config = method_config(METHODS[kind], method, options, where=f"{kind} {method}")
    return Step(kind=kind, method=method, config=config)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set the dotted path of `a.b=value`; the value is YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set must be a.b=value, got {override!r}")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {path} has a value that is not YAML: {text!r}") from error
    *parents, last = path.split(".")
    target: Any = values
    if "steps" in values and parents and parents[0] in _KINDS:
        parents.insert(0, "steps")
    for name in parents:
        target = _child(target, name, override)
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
        return
    if not isinstance(target, dict):
        raise InputError(f"--set {override!r} does not lead to an option")
    target[last] = value


def _child(target: Any, name: str, override: str) -> Any:
    """Go one name down; a list of steps is searched by kind or index."""
    if isinstance(target, list):
        if name.isdigit() and int(name) < len(target):
            if isinstance(target[int(name)], str):
                target[int(name)] = {target[int(name)]: {}}
            return target[int(name)]
        places = [
            index
            for index, item in enumerate(target)
            if item == name or (isinstance(item, dict) and name in item)
        ]
        if len(places) > 1:
            raise InputError(
                f"--set {override!r} may mean {len(places)} steps; say which with "
                f"steps.{places[0]}.{name} or steps.{places[-1]}.{name}"
            )
        if not places:
            raise InputError(f"--set {override!r} names {name!r}, which the recipe does not have")
        item = target[places[0]]
        if isinstance(item, str) or item[name] is None:
            target[places[0]] = item = {name: {}}
        return item[name]
    if not isinstance(target, dict):
        raise InputError(f"--set {override!r} does not lead to an option")
    if target.get(name) is None:
        target[name] = {}
    return target[name]
