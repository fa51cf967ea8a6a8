"""Weights that are views of another layout, and gates that no activation's name describes.

Shapes: T tokens, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as nnf
from expert_cases import Case, run

from moesaic.ops.grouped import experts_grouped
from moesaic.ops.reference import experts_reference
from moesaic.ops.select import apply_experts

BACKENDS = ["reference", "masked", "grouped"]


def stored_in_x_out(inputs):
    """The same values in memory as [E, D, 2F] and [E, F, D], seen out x in."""
    views = {
        name: getattr(inputs.weights, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("up", "down")
    }
    return inputs._replace(weights=inputs.weights._replace(**views))


def in_turn(z):
    """Gate and up neurons in turn, clamped: the gate of gpt-oss with other numbers."""
    gate, up = z[..., ::2].clamp(max=0.7), z[..., 1::2].clamp(-0.7, 0.7)
    return (up + 1) * gate * (1.7 * gate).sigmoid()


@pytest.fixture
def poisoned():
    """Fill what torch leaves uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("pattern", ["mixed", "one-idle", "some-empty", "all-empty"])
# Sizes and types that take the fused product, and those that cannot.
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(16, torch.float32), (5, torch.float32), (16, torch.float64)],
    ids=["fused", "odd", "float64"],
)
def test_views_equal_the_reference(poisoned, backend, bias, pattern, width, dtype):
    inputs = Case(D=24, F=width, bias=bias, pattern=pattern).inputs(dtype)
    inputs = inputs._replace(weights=inputs.weights._replace(activation="", glu=in_turn))
    expected = run(experts_reference, inputs)
    views = stored_in_x_out(inputs)
    assert not views.weights.up.is_contiguous()
    actual = run(partial(apply_experts, backend=backend), views)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("view", [False, True], ids=["out x in", "in x out"])
def test_grouped_multiplies_the_memory_it_is_given(monkeypatch, view):
    inputs = Case(D=24, F=16).inputs(torch.float32)
    if view:
        inputs = stored_in_x_out(inputs)
    seen = []
    fused = nnf.grouped_mm
    monkeypatch.setattr(
        nnf, "grouped_mm", lambda x, w, offs: seen.append(w) or fused(x, w, offs=offs)
    )
    experts_grouped(*inputs)
    assert [w.data_ptr() for w in seen] == [
        inputs.weights.up.data_ptr(),
        inputs.weights.down.data_ptr(),
    ]
    # A view of a view is the layout in memory again.
    assert all(w.is_contiguous() == view for w in seen)


def test_a_gate_of_its_own_by_hand():
    # h = 1, gate 2 becomes 0.7, up 3 becomes 0.7: 1.7 * 0.7 * sigmoid(1.19) = 0.91242.
    inputs = Case(T=1, D=1, E=1, K=1, F=1).inputs(torch.float64)
    weights = inputs.weights._replace(
        up=torch.tensor([[[2.0], [3.0]]], dtype=torch.float64),
        down=torch.ones(1, 1, 1, dtype=torch.float64),
        activation="",
        glu=in_turn,
    )
    one = torch.ones(1, 1, dtype=torch.float64)
    for backend in BACKENDS:
        out_TD = apply_experts(one, torch.zeros(1, 1, dtype=torch.int64), one, weights, backend)
        assert out_TD.item() == pytest.approx(0.91242, abs=1e-5)
