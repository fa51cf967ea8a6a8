"""Reading the evaluation record: what must be there is checked, what may be absent is None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moesaic._errors import InputError

SCHEMA = 1
# The kinds of the parent and the baselines, beside which the main model is read.
_NOT_MAIN = ("dense", "static-pruning", "activation-sparsity")


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that this version cannot read.

    Raises:
        InputError: If the schema is another, or there is no list of named models.
    """
    if not isinstance(record, Mapping):
        raise InputError(
            f"the evaluation record must be a JSON object, got {type(record).__name__}; "
            "give the file that `moesaic eval` wrote"
        )
    schema = record.get("schema")
    if schema != SCHEMA:
        raise InputError(
            f"the evaluation record has schema {schema!r}, this version reads schema {SCHEMA}; "
            "evaluate again with `moesaic eval`"
        )
    models = record.get("models")
    if not isinstance(models, Sequence) or isinstance(models, str) or not models:
        raise InputError(
            "the evaluation record has no 'models', and a report needs at least one; "
            "evaluate again with `moesaic eval`"
        )
    for index, model in enumerate(models):
        if not isinstance(model, Mapping) or not isinstance(model.get("name"), str):
            raise InputError(
                f"models[{index}] of the evaluation record has no name; "
                "evaluate again with `moesaic eval`"
            )


def section(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Get a mapping; an absent one is empty.

    Raises:
        InputError: If the value is there and is not a mapping.
    """
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(_wrong(key, "an object", value))
    return value


def items(parent: Mapping[str, Any], key: str) -> list[Any]:
    """Get a list; an absent one is empty.

    Raises:
        InputError: If the value is there and is not a list.
    """
    value = parent.get(key)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise InputError(_wrong(key, "a list", value))
    return list(value)


def entries(parent: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Get a list of mappings; an absent one is empty.

    Raises:
        InputError: If the value is there and is not a list of mappings.
    """
    values = items(parent, key)
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InputError(_wrong(f"{key}[{index}]", "an object", value))
    return values


def number(parent: Mapping[str, Any], key: str) -> float | None:
    """Get a number as it is stored; an absent one is None.

    Raises:
        InputError: If the value is there and is not a number.
    """
    value = parent.get(key)
    return None if value is None else as_number(value, key)


def numbers(parent: Mapping[str, Any], key: str) -> list[float]:
    """Get a list of numbers; an absent one is empty.

    Raises:
        InputError: If the value is there and is not a list of numbers.
    """
    return [as_number(value, f"{key}[{i}]") for i, value in enumerate(items(parent, key))]


def as_number(value: Any, where: str) -> float:
    """Check that a value is a number and return it unchanged.

    Raises:
        InputError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(_wrong(where, "a number", value))
    return value


def text(parent: Mapping[str, Any], key: str, default: str = "") -> str:
    """Get a text; numbers and the like are written out, an absent one is `default`."""
    value = parent.get(key)
    return default if value is None else str(value)


def _wrong(where: str, wanted: str, value: Any) -> str:
    shown = repr(value)
    if len(shown) > 60:
        shown = shown[:57] + "..."
    return (
        f"{where!r} in the evaluation record must be {wanted}, got {shown}; "
        "evaluate again with `moesaic eval`"
    )


def domain_names(record: Mapping[str, Any]) -> list[str]:
    """List every domain of the record once, those of its data first."""
    names = dict.fromkeys(section(section(record, "data"), "domains"))
    for model in entries(record, "models"):
        names.update(dict.fromkeys(section(section(model, "quality"), "domains")))
    names.update(dict.fromkeys(section(section(record, "activation"), "per_domain")))
    return [str(name) for name in names]


def dense_model(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find the dense parent, beside which everything else is read."""
    models = entries(record, "models")
    return next((model for model in models if model.get("kind") == "dense"), None)


def main_model(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find the converted model the report is about: the first that is neither baseline."""
    models = entries(record, "models")
    return next((m for m in models if m.get("kind") not in _NOT_MAIN), None)


def matching_baseline(
    record: Mapping[str, Any], model: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Find the statically pruned model whose active fraction is nearest to that of `model`."""
    wanted = number(section(model, "cost"), "active_ffn_fraction")
    pruned = [m for m in entries(record, "models") if m.get("kind") == "static-pruning"]
    if wanted is None or not pruned:
        return pruned[0] if pruned else None

    def distance(candidate: Mapping[str, Any]) -> float:
        fraction = number(section(candidate, "cost"), "active_ffn_fraction")
        return float("inf") if fraction is None else abs(fraction - wanted)

    return min(pruned, key=distance)


def speed_median(model: Mapping[str, Any], phase: str, key: str = "speed") -> float | None:
    """Get the median tokens per second of a phase, `prefill` or `decode`.

    `key` says where it ran: `speed` in transformers, `engine_speed` in the decode engine.
    """
    return number(section(section(model, key), f"{phase}_tokens_per_s"), "median")
