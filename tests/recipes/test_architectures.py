"""Architectures at equal counted FLOPs: from the file to the leaderboard."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from comparison_cases import in_process, stable
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_cases import write_text

from moesaic._errors import InputError, RunError, UnknownNameError
from moesaic.evaluation.balance import layer_balance
from moesaic.evaluation.cost import model_cost
from moesaic.models.mixture import build_mixture
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.routers._table import ROUTERS
from moesaic.nn.shape import layer_shapes
from moesaic.recipes.architectures import (
    ArchitectureCell,
    architecture_cells,
    build_architectures,
    compare_architectures,
    estimate_architectures,
    read_architectures,
    write_leaderboard,
)
from moesaic.recipes.architectures.matching import nearest_width
from moesaic.recipes.architectures.measure import curve_of, matched
from moesaic.recipes.comparison import Selection, read_lines
from moesaic.recipes.comparison.process import Outcome

ROOT = Path(__file__).resolve().parents[2]
TOP2 = {
    "experts": 6,
    "router": "topk-softmax",
    "options": {"top_k": 2},
    "losses": {"load-balance": {"coef": 0.01}},
}


def values(root, **options):
    """A protocol of a few tiny architectures, as plain data."""
    return {
        "kind": "architectures",
        "model": {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "width": 48},
        "data": {"sources": [f"notes={Path(root) / 'text'}"], "block": 32},
        "heldout": {"blocks_per_domain": 4},
        "train": {"tokens": 512, "batch_blocks": 2, "checkpoint_every": 3, "learning_rate": 0.01},
        "device": "cpu",
        "seeds": [0],
        "architectures": {
            "dense": {},
            "top-2": TOP2,
            "looks-ahead": {"experts": 6, "router": "expert-choice", "active": 2},
            "gates": {
                "experts": 6,
                "router": "sigmoid-threshold",
                "active": 3,
                "hold": True,
                "losses": {"sparsity": {"coef": 0.01}},
            },
        },
    } | options


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    write_text(root / "text")
    return root


@pytest.fixture(scope="module")
def finished(root):
    protocol = build_architectures(values(root))
    return protocol, compare_architectures(protocol, root / "whole", run=in_process)


def test_every_cell_has_its_line(finished, root):
    protocol, lines = finished
    assert [line["architecture"] for line in lines] == list(protocol.architectures)
    for line in lines:
        assert (line["status"], line["seed"], line["trained_tokens"]) == ("done", 0, 512)
        assert line["flops"]["reference"] == lines[0]["cost"]["flops_per_token"]
        assert line["cost"]["active_parameters"] <= line["cost"]["total_parameters"]
        # Less than bytes at random, log 257 = 5.55.
        assert 1.0 < line["quality"]["loss"] < 5.5
        assert line["curve"][-1][0] == 512
        assert line["curve"][-1][1] < line["curve"][0][1]
        assert line["speed"]["train_tokens_per_s"] > 0
        assert line["train"]["language"] == 1.0
        assert line["train"]["trains"] == "everything"
        assert {"training", "evaluation", "total"} <= line["seconds"].keys()
        assert line["versions"]["moesaic"]
    dense, top2, ahead, gates = lines
    assert dense["balance"] is None
    assert dense["experts_used"] == []
    assert top2["experts_used"] == [2.0, 2.0]
    assert len(top2["balance"]["layers"]) == 2
    # Every expert takes as many.
    assert ahead["balance"]["max_over_mean"] == pytest.approx(1.0)
    assert [line["sees_batch"] for line in lines] == [False, False, True, False]
    assert gates["train"]["active"] == pytest.approx(0.94, abs=0.01)
    assert [line["held"] for line in lines] == [False, False, False, True]


def test_a_cell_costs_what_the_dense_one_costs(finished):
    _, lines = finished
    for line in lines[:2]:
        # A neuron more or less in every expert is what rounding leaves.
        width = line["config"]["layers"][0]["width"] or 48
        assert line["flops"]["ratio"] == pytest.approx(1.0, abs=1 / width)
        assert line["flops"]["measured"] == line["flops"]["planned"]


def test_training_differs_in_the_seed_and_in_what_is_held_alone(finished):
    _, lines = finished
    settings = [dict(line["train"], active=0) for line in lines]
    assert all(one == settings[0] for one in settings)


def test_nothing_of_the_work_is_left_and_nothing_is_done_again(finished, root):
    protocol, lines = finished
    assert not list((root / "whole").rglob("*.safetensors*")) or {
        path.parent.name for path in (root / "whole").rglob("*.safetensors")
    } == {"text"}
    nothing = pytest.fail
    again = compare_architectures(protocol, root / "whole", run=lambda *a: nothing("worked"))
    assert again == lines


def test_a_seed_gives_the_same_and_another_gives_another(finished, root):
    _, lines = finished
    only = Selection(only=("architecture=top-2",))
    protocol = build_architectures(values(root, seeds=[0, 1]))
    again = compare_architectures(protocol, root / "again", only, run=in_process)
    names = ("speed", *("curve",))
    first, second = ({k: v for k, v in line.items() if k not in names} for line in stable(again))
    (before,) = (
        {k: v for k, v in line.items() if k not in names}
        for line in stable(lines)
        if line["architecture"] == "top-2"
    )
    assert first == before
    assert second["quality"]["loss"] != first["quality"]["loss"]


def test_the_leaderboard_ranks_and_says_what_it_does_not_rank(finished, root):
    protocol, lines = finished
    _, files = write_leaderboard(protocol, root / "whole")
    text, page = (Path(files[name]).read_text("utf-8") for name in ("markdown", "report"))
    loss = {line["architecture"]: line["quality"]["loss"] for line in lines}
    best = min(("dense", "top-2", "gates"), key=loss.__getitem__)
    assert f"After 512 tokens {best} has the lowest loss, {loss[best]:.3f} nats per token" in text
    assert "looks-ahead is not ranked: its routing sees other and later tokens." in text
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows[-1] == "looks-ahead (not ranked)" or loss["gates"] > 0
    ranked = [row for row in rows if "not ranked" not in row]
    assert ranked == sorted(ranked, key=loss.__getitem__)
    assert page.count("<svg role=") == 2
    assert "Learning curves" in page


def test_shards_bring_together_what_one_run_has(finished, root, tmp_path):
    protocol, lines = finished
    places = [tmp_path / "a", tmp_path / "b"]
    for number, place in enumerate(places, start=1):
        compare_architectures(protocol, place, Selection(shard=f"{number}/2"), run=in_process)
    board, _ = write_leaderboard(protocol, places[0], places[1:])
    assert [line["architecture"] for line in board.lines] == list(protocol.architectures)
    for line, one in zip(board.lines, lines, strict=True):
        assert line["quality"] == one["quality"]
    with pytest.raises(InputError, match="holds no results of this protocol"):
        write_leaderboard(protocol, places[0], [tmp_path / "nowhere"])


def test_an_interrupted_cell_goes_on(finished, root, tmp_path, monkeypatch):
    protocol, lines = finished
    only = Selection(only=("architecture=top-2",))
    steps = []

    class StoppedError(Exception):
        pass

    def stop(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        if len(steps) == 5:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.training.end_step.EndStep.on_step_end", stop)
        with pytest.raises(StoppedError):
            compare_architectures(protocol, tmp_path, only, run=in_process)
    seen = []
    monkeypatch.setattr(
        "moesaic.training.end_step.EndStep.on_step_end",
        lambda self, args, state, control, **kwargs: seen.append(state.global_step),
    )
    (line,) = compare_architectures(protocol, tmp_path, only, run=in_process)
    # From the checkpoint of step 3.
    assert seen == [4, 5, 6, 7, 8]
    assert line["resumed"]
    assert line["speed"]["train_tokens_per_s"] is None
    (whole,) = (one for one in lines if one["architecture"] == "top-2")
    assert line["quality"] == whole["quality"]
    assert line["curve"] == whole["curve"]


def test_the_dry_run_lists_cells(finished, root):
    _, lines = finished
    cells = architecture_cells(build_architectures(values(root, seeds=[0, 1])))
    assert [cell.key for cell in cells][:2] == ["dense-seed0", "top-2-seed0"]
    wider = build_architectures(values(root, seeds=[0, 1]))
    listed = estimate_architectures(wider, root / "whole", cells)
    assert [one["done"] for one in listed] == [True] * 4 + [False] * 4
    assert listed[5]["seconds"] == pytest.approx(lines[1]["seconds"]["total"], abs=0.06)


def test_a_failed_cell_is_a_line_and_is_tried_again(root, tmp_path):
    protocol = build_architectures(values(root))
    only = Selection(only=("architecture=dense",))

    def fail(piece, log, progress):
        if "cell" in piece:
            return Outcome(status="error", reason="it broke")
        return in_process(piece, log, progress)

    (line,) = compare_architectures(protocol, tmp_path, only, run=fail)
    assert (line["status"], line["reason"]) == ("error", "it broke")
    assert (
        "- dense: it broke"
        in Path(write_leaderboard(protocol, tmp_path)[1]["markdown"]).read_text()
    )
    (line,) = compare_architectures(protocol, tmp_path, only, run=in_process)
    assert line["status"] == "done"


def test_what_cannot_cost_as_little_is_refused_before_any_work(root, tmp_path):
    many = {"experts": 600, "router": "topk-softmax", "options": {"top_k": 599}}
    protocol = build_architectures(values(root, architectures={"many": many}))
    (line,) = compare_architectures(protocol, tmp_path, run=lambda *a: pytest.fail("worked"))
    assert line["status"] == "refused"
    assert "lower active or shared, or raise model.width" in line["reason"]


def test_text_that_would_repeat_is_refused(root, tmp_path):
    train = {**values(root)["train"], "tokens": 1_000_000}
    protocol = build_architectures(values(root, train=train))
    with pytest.raises(RunError, match=r"train.tokens is 1000000, the text has \d+; lower it"):
        compare_architectures(protocol, tmp_path, run=in_process)


ALL_ROUTERS = [
    name
    for name, record in ROUTERS.items()
    if name not in ("cmoe", "noisy-top-k", "mlp-top-k", "nearest-top-k", "linear-top-k")
]


@pytest.mark.parametrize("name", ALL_ROUTERS)
def test_every_router_is_matched_by_counting(name):
    item = {"experts": 6, "shared": 1, "router": name}
    if "variable" in ROUTERS[name].abilities:
        item["active"] = 2
    if name == "recurrent-top-k":
        item["options"] = {"size": 4}  # its cell alone would cost more than this small model
    model = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "width": 96}
    protocol = build_architectures(
        {"kind": "architectures", "model": model, "architectures": {"one": item}}
    )
    found = matched(protocol, "one")
    built = build_mixture(found.mixture)
    fractions = [shape.fraction(found.active) for shape in layer_shapes(built, 96)]
    counted = model_cost(built, fractions, context=128).flops_per_token
    assert counted == found.flops
    # Half a neuron in each of the experts of a token, in both layers, three matrices, two FLOPs.
    assert abs(counted - found.reference_flops) <= 6 * 16 * 2 * (found.active + 1) / 2
    torch.manual_seed(0)
    matched(protocol, "one")
    first = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), first), "counting moves no generator"


FEED_FORWARD = [name for name, record in EXPERTS.items() if "feed-forward" in record.abilities]


@pytest.mark.parametrize("kind", FEED_FORWARD)
def test_every_kind_of_experts_is_matched_by_counting(kind):
    options = {"group_size": 6} if kind == "latent-gated" else {}
    item = {**TOP2, "layer": {"experts": kind, "experts_options": options}}
    protocol = build_architectures(values(".", architectures={"one": item}))
    found = matched(protocol, "one")
    flops = {}
    for width in (found.width - 1, found.width, found.width + 1):
        layers = tuple(dataclasses.replace(one, width=width) for one in found.mixture.layers)
        built = build_mixture(dataclasses.replace(found.mixture, layers=layers))
        fractions = [shape.fraction(2) for shape in layer_shapes(built, 48)]
        flops[width] = model_cost(built, fractions).flops_per_token
    assert flops[found.width] == found.flops
    nearest = min(flops, key=lambda width: abs(flops[width] - found.reference_flops))
    assert nearest == found.width


@settings(max_examples=100, deadline=None)
@given(
    square=st.integers(0, 5),
    line=st.integers(1, 50),
    fixed=st.integers(0, 2000),
    wanted=st.integers(0, 3000),
)
def test_the_nearest_width_is_that_of_trying_all(square, line, fixed, wanted):
    def cost(width):
        return square * width * width + line * width + fixed

    found = nearest_width(cost, wanted)
    if found == 0:
        assert 2 * (cost(1) - wanted) > cost(2) - cost(1)
    else:
        least = min(abs(cost(width) - wanted) for width in range(1, 3001))
        assert abs(cost(found) - wanted) == least


def test_balance_by_hand():
    # Shares 1/2, 1/4, 1/4 and 0: twice the mean of 1/4, entropy 1.5 bits of 2.
    found = layer_balance([4, 2, 2, 0])
    assert (found.max_over_mean, found.dead, found.experts) == (2.0, 1, 4)
    assert found.entropy == pytest.approx(0.75)
    even = layer_balance([3, 3, 3])
    assert (even.max_over_mean, even.entropy, even.dead) == (1.0, pytest.approx(1.0), 0)
    one = layer_balance([0, 9])
    assert (one.max_over_mean, one.entropy, one.dead) == (2.0, 0.0, 1)
    nobody = layer_balance([0, 0])
    assert (nobody.max_over_mean, nobody.entropy, nobody.dead) == (1.0, 0.0, 2)
    assert layer_balance([5]).entropy == 1.0


def test_a_curve_is_means_at_the_last_of_their_steps():
    log = [{"language": float(step), "tokens": 10 * step} for step in range(1, 121)]
    curve = curve_of(log)
    assert len(curve) == 60
    assert curve[0] == [20, 1.5]
    assert curve[-1] == [1200, 119.5]
    assert curve_of(log[:3]) == [[10, 1.0], [20, 2.0], [30, 3.0]]


BROKEN = {
    "none": ({"architectures": {}}, "architectures must be a mapping of names"),
    "name": ({"architectures": {"a/b": {}}}, "must be of letters, digits"),
    "router": (
        {"architectures": {"a": {"experts": 4, "router": "top-q", "active": 1}}},
        "router 'top-q' is unknown; did you mean top-p",
    ),
    "no router": (
        {"architectures": {"a": {"experts": 4}}},
        "experts and router go together, got 4 and ''; a dense network has neither",
    ),
    "option": (
        {"architectures": {"a": {**TOP2, "options": {"topk": 1}}}},
        "a.options option 'topk' is unknown; did you mean top_k",
    ),
    "loss": (
        {"architectures": {"a": {**TOP2, "losses": {"load-balanc": {"coef": 1}}}}},
        "loss 'load-balanc' is unknown; did you mean load-balance",
    ),
    "active": (
        {"architectures": {"a": {"experts": 4, "router": "top-p"}}},
        "a.active must say how many experts a token uses on average, since top-p decides",
    ),
    "too many": (
        {"architectures": {"a": {**TOP2, "active": 7}}},
        r"active must be in \(0, experts=6\], got 7; it counts the routed experts",
    ),
    "hold": (
        {"architectures": {"a": {**TOP2, "active": 2, "hold": True}}},
        "hold needs the router sigmoid-threshold, active and the loss sparsity, whose weight",
    ),
    "layer": (
        {"architectures": {"a": {**TOP2, "layer": {"width": 8}}}},
        "a.layer.width comes from model.width, at equal FLOPs; leave it out",
    ),
    "training": (
        {"architectures": {"a": {**TOP2, "train": {"tokens": 8}}}},
        "a.train.tokens is the same for all; set it in protocol.train",
    ),
    "model": ({"model": {"vocab_size": 9}}, "protocol.model.vocab_size comes from tokenizer"),
    "model dim": ({"model": {"dim": 9}}, "dim must be an even multiple of num_heads=4, got 9"),
    "train": ({"train": {"distill": 1.0}}, "protocol.train.distill comes from the protocol"),
    "seeds": ({"seeds": []}, "seeds must have at least one value, got none; give one"),
    "device": ({"device": "tpu"}, "protocol.device 'tpu' is unknown; did you mean"),
    "unknown": ({"methods": {}}, "protocol option 'methods' is unknown"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_protocol_is_refused(name):
    change, message = BROKEN[name]
    with pytest.raises((InputError, UnknownNameError), match=message):
        build_architectures(values(".") | change)


def test_a_protocol_is_data_and_back(root, tmp_path):
    protocol = build_architectures(values(root))
    plain = json.loads(json.dumps(protocol.plain()))
    assert build_architectures(plain) == protocol
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(values(root)))
    read = read_architectures(path, ["train.tokens=64", "architectures.top-2.options.top_k=3"])
    assert read.train.tokens == 64
    assert read.architectures["top-2"].options == {"top_k": 3}


def test_the_committed_protocol_is_valid():
    protocol = read_architectures(ROOT / "bench" / "architectures.yaml")
    assert protocol.seeds == (0, 1, 2)
    for name in protocol.architectures:
        found = matched(protocol, name)
        assert found.flops == pytest.approx(found.reference_flops, rel=0.01), name
    # Two iterations of one expert, without a word of it in the protocol.
    assert matched(protocol, "chain-of-experts").active == 2.0
    keys = {cell.key for cell in architecture_cells(protocol)}
    assert ArchitectureCell(architecture="top-p", seed=2).key in keys
    assert not read_lines(ROOT / "nowhere")
