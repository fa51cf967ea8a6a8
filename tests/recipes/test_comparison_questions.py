"""Questions are asked of the parent and of every kind of cell, and stand beside perplexity."""

import random
from pathlib import Path

import pytest
from comparison_cases import BOUNDS, in_process, values
from recipe_cases import write_model

from moesaic.recipes.comparison import build_protocol, compare, write_comparison

FILES = {"continuation-notes", "last-word-notes"}


def write_words(directory):
    """Documents of words of several letters, as questions need them."""
    words = [a + b + c for a in "bdfgkl" for b in "aeiou" for c in "mnprst"]
    draw = random.Random(0)
    directory.mkdir()
    for index in range(12):
        (directory / f"{index}.txt").write_text(" ".join(draw.choices(words, k=150)))


@pytest.mark.slow
# lm-eval and what it imports warn.
@pytest.mark.filterwarnings("default")
def test_questions_are_asked_of_the_parent_and_of_every_cell(tmp_path):
    write_model(tmp_path / "dense")
    write_words(tmp_path / "text")
    options = {
        "questions": {"per_domain": 3, "passage_words": 8, "continuation_words": 2},
        "methods": {
            **values(tmp_path)["methods"],
            **BOUNDS,
            "parent": {"bound": "dense", "budgets": [1.0], "trained": [True]},
        },
        "budgets": [0.5],
        "data": {
            "sources": [f"notes={tmp_path / 'text'}"],
            "block": 32,
            "heldout_fraction": 0.5,
        },
    }
    protocol = build_protocol(values(tmp_path, **options))
    lines = compare(protocol, tmp_path / "out", run=in_process)
    cells = {(line["method"], line["trained"]) for line in lines}
    methods = {(name, trained) for name in ("dsmoe", "flap") for trained in (False, True)}
    assert cells == methods | {(name, False) for name in BOUNDS} | {("parent", True)}
    comparison, files = write_comparison(protocol, tmp_path / "out")
    for record in (*lines, comparison.dense):
        assert record.get("status", "done") == "done"
        assert record["accuracy"].keys() == FILES
        for found in record["accuracy"].values():
            assert 0 <= found["acc_low"] <= found["acc"] <= found["acc_high"] <= 1
            assert found["acc_low"] < found["acc_high"]
            assert found["questions"] == 3
    page = Path(files["report"]).read_text("utf-8")
    assert all(f'">{name}</th>' in page for name in FILES)
    table = Path(files["markdown"]).read_text("utf-8").partition("### Accuracy on questions")[2]
    rows = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("|")]
    assert rows[0] == "method"
    assert rows[2] == "dense parent"
    assert sorted(rows[3:]) == sorted(
        ["dsmoe", "flap (static)"] * 2 + [f"{name} (bound)" for name in (*BOUNDS, "parent")]
    )
