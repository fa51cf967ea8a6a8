"""Tables of methods and the errors of wrong names."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from moesaic._errors import CheckpointError, InputError, MoesaicError, RunError, UnknownNameError
from moesaic._registry import MethodInfo, MethodTable, load_object, unknown_name


def record(name: str, target: str = "math:sqrt") -> MethodInfo:
    return MethodInfo(
        name=name, target=target, config="fractions:Fraction", summary="one line", paper="ours"
    )


@pytest.fixture
def table() -> MethodTable:
    return MethodTable("fruit", [record("pear"), record("apple"), record("apricot")])


def test_is_a_sorted_mapping(table):
    assert list(table) == ["apple", "apricot", "pear"]
    assert len(table) == 3
    assert "pear" in table
    assert "plum" not in table
    assert table["pear"].name == "pear"
    assert table.get("plum") is None


def test_unknown_name_suggests_the_closest(table):
    with pytest.raises(
        UnknownNameError, match=r"^fruit 'aple' is unknown; did you mean apple or pear\?$"
    ):
        table["aple"]
    # Also for those who look for a KeyError, or a ValueError.
    with pytest.raises(KeyError, match="is unknown"):
        table.load("aple")
    with pytest.raises(ValueError, match="is unknown"):
        table.load_config("aple")


def test_unknown_name_unlike_any_lists_all(table):
    with pytest.raises(UnknownNameError, match=r"^fruit 'xyz' is unknown; known: apple, apricot, "):
        table["xyz"]


def test_at_most_three_suggestions():
    message = unknown_name("field", "aa", ["aa1", "aa2", "aa3", "aa4"])
    assert message.count(" or ") == 2


def test_duplicates_are_refused(table):
    with pytest.raises(ValueError, match=r"^fruit 'pear' is registered twice$"):
        table.register(record("pear"))
    with pytest.raises(ValueError, match="'x' is registered twice"):
        MethodTable("fruit", [record("x"), record("x")])


def test_plug_ins_register(table):
    table.register(record("fig", target="math:floor"))
    assert list(table) == ["apple", "apricot", "fig", "pear"]
    assert table.load("fig")(2.5) == 2


def test_load_imports_the_target(table):
    assert table.load("pear")(9.0) == 3.0
    assert table.load_config("pear").__name__ == "Fraction"
    assert load_object("collections.abc:Mapping").__name__ == "Mapping"


def test_relative_targets_are_of_this_package():
    assert load_object("._errors:InputError") is InputError


def test_import_errors_propagate():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_object("no_such_module:Object")
    with pytest.raises(AttributeError, match="no_such_object"):
        load_object("math:no_such_object")


def test_listing_does_not_import_the_targets():
    code = (
        "import sys; from moesaic._registry import *; "
        "t = MethodTable('x', [MethodInfo(name='a', target='fractions:Fraction', "
        "config='fractions:Fraction', summary='', paper='')]); list(t), t['a']; "
        "print('torch' in sys.modules, 'fractions' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="name"):
        record("x").name = "y"


@pytest.mark.parametrize(
    ("error", "base", "exit_code"),
    [
        (InputError, ValueError, 2),
        (UnknownNameError, KeyError, 2),
        (CheckpointError, ValueError, 2),
        (RunError, RuntimeError, 1),
        (MoesaicError, Exception, 1),
    ],
)
def test_errors_say_their_sentence_and_exit_code(error, base, exit_code):
    raised = error("one sentence")
    assert isinstance(raised, MoesaicError)
    assert isinstance(raised, base)
    # A KeyError alone would print the repr.
    assert str(raised) == "one sentence"
    assert raised.exit_code == exit_code
