"""bench/conversions.py runs the commands that a user would, and keeps what it does not measure."""

import json
import subprocess

import pytest
import yaml
from comparison_cases import values
from recipe_cases import write_model, write_text
from test_house import ROOT, load

ROWS = json.loads((ROOT / "bench" / "results" / "conversions-smollm2.json").read_text())["rows"]


@pytest.fixture(scope="module")
def script():
    return load(ROOT / "bench" / "conversions.py")


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    root = tmp_path_factory.mktemp("conversions")
    write_model(root / "dense")
    write_text(root / "text")
    path = root / "protocol.yaml"
    path.write_text(yaml.safe_dump(values(root)))
    return path


def test_one_method_is_measured_and_the_others_stay(script, protocol, tmp_path):
    out = tmp_path / "out.json"
    other = {"method": "a", "seconds": 1.0}
    old = {"method": "dsmoe", "seconds": 1e9}
    out.write_text(json.dumps({"model": "m", "rows": [old, other]}))
    script.main(["--protocol", str(protocol), "--only", "dsmoe", "--out", str(out)])
    kept, row = json.loads(out.read_text())["rows"]
    assert kept == other
    assert (row["method"], row["active"], row["options"]["experts"]) == ("dsmoe", 0.5, 4)
    # Importing torch alone takes a second and 100 MB.
    assert 1 < row["seconds"] < 1e9
    assert 1e8 < row["peak_bytes"] < 1e11
    assert row["machine"]["threads"] >= 1


def test_a_command_that_fails_ends_the_run_and_changes_nothing(script, protocol, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--protocol", str(protocol), "--only", "flap", "--active", "7", "--out", str(out)]
    with pytest.raises(subprocess.CalledProcessError):
        script.main(arguments)
    assert not out.exists()


def test_a_name_that_the_protocol_does_not_have_is_refused(script, protocol, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--protocol", str(protocol), "--only", "flip", "--out", str(tmp_path / "o")])
    assert "which is none of dsmoe, flap" in capsys.readouterr().err


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["method"])
def test_the_committed_methods_take_less_than_five_minutes_and_four_gigabytes(row):
    assert row["seconds"] < 300
    assert row["peak_bytes"] < 4e9
    assert row["machine"]["cores"] <= 2
    assert row["commit"]
    assert "-dirty" not in row["commit"]


def test_every_method_of_the_protocol_is_committed_with_its_settings():
    protocol = yaml.safe_load((ROOT / "bench" / "quality.yaml").read_text())
    methods = {
        name: method.get("options", {})
        for name, method in protocol["methods"].items()
        if "bound" not in method
    }
    assert {row["method"]: row["options"] for row in ROWS} == methods
