"""Configs are frozen dataclasses; this module builds them strictly from plain data and back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import MethodTable, unknown_name

T = TypeVar("T")


def plain_defaults(cls: type) -> dict[str, Any]:
    """What the fields of a config dataclass are if they are not given, as plain data."""
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = to_plain(field.default_factory())
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = to_plain(field.default)
    return defaults


def build_config(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build a config dataclass from plain data; unknown keys and wrong kinds are errors.

    Args:
        cls: A dataclass, possibly with nested dataclass fields.
        values: Field name to value; lists become tuples where the field is a tuple.
        where: Name of the section, for error messages.

    Returns:
        The dataclass, checked by its own `__post_init__`.

    Raises:
        InputError: If a key is unknown, missing, or its value is of the wrong kind.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be a mapping of options, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UnknownNameError(unknown_name(f"{where} option", str(key), fields))
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where} lacks the option {missing[0]!r}; add it")
    built = {k: _coerce(v, hints[k], where=f"{where}.{k}") for k, v in values.items()}
    return cls(**built)


def method_config(
    table: MethodTable, method: str, options: Mapping[str, Any], *, where: str
) -> Any:
    """Build the settings of a registered method; `preset` gives defaults, others override them.

    Args:
        table: Of its family.
        method: Its name.
        options: Plain data.
        where: Name of the section, for error messages.

    Raises:
        InputError: If the method, the preset or an option is unknown, or a value does not fit.
    """
    config_class = table.load_config(method)
    options = dict(options)
    presets: dict[str, Any] = getattr(config_class, "presets", dict)()
    preset = options.pop("preset", "default" if "default" in presets else None)
    if preset is not None:
        if preset not in presets:
            raise UnknownNameError(unknown_name(f"{method} preset", str(preset), presets))
        base = to_plain(presets[preset])
        # One setting of a router leaves its others as the method has them, not the router's own.
        for name, value in options.items():
            if isinstance(value, dict) and isinstance(base.get(name), dict):
                value = {**base[name], **value}
            base[name] = value
        options = base
    return build_config(config_class, options, where=where)


def is_one_of(value: Any, choices: Iterable[Any]) -> bool:
    """Whether a value is among some; True equals 1, but neither stands for the other."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in choices)


def _coerce(value: Any, hint: Any, *, where: str) -> Any:
    """Check `value` against a type hint and convert what YAML and JSON cannot express."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, hint, where=where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if not is_one_of(value, choices):
            if isinstance(value, str):
                raise UnknownNameError(unknown_name(where, value, map(str, choices)))
            raise InputError(f"{where} must be one of {list(choices)}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_coerce(v, item, where=f"{where}[{i}]") for i, v in enumerate(value))
    if origin is not None:
        kind = dict if issubclass(origin, Mapping) else origin
        if not isinstance(value, kind):
            raise InputError(f"{where} must be a {kind.__name__}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return build_config(hint, value, where=where)  # type: ignore[arg-type]
    return _coerce_scalar(value, hint, where=where)


def _coerce_union(value: Any, hint: Any, *, where: str) -> Any:
    """Try each member of a union, the plainest first."""
    members = typing.get_args(hint)
    if value is None and type(None) in members:
        return None
    problem: InputError | None = None
    for member in members:
        if member is type(None):
            continue
        try:
            return _coerce(value, member, where=where)
        except InputError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _coerce_scalar(value: Any, hint: Any, *, where: str) -> Any:
    """Accept a scalar of the hinted kind; an int stands for a float, a bool never for a number."""
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and hint is not bool:
        raise InputError(f"{where} must be a {hint.__name__}, got {value!r}")
    if not isinstance(value, hint):
        if hint.__name__ == "Path" and isinstance(value, str):
            return hint(value)
        raise InputError(f"{where} must be a {hint.__name__}, got {value!r}")
    return value


def to_plain(config: Any) -> Any:
    """Turn a config into plain data that JSON and YAML can hold."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(v) for v in config]
    if config is None or isinstance(config, (str, int, float, bool)):
        return config
    return str(config)
