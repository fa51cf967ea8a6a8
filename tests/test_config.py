"""Strict configs: every wrong key, kind or choice is an error that names the place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError, UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise InputError(f"rate must be at least 0, got {self.rate}; 0.1 is usual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    steps: int
    mode: Literal["fast", "slow"] = "fast"
    version: Literal[1, 2] = 1
    flag: bool = False
    name: str | None = None
    limit: int | Literal["auto"] = "auto"
    inner: Inner = field(default_factory=Inner)
    parts: tuple[Inner, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    table: dict[str, int] = field(default_factory=dict)
    where: Path = Path("out")
    anything: Any = None


def build(**values: Any) -> Outer:
    return build_config(Outer, {"steps": 3, **values}, where="recipe")


def test_defaults_are_kept():
    assert build() == Outer(steps=3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 7, 7),
        ("mode", "slow", "slow"),
        ("version", 2, 2),
        ("flag", True, True),
        ("name", None, None),
        ("name", "x", "x"),
        ("limit", 5, 5),
        ("limit", "auto", "auto"),
        ("inner", {"rate": 2}, Inner(rate=2.0)),
        ("inner", Inner(rate=0.5), Inner(rate=0.5)),
        ("inner", {"sizes": [3, 4, 5]}, Inner(sizes=(3, 4, 5))),
        ("inner", {"sizes": []}, Inner(sizes=())),
        ("parts", [{"rate": 1.0}, {}], (Inner(rate=1.0), Inner())),
        ("options", {"a": [1]}, {"a": [1]}),
        ("table", {"a": 1}, {"a": 1}),
        ("where", "a/b", Path("a/b")),
        ("where", Path("c"), Path("c")),
        ("anything", {"x": object}, {"x": object}),
    ],
)
def test_values_are_taken(name, value, expected):
    taken = getattr(build(**{name: value}), name)
    assert taken == expected
    assert type(taken) is type(expected)


def test_an_integer_stands_for_a_float():
    rate = build(inner={"rate": 1}).inner.rate
    assert isinstance(rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": True}, r"recipe\.steps must be a int, got True"),
        ({"steps": 1.0}, r"recipe\.steps must be a int, got 1\.0"),
        ({"steps": "1"}, r"recipe\.steps must be a int, got '1'"),
        ({"steps": None}, r"recipe\.steps must be a int, got None"),
        ({"flag": 1}, r"recipe\.flag must be a bool, got 1"),
        ({"flag": "yes"}, r"recipe\.flag must be a bool, got 'yes'"),
        ({"name": 3}, r"recipe\.name must be a str, got 3"),
        ({"limit": True}, r"recipe\.limit must be a int, got True"),
        ({"mode": 3}, r"recipe\.mode must be one of \['fast', 'slow'\], got 3"),
        ({"version": True}, r"recipe\.version must be one of \[1, 2\], got True"),
        ({"inner": 3}, r"recipe\.inner must be a mapping of options, got 3"),
        ({"inner": {"rate": False}}, r"recipe\.inner\.rate must be a float, got False"),
        ({"inner": {"rate": -1}}, r"rate must be at least 0, got -1\.0; 0\.1 is usual"),
        ({"inner": {"sizes": "ab"}}, r"recipe\.inner\.sizes must be a list, got 'ab'"),
        ({"inner": {"sizes": [1, "b"]}}, r"recipe\.inner\.sizes\[1\] must be a int, got 'b'"),
        ({"parts": [{}, {"rate": "x"}]}, r"recipe\.parts\[1\]\.rate must be a float, got 'x'"),
        ({"options": [1]}, r"recipe\.options must be a dict, got \[1\]"),
        ({"table": [1]}, r"recipe\.table must be a dict, got \[1\]"),
        ({"where": 3}, r"recipe\.where must be a Path, got 3"),
        ({"where": True}, r"recipe\.where must be a Path, got True"),
    ],
)
def test_wrong_kinds_name_field_and_value(values, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        build(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stesp": 1}, r"recipe option 'stesp' is unknown; did you mean steps\?"),
        ({"inner": {"rat": 1}}, r"recipe\.inner option 'rat' is unknown; did you mean rate\?"),
        ({"mode": "fats"}, r"recipe\.mode 'fats' is unknown; did you mean fast\?"),
        ({"parts": [{"r": 1}]}, r"recipe\.parts\[0\] option 'r' is unknown; .*rate.*"),
        ({3: 1}, r"recipe option '3' is unknown; known: .*"),
    ],
)
def test_unknown_keys_and_choices_suggest_the_nearest(values, message):
    with pytest.raises(UnknownNameError, match=f"^{message}$"):
        build_config(Outer, {"steps": 3, **values}, where="recipe")


def test_missing_required_field():
    with pytest.raises(InputError, match=r"^recipe lacks the option 'steps'; add it$"):
        build_config(Outer, {}, where="recipe")


def test_values_must_be_a_mapping():
    with pytest.raises(InputError, match=r"^recipe must be a mapping of options, got \[1\]$"):
        build_config(Outer, [1], where="recipe")


def test_plain_data_survives_json_and_back():
    config = Outer(
        steps=1,
        inner=Inner(sizes=(5,)),
        parts=(Inner(rate=2.0), Inner()),
        options={"a": {"b": (1, 2)}},
        where=Path("a/b"),
    )
    plain = json.loads(json.dumps(to_plain(config)))
    assert plain["parts"] == [{"rate": 2.0, "sizes": [1, 2]}, {"rate": 0.1, "sizes": [1, 2]}]
    assert plain["where"] == "a/b"
    again = build_config(Outer, plain, where="recipe")
    # What the config holds as Any comes back as JSON spells it.
    assert again == dataclasses.replace(config, options={"a": {"b": [1, 2]}})
