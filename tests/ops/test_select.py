"""Which path is chosen, that it is said once, and that tests can force any."""

from __future__ import annotations

import logging

import pytest
import torch
from expert_cases import Case, run

from moesaic.ops import select
from moesaic.ops.reference import experts_reference
from moesaic.ops.select import apply_experts, choose


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(select, "_said", set())


@pytest.mark.parametrize(
    ("num_tokens", "num_slots", "width", "training", "backend"),
    [
        # The router decides on every expert and learns from all of them.
        (63, 6, 16, True, "masked"),
        (1, 6, 256, True, "masked"),
        # Narrow experts are not worth gathering, unless there are hardly any tokens.
        (63, 6, 127, False, "masked"),
        (5, 6, 127, False, "masked"),
        (4, 6, 127, False, "grouped"),
        (63, 6, 128, False, "grouped"),
        # Fewer slots than experts: skipping pays.
        (63, 3, 16, True, "grouped"),
        (63, 3, 16, False, "grouped"),
    ],
)
def test_rules(num_tokens, num_slots, width, training, backend):
    weights = Case(F=width).inputs(torch.float32).weights
    assert choose(num_tokens, num_slots, weights, training=training) == backend


def test_a_reason_is_said_once(caplog):
    weights = Case().inputs(torch.float32).weights
    with caplog.at_level(logging.INFO, logger="moesaic.ops.select"):
        choose(63, 6, weights, training=True)
        choose(63, 6, weights, training=True)
        choose(63, 3, weights, training=True)
    assert [record.getMessage() for record in caplog.records] == [
        "experts run on the masked path: the router learns from every expert's output",
        "experts run on the grouped path: only chosen experts are computed",
    ]


@pytest.fixture
def paths(monkeypatch):
    taken = []
    for name in ("masked", "grouped", "reference"):
        path = getattr(select, f"experts_{name}")
        monkeypatch.setattr(
            select, f"experts_{name}", lambda *a, n=name, p=path: taken.append(n) or p(*a)
        )
    return taken


@pytest.mark.parametrize("backend", ["reference", "masked", "grouped"])
@pytest.mark.parametrize("K", [3, 6])
def test_forced_path_is_taken_and_gives_the_same(paths, backend, K):
    inputs = Case(K=K, pattern="some-empty").inputs(torch.float64)
    expected = run(experts_reference, inputs)
    actual = run(lambda *a: apply_experts(*a, backend=backend), inputs)
    assert paths == [backend]
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize("leaf", ["h_TD", "weights_TK"])
def test_auto_knows_training_by_its_gradients(paths, leaf):
    inputs = Case(K=6, F=128).inputs(torch.float32)
    apply_experts(*inputs)
    getattr(inputs, leaf).requires_grad_()
    apply_experts(*inputs)
    with torch.no_grad():
        apply_experts(*inputs)
    assert paths == ["grouped", "masked", "grouped"]


def test_empty_slots_are_not_computed_in_training_either(paths):
    inputs = Case(K=6, F=128, pattern="some-empty").inputs(torch.float32)
    inputs.h_TD.requires_grad_()
    apply_experts(*inputs)
    # A router that needs every expert gives all tokens one row of ids.
    apply_experts(*inputs._replace(ids_TK=torch.arange(6).expand(63, 6)))
    assert paths == ["grouped", "masked"]
