"""Bounds in a comparison: measured once a budget, never trained, shown apart and never ranked."""

from pathlib import Path

import pytest
from comparison_cases import BOUNDS, in_process, values
from recipe_cases import write_model, write_text

from moesaic._errors import InputError
from moesaic.analysis.comparison import entries, pareto, ranked
from moesaic.recipes.comparison import all_cells, build_protocol, compare, write_comparison


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bounds")
    write_model(root / "dense")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def finished(root):
    methods = {"flap": values(root)["methods"]["flap"], **BOUNDS}
    protocol = build_protocol(values(root, methods=methods, seeds=[3, 4]))
    lines = compare(protocol, root / "out", run=in_process)
    return protocol, {(x["method"], x["active"]): x for x in lines if not x["trained"]}


def test_a_bound_has_one_cell_a_budget_and_is_not_trained(finished):
    protocol, _ = finished
    keys = [cell.key for cell in all_cells(protocol) if cell.method in BOUNDS]
    assert keys == [f"{name}-{active:g}-seed3" for name in BOUNDS for active in (0.75, 0.5)]


def test_a_bound_is_measured_at_what_it_keeps(finished):
    _, lines = finished
    dense = lines["flap", 0.5]["cost"]
    for name in BOUNDS:
        for active in (0.75, 0.5):
            line = lines[name, active]
            assert (line["status"], line["kind"], line["static"]) == ("done", "bound", False)
            assert line["cost"]["active_ffn_fraction"] == pytest.approx(active)
            assert line["results"]["active"] == pytest.approx(active)
    # Beside a pruned model of the same fraction the rest of the network is in use all the same.
    for name in ("neurons", "gates"):
        cost = lines[name, 0.5]["cost"]
        assert cost["active_parameters"] == pytest.approx(dense["active_parameters"], abs=200)
        assert cost["flops_per_token"] == pytest.approx(dense["flops_per_token"], abs=10)
        assert cost["active_parameters"] < cost["total_parameters"]
    assert lines["neurons", 0.5]["quality"] != lines["gates", 0.5]["quality"]


def test_a_bound_stands_apart_and_never_wins(finished, root):
    protocol, _ = finished
    comparison, files = write_comparison(protocol, root / "out")
    found = entries(comparison)
    assert {e.method for e in ranked(found, 0.5, False)} == {"flap"}
    assert {e.method for e in pareto(found, False)} == {"flap"}
    assert not [e for e in found if e.trained and e.method in BOUNDS]
    text = Path(files["markdown"]).read_text("utf-8")
    assert text.index("| bound | 0.75 active | 0.5 active |") < text.index("| blocks | ")
    assert "neurons (bound)" in Path(files["report"]).read_text("utf-8")


def test_a_bound_is_known_before_it_is_measured(root, tmp_path):
    protocol = build_protocol(values(root, methods=BOUNDS))
    compare(build_protocol(values(root, methods=BOUNDS, budgets=[0.5])), tmp_path, run=in_process)
    comparison, _ = write_comparison(protocol, tmp_path)
    assert {(e.kind, e.budget, e.status) for e in entries(comparison)} == {
        ("bound", 0.75, "missing"),
        ("bound", 0.5, "done"),
    }


def test_the_dense_parent_has_one_budget(root, tmp_path):
    protocol = build_protocol(values(root, methods={"dense": {"bound": "dense"}}, trained=[False]))
    lines = compare(protocol, tmp_path, run=lambda *a: pytest.fail("ran"))
    reason = "active must be 1, since the dense parent uses all of its weights, got 0.5; give it "
    assert [line["status"] for line in lines] == ["refused"] * 2
    assert lines[1]["reason"] == reason + "budgets: [1.0]"


def test_a_budget_that_no_blocks_make_is_refused_before_any_work(root, tmp_path):
    options = {"methods": {"blocks": BOUNDS["blocks"]}, "budgets": [0.3]}
    work = pytest.fail
    (line,) = compare(build_protocol(values(root, **options)), tmp_path, run=lambda *a: work("ran"))
    assert line["status"] == "refused"
    assert line["reason"].startswith("active must be a whole number of 4 experts, got 0.3")


@pytest.mark.parametrize("loss", ["teacher", "text"])
def test_the_dense_parent_is_trained_as_methods_are(loss, root, tmp_path):
    on_text = {"distill": 0.0, "language": 1.0} if loss == "text" else {}
    options = {
        "methods": {"dense": {"bound": "dense", "budgets": [1.0]}},
        "seeds": [0, 1],
        "train": {**values(root)["train"], **on_text, "learning_rate": 0.01},
    }
    protocol = build_protocol(values(root, **options))
    free, *trained = compare(protocol, tmp_path, run=in_process)
    assert [line["seed"] for line in trained] == [0, 1]
    for line in (free, *trained):
        assert (line["kind"], line["status"]) == ("bound", "done")
        assert line["cost"]["active_ffn_fraction"] == 1.0
        assert line["cost"]["active_parameters"] == line["cost"]["total_parameters"]
    assert free["quality"]["ratio"] == 1.0
    for line in trained:
        assert line["trained_tokens"] == 256
        ratio = line["quality"]["ratio"]
        # The teacher is the model itself; the text is like the held-out one.
        assert ratio == pytest.approx(1.0, abs=1e-3) if loss == "teacher" else ratio < 0.9
    _, files = write_comparison(protocol, tmp_path)
    text = Path(files["markdown"]).read_text("utf-8")
    assert text.count("| bound | 1 active |") == 2
    assert "no method" not in text


def test_a_wrong_bound_is_refused():
    for item, message in (
        ({"bound": "neuron"}, "bound 'neuron' is unknown; did you mean neuron-bound"),
        ({"bound": "neuron-bound", "options": {"seed": 1}}, "options.seed comes from seeds"),
        ({"bound": "neuron-bound", "trained": [True]}, r"trained must be \[false\], got \[True\]"),
        ({"bound": "neuron-bound", "options": {"by": "gates"}}, "by 'gates' is unknown; did you"),
    ):
        with pytest.raises(InputError, match=message):
            build_protocol(values(".", methods={"one": item}))
