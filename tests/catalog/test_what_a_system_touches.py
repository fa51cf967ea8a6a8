"""Adding a system takes its parts, their lines in a table, a row, a test and its evidence.

Nothing else in the package may know its parts by name: whoever routes, trains, saves, counts or
shows a model asks the part. What several methods are built upon may be known, and conversions may
know a part that they make.
"""

import re
from pathlib import Path

import pytest
from test_house import ROOT

from moesaic import catalog
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.losses._table import LOSSES
from moesaic.nn.routers._table import ROUTERS

TABLES = {"router": ROUTERS, "experts": EXPERTS, "loss": LOSSES}
PACKAGE = ROOT / "src" / "moesaic"
SOURCES = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("*.py")}
# What conversions, exports, budgets and benchmarks are about.
COMMON = {"sigmoid-threshold", "sigmoid-top-k", "topk-softmax", "gated", "plain"}
# A cell of the recurrent router has the name of these experts.
NAMESAKES = {"gru": Path("nn/routers/recurrent_top_k.py")}
# Methods that make a part, or are made of it.
USERS = ("conversion", "compression")
LAYERS = [
    system for system in catalog.systems() if system.status == "works" and "nn" in system.home
]


def parts(system):
    """Its routers and experts; words such as `load` name losses and much else."""
    pairs = [use.split(":") for use in system.uses]
    return [(family, name) for family, name in pairs if family in ("router", "experts")]


def own_file(family, name):
    module = TABLES[family][name].target.partition(":")[0]
    return Path(*module.split(".")[1:]).with_suffix(".py")


def knows(family, name):
    """Files that name a part or its module, its own and the tables and rows left out."""
    words = (
        rf"[\"']{re.escape(name)}[\"']|\b{re.escape(TABLES[family][name].target.split(':')[0])}\b"
    )
    return {
        path
        for path, text in SOURCES.items()
        if re.search(words, text)
        and path != own_file(family, name)
        and path.name != "_table.py"
        and path.parts[0] != "catalog"
        and path != NAMESAKES.get(name)
    }


def test_the_first_wave_is_here():
    assert len(LAYERS) >= 16


@pytest.mark.parametrize("system", LAYERS, ids=lambda system: system.id)
def test_a_system_is_counted_on_one_hand(system):
    for family, name in parts(system):
        assert own_file(family, name) in SOURCES
        lines = [row for row in TABLES[family] if row == name]
        assert len(lines) == 1, "one line in its table"
        if name not in COMMON:
            others = {path for path in knows(family, name) if path.parts[0] not in USERS}
            assert not others, f"{name} is known by name in {sorted(map(str, others))}"
    rows = [path for path, text in SOURCES.items() if f'id="{system.id}"' in text]
    assert len(rows) == 1
    assert rows[0].parts[:2] == ("catalog", "rows")
    assert (ROOT / system.check.partition("::")[0]).is_file()
    assert (ROOT / system.evidence).is_file()
    assert (ROOT / system.evidence).with_suffix(".py").is_file()


def test_a_part_that_others_knew_by_name_would_be_found():
    assert knows("router", "cmoe") == {Path("conversion/cmoe.py")}
    assert Path("conversion/dsmoe.py") in knows("router", "sigmoid-threshold")
