"""The catalog: complete, well formed, and honest about what works."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic import catalog
from moesaic._errors import InputError, UnknownNameError
from moesaic.recipes import read_recipe

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = catalog.systems()
WORKS = [system for system in SYSTEMS if system.status == "works"]
PLANNED = [system for system in SYSTEMS if system.status == "planned"]
IDS = {"ids": lambda system: system.id}


def test_every_published_system_has_one_row():
    assert len(SYSTEMS) == 81
    for field in ("id", "name", "title", "arxiv"):
        assert len({getattr(system, field) for system in SYSTEMS}) == 81, field


@pytest.mark.parametrize("system", SYSTEMS, **IDS)
def test_row_is_well_formed(system):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", system.id)
    assert re.fullmatch(r"\d{4}\.\d{5}", system.arxiv)
    assert 20 <= len(system.summary) <= 110
    assert system.summary.endswith(".")
    assert system.home
    assert system.parts
    assert all(isinstance(part, str) and part.strip() == part for part in system.parts)


def test_first_systems_work():
    assert {"dsmoe", "dynamic-routing-top-p", "adamoe"} <= {system.id for system in WORKS}


@pytest.mark.parametrize("system", PLANNED, **IDS)
def test_planned_row_claims_nothing(system):
    assert (system.uses, system.check, system.evidence) == ((), None, None)
    assert (system.use_when, system.cost, system.traps, system.example) == ("", "", (), ())


@pytest.mark.parametrize("system", WORKS, **IDS)
def test_working_row_uses_registered_parts(system):
    assert system.uses
    for part in system.uses:
        assert catalog.method(part).name == part.partition(":")[2]


@pytest.mark.parametrize("system", WORKS, **IDS)
def test_working_row_has_a_check(system):
    path, _, node = system.check.partition("::")
    text = (ROOT / path).read_text("utf-8")
    if node:
        assert f"def {node}(" in text


@pytest.mark.parametrize("system", WORKS, **IDS)
def test_working_row_has_evidence_that_says_it_ran(system):
    assert (ROOT / system.evidence).with_suffix(".py").is_file()
    result = json.loads((ROOT / system.evidence).read_text("utf-8"))
    assert result["system"] == system.id
    assert result["ran"] is True


@pytest.mark.parametrize("system", WORKS, **IDS)
def test_working_row_says_when_to_use_it_and_what_it_costs(system):
    for text in (system.use_when, system.cost, *system.traps):
        assert len(text) >= 30, text
        assert text.endswith(".")
    assert len(system.traps) >= 2


@pytest.mark.parametrize("system", WORKS, **IDS)
def test_example_of_a_working_row_runs(system):
    (first, *_) = system.example
    if first.endswith(".yaml"):
        assert system.example == (first,)
        assert read_recipe(ROOT / first).steps
    else:
        exec(compile("\n".join(system.example), system.id, "exec"), {})


def test_get_finds_a_row_by_id():
    assert catalog.get("dsmoe").arxiv == "2502.12455"


def test_unknown_id_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"^system 'dsmo' is unknown; did you mean .*dsmoe"):
        catalog.get("dsmo")


def test_part_without_family_is_refused():
    with pytest.raises(InputError, match=r"^part must be written family:name, got 'top-p'$"):
        catalog.method("top-p")


def test_part_of_unknown_family_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"^family 'rooter' is unknown"):
        catalog.method("rooter:top-p")


def test_catalog_loads_without_torch_and_quickly():
    code = (
        "import sys, moesaic._registry, time; start = time.perf_counter(); "
        "import moesaic.catalog; took = time.perf_counter() - start; "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy; print(took)"
    )
    took_s = min(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    )
    assert took_s < 0.05
