"""What was predicted of the choices in DSMoE: by the committed protocol, and what we say of it."""

import pytest
from committed import check_line
from test_house import ROOT, hooks

from moesaic.recipes.comparison import read_protocol
from moesaic.recipes.comparison.lines import PREDICTIONS
from moesaic.recipes.comparison.run import grid_of

PROTOCOL = read_protocol(ROOT / "bench" / "choices.yaml")
LINES = grid_of(PROTOCOL).lines(ROOT / "bench" / "results" / "choices", PREDICTIONS)
FOUND = {cell.method: line["prediction"] for cell, line in LINES.items()}


@pytest.mark.parametrize("cell", LINES, ids=lambda cell: cell.key)
def test_predictions_are_those_of_the_protocol_from_a_clean_tree(cell):
    check_line(PROTOCOL, cell, LINES[cell])


@pytest.mark.parametrize("name", FOUND)
def test_every_prediction_is_of_dsmoe_at_its_budget(name):
    found, (budget,) = FOUND[name], PROTOCOL.budgets
    assert PROTOCOL.methods[name].method == "dsmoe"
    assert 1 < found["low"] <= found["ratio"] <= found["high"]
    assert found["budget"] == budget
    assert abs(found["active"] - budget) <= 0.02


def test_the_rule_keeps_what_loses_least_of_all_that_was_tried():
    others = [p["ratio"] for name, p in FOUND.items() if name.startswith("inputs-")]
    assert len(others) >= 4
    assert FOUND["thresholds"]["ratio"] <= min(others)


def test_smaller_blocks_lose_less():
    sizes = [f"experts-{experts}" for experts in (8, 16, 32, 64)]
    ratios = [FOUND[name]["ratio"] for name in (*sizes, "whole-blocks", "experts-192")]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("name", ["partition-contiguous", "refit-false"])
def test_what_loses_more_is_above_the_interval(name):
    assert FOUND[name]["ratio"] > FOUND["whole-blocks"]["high"]


def test_the_order_in_the_model_loses_far_more():
    assert FOUND["partition-contiguous"]["low"] > FOUND["refit-false"]["high"]


@pytest.mark.parametrize(
    "name",
    [
        "partition-learned",
        "shared-12",
        "router-rank-32",
        "compensate",
        "bypass-0",
        "allocation-uniform",
    ],
)
def test_what_is_not_told_apart_is_within_the_interval(name):
    ours = FOUND["whole-blocks"]
    assert ours["low"] <= FOUND[name]["ratio"] <= ours["high"]


def test_every_choice_of_the_protocol_was_tried():
    assert FOUND.keys() == PROTOCOL.methods.keys()


def test_the_page_shows_every_prediction():
    page = hooks.render("<!-- settings -->")
    rows = [row for row in page.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == len(FOUND)
    for name, found in FOUND.items():
        (row,) = (row for row in rows if row.startswith(f"| {name} | "))
        assert f"{found['ratio']:.3f}" in row
