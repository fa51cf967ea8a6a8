"""What the script for DSMoE is made of does what it says."""

import copy

import pytest
import torch

from moesaic.nn.layer import moe_layers

WINDOWS = 2


@pytest.fixture
def script(evidence):
    return evidence("dsmoe")


@pytest.fixture
def dense(evidence):
    return evidence("_common").tiny_llama(0, layers=2, dim=16, width=32)


@pytest.fixture
def held():
    generator = torch.Generator().manual_seed(0)
    return {d: torch.randint(256, (600,), generator=generator) for d in ("prose", "code")}


def test_text_is_cut_between_documents(script):
    train, held = script.domain_text("code", 300_000, 100_000)
    assert (len(train), len(held)) == (300_000, 100_000)
    known, held_lines = (
        {line for line in bytes(side.tolist()).split(b"\n") if len(line) > 60}
        for side in (train, held)
    )
    # Files share some long lines, licences for one, but no file is on both sides.
    assert len(held_lines & known) < 0.05 * len(held_lines)
    again, _ = script.domain_text("code", 300_000, 100_000)
    assert torch.equal(again, train)


def test_batches_hold_as_much_of_each_kind(script):
    draw = script.drawing({"prose": torch.zeros(500).long(), "code": torch.ones(500).long()}, 0)
    ids_BS = draw()
    assert ids_BS.shape == (script.BATCH, script.LENGTH)
    assert ids_BS.float().mean() == 0.5


@pytest.mark.parametrize("count", [2, 5])
def test_count_is_matched_by_the_threshold(script, dense, held, count):
    model = script.convert(dense, "straight-through", 0)
    for layer in moe_layers(model):
        layer.router.weight.data.mul_(20)
    found = script.at_count(model, count, held, WINDOWS)
    assert abs(found["active"] - count) < 0.02
    measured = script.measure(model, held, WINDOWS)
    assert (measured["loss"], measured["active"]) == (found["loss"], found["active"])


def test_ways_start_from_the_same_blocks_and_seeds_differ_in_routers(script, dense):
    models = {route: script.convert(dense, route, 0) for route in script.ROUTER_RATE}
    ours = moe_layers(models["straight-through"])[0]
    for route in ("hard", "soft"):
        layer = moe_layers(models[route])[0]
        assert layer.router.config.estimator == route
        assert torch.equal(layer.router.weight, ours.router.weight)
        assert torch.equal(layer.experts.down_proj, ours.experts.down_proj)
    top = moe_layers(models["top-3"])[0]
    torch.testing.assert_close(top.experts.down_proj, ours.experts.down_proj * 8 / 3)
    assert models["straight-through"].loss_terms["sparsity"].coef == script.SPARSE_COEF
    other = moe_layers(script.convert(dense, "straight-through", 1))[0]
    assert not torch.equal(other.router.weight, ours.router.weight)


def test_routers_learn_at_their_own_rate(script, dense, evidence):
    model = script.convert(dense, "straight-through", 0)
    before = copy.deepcopy(model.state_dict())
    ids_BS = torch.arange(2 * 16).reshape(2, 16)
    evidence("_common").optimise(model, lambda: ids_BS, 2, 0.0, router_rate=0.1)
    moved = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert moved == {name for name in before if ".router." in name}


def test_curve_has_equal_distances(script, dense, held):
    draw = script.drawing(held, 0)
    curve = script.train_on(copy.deepcopy(dense), draw, 12, None, held, WINDOWS)
    per_point = 2 * script.BATCH * script.LENGTH
    assert [point["tokens"] for point in curve] == [per_point * n for n in range(1, 7)]
    assert all(point["active"] == script.EXPERTS for point in curve)
