"""The hand-written backward pass of the masked path: every activation, chunk and frozen part."""

from __future__ import annotations

import itertools

import pytest
import torch
from expert_cases import Case, run

from moesaic.ops import masked
from moesaic.ops.masked import experts_masked
from moesaic.ops.reference import experts_reference
from moesaic.ops.select import apply_experts
from moesaic.ops.weights import ACTIVATIONS

CASE = Case(T=9, D=7, E=5, K=5, F=4, bias=True)


def masked_path(h_TD, ids_TK, weights_TK, weights):
    return apply_experts(h_TD, ids_TK, weights_TK, weights, backend="masked")


def check_against_reference(inputs):
    actual, expected = run(masked_path, inputs), run(experts_reference, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_equals_the_reference(name, gated):
    inputs = Case(T=9, D=7, E=5, K=5, F=4, gated=gated, bias=True).inputs(torch.float64)
    check_against_reference(inputs._replace(weights=inputs.weights._replace(activation=name)))


@pytest.mark.parametrize(
    "glu",
    [
        lambda z: z[..., ::2].clamp(max=1.0) * (z[..., 1::2] + 1),
        # A view of its argument, which must stay as it is.
        lambda z: z[..., ::2],
    ],
    ids=["interleaved", "view"],
)
def test_a_glu_without_a_name_equals_the_reference(glu):
    inputs = CASE.inputs(torch.float64)
    check_against_reference(inputs._replace(weights=inputs.weights._replace(glu=glu)))


@pytest.mark.parametrize("size", [1, 2 * 9 * 4, 2**30], ids=["one", "two", "all"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_chunks_do_not_show(monkeypatch, size, gated):
    monkeypatch.setattr(masked, "_CHUNK_CPU", size)
    check_against_reference(
        Case(T=9, D=7, E=5, K=5, F=4, gated=gated, bias=True).inputs(torch.float64)
    )


@pytest.mark.parametrize("learns", list(itertools.product([True, False], repeat=5)), ids=str)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(learns):
    inputs = CASE.inputs(torch.float64)
    expected = run(experts_reference, inputs._replace(ids_TK=torch.arange(5).expand(9, 5)))
    w = inputs.weights
    leaves = [inputs.h_TD, inputs.weights_TK, w.up, w.down, w.up_bias]
    for leaf, wanted in zip(leaves, learns, strict=True):
        leaf.requires_grad_(wanted)
    out_TD = experts_masked(inputs.h_TD, inputs.weights_TK, w)
    assert out_TD.requires_grad == any(learns)
    if any(learns):
        probe_TD = torch.randn(9, 7, generator=torch.Generator().manual_seed(7), dtype=out_TD.dtype)
        out_TD.backward(probe_TD)
    names = ["h", "weights", "up", "down", "up_bias"]
    for name, leaf, wanted in zip(names, leaves, learns, strict=True):
        if wanted:
            torch.testing.assert_close(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("glu", [None, lambda z: z[..., ::2]], ids=["silu", "view"])
def test_backward_may_run_twice_but_not_through_itself(glu):
    inputs = CASE.inputs(torch.float64)
    leaves = [inputs.h_TD, inputs.weights_TK, inputs.weights.down]
    for leaf in leaves:
        leaf.requires_grad_()
    out_TD = experts_masked(inputs.h_TD, inputs.weights_TK, inputs.weights._replace(glu=glu))
    first = torch.autograd.grad(out_TD.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out_TD.square().sum(), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second[0].sum().backward()


def test_backward_inside_autocast_is_that_of_its_forward():
    inputs = CASE.inputs(torch.float32)
    h_TD = inputs.h_TD.requires_grad_()
    out_TD = experts_masked(h_TD, inputs.weights_TK, inputs.weights)
    (expected,) = torch.autograd.grad(out_TD.sum(), h_TD, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (actual,) = torch.autograd.grad(out_TD.sum(), h_TD)
    assert torch.equal(actual, expected)


def test_weights_of_experts_learn_in_float32_where_neurons_are_narrower():
    inputs = Case(T=9, D=7, E=5, K=5, F=4).inputs(torch.bfloat16)
    weights_TE = inputs.weights_TK.float().requires_grad_()
    experts_masked(inputs.h_TD, weights_TE, inputs.weights).sum().backward()
    assert weights_TE.grad.dtype == torch.float32
    # Sums that were rounded to bfloat16 would be multiples of their last place.
    assert not torch.equal(weights_TE.grad, weights_TE.grad.bfloat16().float())
