"""Chain-of-Experts, arXiv 2506.18945: one layer run several times, routing anew each time."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from nn_cases import expert_outputs, make_layer, tokens
from torch import nn

from moesaic._errors import InputError
from moesaic.nn.layer import (
    LayerConfig,
    MoELayer,
    all_experts_on,
    end_step,
    link_layers,
    pass_state,
    record_routing,
)
from moesaic.nn.shape import layer_shape

E, K, WIDTH, SHARED = 6, 2, 5, 4
RAW = {"top_k": K, "renormalize": False}


def chain(**options):
    settings = {"router_config": RAW, "iteration_residual": "inner", **options}
    return make_layer("topk-softmax", num_experts=E, width=WIDTH, **settings)


def once(moe, router, x_TD):
    """The routed experts of one iteration, written out."""
    probs_TE = (x_TD @ router.weight.T).softmax(-1)
    ranked_TE = probs_TE.argsort(1, descending=True).argsort(1)
    gates_TE = torch.where(ranked_TE < K, probs_TE, 0.0)
    return (gates_TE[:, :, None] * expert_outputs(moe, x_TD)).sum(1)


@pytest.fixture
def h_TD():
    return tokens(63, dtype=torch.float64)


@pytest.mark.parametrize("residual", ["none", "inner", "change"])
@pytest.mark.parametrize("one_router", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_layer_is_the_papers_recursion(h_TD, residual, one_router, iterations):
    moe = chain(iterations=iterations, iteration_residual=residual, one_router=one_router)
    x_TD = h_TD
    for router in moe.turns():
        out_TD = once(moe, router, x_TD)
        x_TD = out_TD if residual == "none" else x_TD + out_TD
    if residual == "change":
        x_TD = x_TD - h_TD
    torch.testing.assert_close(moe(h_TD), x_TD)
    assert len(moe.routers()) == (1 if one_router else iterations)


def test_one_iteration_is_the_usual_mixture(h_TD):
    plain = make_layer("topk-softmax", num_experts=E, width=WIDTH, router_config=RAW)
    for residual, expected in (
        ("none", plain(h_TD)),
        ("inner", h_TD + plain(h_TD)),
        ("change", plain(h_TD)),
    ):
        moe = chain(iteration_residual=residual)
        moe.load_state_dict(plain.state_dict())
        torch.testing.assert_close(moe(h_TD), expected, rtol=0, atol=1e-6)


def test_experts_that_give_nothing_leave_the_input(h_TD):
    for residual, expected in (("inner", h_TD), ("change", 0 * h_TD), ("none", 0 * h_TD)):
        moe = chain(iterations=2, iteration_residual=residual)
        nn.init.zeros_(moe.experts.down_proj)
        assert torch.equal(moe(h_TD), expected)


def test_only_routers_are_added():
    sizes = [
        sum(p.numel() for p in chain(iterations=count, shared_width=SHARED).parameters())
        for count in (1, 2, 3)
    ]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == E * 17
    names = set(chain(iterations=2).state_dict())
    assert names == {
        "router.weight",
        "later_routers.0.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }


def test_what_is_always_on_runs_every_time(h_TD):
    moe = chain(iterations=2, shared_width=SHARED, output_bias=True, bypass_rank=2)
    x_TD = h_TD
    for router in moe.turns():
        routed_TD = once(moe, router, x_TD)
        x_TD = x_TD + routed_TD + moe.shared(x_TD, None) + moe.output_bias + moe.bypass(x_TD)
    torch.testing.assert_close(moe(h_TD), x_TD)


@pytest.mark.parametrize(
    ("iterations", "top_k", "calls"), [(1, 4, 4 + 1), (2, 2, 2 * (2 + 1)), (4, 1, 4 * (1 + 1))]
)
def test_calls_per_token_are_counted(h_TD, iterations, top_k, calls):
    moe = chain(iterations=iterations, router_config={**RAW, "top_k": top_k}, shared_width=WIDTH)
    slots = []
    moe.experts.register_forward_pre_hook(
        lambda experts, args: slots.append(int((args[1].ids_TK < E).sum()))
    )
    moe.shared.register_forward_pre_hook(lambda shared, args: slots.append(len(args[0])))
    moe(h_TD)
    assert sum(slots) == 63 * calls
    # And so says its shape.
    shape = layer_shape(moe, dense_width=WIDTH)
    assert shape.fraction(iterations * top_k) == pytest.approx(calls)


def test_gradient_of_an_expert_is_the_sum_over_iterations(h_TD):
    moe, other = chain(iterations=2), chain(iterations=2)
    weight = moe.experts.down_proj
    moe(h_TD).sum().backward()
    expected = torch.zeros_like(weight)
    for kept in range(2):
        # The same weights, of which one iteration alone learns.
        other.load_state_dict(moe.state_dict())
        turn = []

        def give(experts, args, kept=kept, turn=turn, other=other):
            other.experts.requires_grad_(len(turn) == kept)
            turn.append(None)

        handle = other.experts.register_forward_pre_hook(give)
        out_TD = other(h_TD)
        handle.remove()
        other.experts.requires_grad_(True)
        (gradient,) = torch.autograd.grad(out_TD.sum(), other.experts.down_proj)
        expected += gradient
    torch.testing.assert_close(weight.grad, expected)


def test_the_first_router_learns_through_the_second_iteration(h_TD):
    # The first iteration's output goes nowhere else.
    moe = chain(iterations=2, iteration_residual="none")

    def fix(router, args, routing):
        return replace(routing, weights_TK=routing.weights_TK.detach())

    moe.later_routers[0].register_forward_hook(fix)
    moe(h_TD).sum().backward()
    assert moe.router.weight.grad.any()
    assert moe.later_routers[0].weight.grad is None


def test_every_iteration_is_recorded_and_hears_the_one_before(h_TD):
    moe = chain(iterations=3)
    states = []
    for router in moe.routers():
        router.register_forward_pre_hook(lambda router, args: states.append(args[1]))
    with record_routing(moe) as routings:
        moe(h_TD)
    assert len(routings) == 3
    assert states[0].previous is None
    assert [state.previous for state in states[1:]] == routings[:2]


def test_a_state_goes_on_through_iterations_and_layers():
    layers = nn.ModuleList(
        make_layer(
            "recurrent-top-k",
            num_experts=E,
            router_config={"size": 4, "memory": "passed", "first": False},
            iterations=2,
            iteration_residual="change",
        )
        for _ in range(2)
    )
    first = make_layer("recurrent-top-k", num_experts=E, router_config={"size": 4})
    layers.insert(0, first)
    link_layers(layers)
    h_TD = tokens(5, dtype=torch.float64)
    with pass_state(layers), record_routing(layers) as routings:
        for layer in layers:
            h_TD = h_TD + layer(h_TD)
    memories = [routing.memory_TM for routing in routings]
    assert len(memories) == 5
    assert all(not torch.equal(a, b) for a, b in pairwise(memories))


def test_every_router_hears_the_end_of_a_step(h_TD):
    moe = make_layer(
        "sigmoid-top-k", num_experts=E, router_config={"bias_step": 0.1}, iterations=2
    ).train()
    moe(h_TD).sum().backward()
    before = [router.choice_bias.clone() for router in moe.routers()]
    end_step(moe)
    for router, bias_E in zip(moe.routers(), before, strict=True):
        assert not torch.equal(router.choice_bias, bias_E)


def test_all_experts_on_is_one_pass(h_TD):
    moe = chain(iterations=3)
    with all_experts_on(moe):
        torch.testing.assert_close(moe(h_TD), expert_outputs(moe, h_TD).sum(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, r"iterations must be at least 1, got 0; 2 is usual"),
        (
            {"iterations": 2, "num_experts": 0},
            r"iterations=2 and reuse=1 need routed experts, got num_exp",
        ),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MoELayer(17, LayerConfig(**{"num_experts": E, "width": 5, "router": "top-p", **options}))
