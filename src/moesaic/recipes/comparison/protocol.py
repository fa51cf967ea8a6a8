"""The protocol as data: what every method has in common, and the methods by name.

Everything that could favour a method is said once, for all of them: the model, the text, what is
calibrated on, what is measured, and the training. A method has its own settings, but not its own
budget, seed or training.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moesaic._config import build_config, method_config, to_plain
from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import MethodInfo
from moesaic.calibration.run import CalibrationConfig
from moesaic.data import DataConfig
from moesaic.evaluation import QuestionsConfig
from moesaic.evaluation.bounds._table import BOUNDS
from moesaic.evaluation.perplexity import QualityConfig
from moesaic.recipes.recipe import METHODS, read_values
from moesaic.training.config import TrainConfig

# What a comparison shows: methods, and the bounds beside them, which are none.
KINDS = {**METHODS, "bound": BOUNDS}
# What a method may have of its own in training: how its routers follow, and memory.
OWN_TRAINING = ("accumulate", "budget_rate", "router_learning_rate")
# What the protocol decides.
_NOT_OPTIONS = {"active": "budgets", "seed": "seeds"}
# A name is also that of a directory.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What is measured, on held-out text.

    Attributes:
        blocks_per_domain: At most so many blocks of each domain are read by each model.
        quality: How they are read.
        seed: Of the choice of blocks.
    """

    blocks_per_domain: int = 16
    quality: QualityConfig = field(default_factory=QualityConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks_per_domain < 1:
            raise InputError(
                f"blocks_per_domain must be at least 1, got {self.blocks_per_domain}; raise it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """A protocol as it is written."""

    model: str
    methods: Any
    kind: Literal["methods"] = "methods"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    heldout: HeldOut = field(default_factory=HeldOut)
    questions: QuestionsConfig = field(default_factory=lambda: QuestionsConfig(per_domain=0))
    train: Any = None
    budgets: tuple[float, ...] = (0.75, 0.5, 0.375, 0.25)
    seeds: tuple[int, ...] = (0, 1, 2)
    trained: tuple[bool, ...] = (False, True)
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A method as it is written, beside the name of its kind."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[float, ...] = ()
    trained: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method of a comparison.

    Attributes:
        name: Here; a method may stand several times with other settings.
        kind: `convert`, `compress` or `bound`.
        method: Registered name.
        options: Settings that differ from its own, without the budget and the seed.
        train: Settings of the training that are its own.
        budgets: Budgets of its own, instead of the protocol's; none for the protocol's.
        trained: Whether it is measured without training, with it, or both; none for as the
            protocol says.
    """

    name: str
    kind: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[float, ...] = ()
    trained: tuple[bool, ...] = ()

    @property
    def info(self) -> MethodInfo:
        """Its record."""
        return KINDS[self.kind][self.method]

    @property
    def config_class(self) -> Any:
        """Dataclass of its settings."""
        return KINDS[self.kind].load_config(self.method)

    @property
    def seeded(self) -> bool:
        """Whether its settings have a seed, so that seeds differ without training."""
        return "seed" in _fields(self.config_class)

    @property
    def static(self) -> bool:
        """Whether the same weights serve every token."""
        return "static" in self.info.abilities

    @property
    def tells_active(self) -> bool:
        """Whether its results say what is active, since the layers of its model do not show it."""
        return "tells-active" in self.info.abilities

    def config(self, active: float, seed: int) -> Any:
        """Its settings at a budget.

        Raises:
            InputError: If they cannot meet it.
        """
        options = {**self.options, "active": active}
        if self.seeded:
            options["seed"] = seed
        where = f"{self.kind} {self.method}"
        return method_config(KINDS[self.kind], self.method, options, where=where)

    def plain(self) -> dict[str, Any]:
        """The method as data."""
        return {
            self.kind: self.method,
            "options": to_plain(self.options),
            "train": to_plain(self.train),
            "budgets": list(self.budgets),
            "trained": list(self.trained),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Everything that a comparison needs.

    Attributes:
        model: The dense parent: a directory, hub name, .gguf file or `package:NAME`.
        dtype: Of the weights; `auto` measures which is fastest here.
        data: The text.
        calibration: How much of it is read to calibrate, once for all methods.
        heldout: What is measured.
        questions: Multiple-choice questions from the same held-out text; none by default, since
            they are slow and need lm-eval.
        train: The training, the same for every method: its tokens, steps, rates and what trains.
            A budget is held where routers can hold one.
        budgets: Requested active fractions of the feed-forward weights.
        seeds: Of conversion and training.
        trained: Whether methods are measured without training, with it, or both.
        plugins: Python modules that register methods, imported first.
        methods: By name, the bounds among them.
    """

    model: str
    dtype: str
    data: DataConfig
    calibration: CalibrationConfig
    heldout: HeldOut
    questions: QuestionsConfig
    train: TrainConfig
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    trained: tuple[bool, ...]
    plugins: tuple[str, ...]
    methods: Mapping[str, Method]

    def common(self) -> dict[str, Any]:
        """What decides every result: a directory of results has one of these."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "data": to_plain(self.data),
            "calibration": to_plain(self.calibration),
            "heldout": to_plain(self.heldout),
            "questions": to_plain(self.questions),
        }

    def plain(self) -> dict[str, Any]:
        """The protocol as data, every setting of its own spelt out."""
        train = to_plain(self.train)
        return {
            **self.common(),
            "train": {name: train[name] for name in train if name not in _NOT_OPTIONS},
            "budgets": list(self.budgets),
            "seeds": list(self.seeds),
            "trained": list(self.trained),
            "plugins": list(self.plugins),
            "methods": {name: method.plain() for name, method in self.methods.items()},
        }

    def budgets_of(self, method: Method) -> tuple[float, ...]:
        """Budgets at which a method is measured."""
        return method.budgets or self.budgets

    def trained_of(self, method: Method) -> tuple[bool, ...]:
        """Whether a method is measured without training, with it, or both."""
        return method.trained or self.trained

    def training(self, method: Method, active: float, seed: int) -> TrainConfig:
        """The training of one cell.

        Args:
            method: Whose own settings count.
            active: Budget to hold; 0 for a model that cannot.
            seed: Of the order of the text.
        """
        return dataclasses.replace(self.train, **{**method.train, "active": active, "seed": seed})


def read_protocol(path: Path, overrides: Sequence[str] = ()) -> Protocol:
    """Read a protocol and apply overrides.

    Args:
        path: A YAML file.
        overrides: `a.b=value` each, the value in YAML.

    Returns:
        The protocol, all names and values checked.

    Raises:
        InputError: Naming the field, the value and the remedy.
    """
    return build_protocol(read_values(path, "protocol", "model and methods", overrides))


def build_protocol(values: Mapping[str, Any]) -> Protocol:
    """Build a protocol from plain data; see `read_protocol`."""
    head = build_config(_Head, values, where="protocol")
    for name in head.plugins:
        import_plugin(name)
    for name in ("budgets", "trained"):
        if not getattr(head, name):
            raise InputError(f"protocol.{name} must have at least one value, got none; give one")
    check_seeds(head.seeds)
    _check_cells("protocol", head.budgets, head.trained)
    if not isinstance(head.methods, dict) or not head.methods:
        raise InputError(
            "protocol.methods must be a mapping of names to methods, such as "
            "{flap: {compress: flap}}"
        )
    protocol = Protocol(
        model=head.model,
        dtype=head.dtype,
        data=head.data,
        calibration=head.calibration,
        heldout=head.heldout,
        questions=head.questions,
        train=_training(head.train),
        budgets=head.budgets,
        seeds=head.seeds,
        trained=head.trained,
        plugins=head.plugins,
        methods={str(name): _method(str(name), item) for name, item in head.methods.items()},
    )
    for method in protocol.methods.values():
        protocol.training(method, 0.0, 0)
        # A name that nobody knows is an error now; a budget that cannot be met is a result later.
        try:
            method.config(protocol.budgets_of(method)[0], 0)
        except UnknownNameError:
            raise
        except InputError:
            continue
    return protocol


def _check_cells(where: str, budgets: Sequence[float], trained: Sequence[bool]) -> None:
    """Refuse budgets that are no fractions, and what is listed twice."""
    _check_distinct(f"{where}.budgets", budgets)
    _check_distinct(f"{where}.trained", trained)
    for active in budgets:
        if not 0.0 < active <= 1.0:
            raise InputError(
                f"{where}.budgets must be in (0, 1], got {active}; 0.5 uses half of the weights"
            )


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that are none, twice there or negative."""
    if not seeds:
        raise InputError("protocol.seeds must have at least one value, got none; give one")
    _check_distinct("protocol.seeds", seeds)
    if min(seeds) < 0:
        raise InputError(f"protocol.seeds must be at least 0, got {min(seeds)}")


def check_name(where: str, name: str) -> None:
    """Refuse a name that cannot be that of a directory."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{where} must be of letters, digits, '.', '_' and '-'; rename it")


def _check_distinct(where: str, given: Sequence[Any]) -> None:
    if len(set(given)) < len(given):
        raise InputError(f"{where} must be a list of distinct values, got {list(given)}")


def import_plugin(name: str) -> None:
    """Import a module that registers parts.

    Raises:
        InputError: If Python does not find it.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"protocol.plugins names {name!r}, which Python does not find; install it or add its "
            "directory to PYTHONPATH"
        ) from error


def _training(values: Any) -> TrainConfig:
    """The training that all methods share."""
    values = values or {}
    if not isinstance(values, dict):
        raise InputError(f"protocol.train must be a mapping of options, got {values!r}")
    for name, source in _NOT_OPTIONS.items():
        if name in values:
            raise InputError(f"protocol.train.{name} comes from {source}; leave it out")
    return build_config(TrainConfig, {**values, "active": 0.0}, where="protocol.train")


def _method(name: str, item: Any) -> Method:
    where = f"protocol.methods.{name}"
    check_name(where, name)
    kinds = [kind for kind in KINDS if isinstance(item, dict) and kind in item]
    if len(kinds) != 1:
        raise InputError(
            f"{where} must have either {' or '.join(KINDS)} with the name of a method, got {item!r}"
        )
    kind = kinds[0]
    rest = {key: value for key, value in item.items() if key != kind and value is not None}
    if "method" in rest:
        raise InputError(f"{where} names its method twice; leave out 'method'")
    head = build_config(_Item, {"method": item[kind], **rest}, where=where)
    if "active" not in _fields(KINDS[kind].load_config(head.method)):
        raise InputError(
            f"{where}: {head.method} has no setting active, so it has no budget; compare others"
        )
    for option, source in _NOT_OPTIONS.items():
        if option in head.options:
            raise InputError(f"{where}.options.{option} comes from {source}; leave it out")
    for option in head.train:
        if option not in OWN_TRAINING:
            raise InputError(
                f"{where}.train.{option} is the same for all methods; set it in protocol.train "
                f"(a method's own are {', '.join(OWN_TRAINING)})"
            )
    _check_cells(where, head.budgets, head.trained)
    trained = head.trained
    if kind == "bound" and "trains" not in KINDS[kind][head.method].abilities:
        if True in trained:
            raise InputError(
                f"{where}.trained must be [false], got {list(trained)}: {head.method} has nothing "
                "to train; leave it out"
            )
        trained = (False,)
    return Method(
        name=name,
        kind=kind,
        method=head.method,
        options=head.options,
        train=head.train,
        budgets=head.budgets,
        trained=trained,
    )


def _fields(config: type) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}
