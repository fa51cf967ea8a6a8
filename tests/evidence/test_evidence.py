"""Evidence scripts run, and committed results say what their numbers say."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "adamoe",
    "alf_lb",
    "cdsp_moe",
    "chain_of_experts",
    "comet",
    "deepseekmoe",
    "dsmoe",
    "dynamic_routing_top_p",
    "evomoe",
    "hecto",
    "moe_plus_plus",
    "mole_latent_experts",
    "moge",
    "rexmoe",
    "rmoe",
    "selective_sinkhorn",
    "sigma_moe_tiny",
    "sonicmoe",
    "thor",
    "union_of_experts",
)


@pytest.fixture
def script(request, evidence):
    return evidence(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("script", NAMES, indirect=True)
def test_scripts_run(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    record = script.main(["--quick", "--out", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(record))
    assert (record["holds"], record["sentence"]) == script.judge(record["results"])
    committed = json.loads((ROOT / "evidence" / f"{script.__name__[9:]}.json").read_text())
    assert record["config"].keys() == committed["config"].keys()


@pytest.mark.parametrize("script", NAMES, indirect=True)
def test_committed_results_follow_from_their_numbers(script):
    name = script.__name__.rpartition(".")[2]
    record = json.loads((ROOT / "evidence" / f"{name}.json").read_text())
    assert record["ran"]
    assert record["date"] >= "2026"
    assert len(record["commit"]) == 40
    assert record["machine"]["cores"] >= 1
    assert len(record["results"]["seeds"]) >= 2
    holds, sentence = script.judge(record["results"])
    assert holds == record["holds"]
    assert sentence == record["sentence"]
