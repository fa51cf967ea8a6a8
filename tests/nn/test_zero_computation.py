"""MoE++, arXiv 2410.07348: free experts, residuals between layers, the balance of both kinds."""

from __future__ import annotations

import pytest
import torch
from nn_cases import expert_outputs, make_layer, make_loss, make_router, set_scores, tokens
from torch import nn

from moesaic._errors import InputError
from moesaic.nn.free import FreeExperts
from moesaic.nn.layer import pass_state, record_routing
from moesaic.nn.routers._base import RouterState

# Experts 0 to 5; free ones: zero 6, copy 7, constant 8 and 9.
E, N = 6, 10
ZERO, COPY, CONSTANT = 6, 7, 8


def free_layer(**options):
    return make_layer("zero-computation", num_experts=E, router_config=options)


def routed_to(moe, first, second):
    """Make every token choose these two; gives the inputs, unit vectors."""
    scores_N = torch.zeros(N, dtype=torch.float64)
    scores_N[first], scores_N[second] = 5.0, 4.0
    return set_scores(moe.router, scores_N.expand(17, N)), scores_N.softmax(0)


def test_an_expert_beside_zero_counts_alone():
    moe = free_layer()
    h_TD, gates_N = routed_to(moe, 3, ZERO)
    expected = gates_N[3] * expert_outputs(moe, h_TD)[:, 3]
    torch.testing.assert_close(moe(h_TD), expected)


def test_zero_and_copy_skip_the_layer_up_to_a_factor():
    moe = free_layer()
    h_TD, gates_N = routed_to(moe, ZERO, COPY)
    torch.testing.assert_close(moe(h_TD), gates_N[COPY] * h_TD)


def test_a_constant_expert_of_zeros_gives_half_its_input():
    moe = free_layer()
    with torch.no_grad():
        moe.free.mix.zero_()
        moe.free.vector.zero_()
    h_TD, gates_N = routed_to(moe, CONSTANT, ZERO)
    torch.testing.assert_close(moe(h_TD), gates_N[CONSTANT] * h_TD / 2)


def test_constant_experts_are_the_formula():
    moe = free_layer()
    h_TD = tokens(63, dtype=torch.float64)
    weights_TZ = torch.rand(63, 4, dtype=torch.float64)
    expected = weights_TZ[:, 1:2] * h_TD
    for c in range(2):
        parts_T2 = (h_TD @ moe.free.mix[c].T).softmax(1)
        out_TD = parts_T2[:, :1] * h_TD + parts_T2[:, 1:] * moe.free.vector[c]
        expected = expected + weights_TZ[:, 2 + c : 3 + c] * out_TD
    torch.testing.assert_close(moe.free(h_TD, weights_TZ), expected)


def test_layer_is_the_sum_over_all_kinds():
    moe, h_TD = free_layer(top_k=3), tokens(63, dtype=torch.float64)
    probs_TN = (h_TD @ moe.router.weight.T).softmax(-1)
    ranked_TN = probs_TN.argsort(1, descending=True).argsort(1)
    gates_TN = torch.where(ranked_TN < 3, probs_TN, 0.0)
    routing = moe.router(h_TD)
    torch.testing.assert_close(routing.weights_TE(), gates_TN[:, :E])
    torch.testing.assert_close(routing.free_weights_TZ, gates_TN[:, E:])
    routed_TD = (gates_TN[:, :E, None] * expert_outputs(moe, h_TD)).sum(1)
    torch.testing.assert_close(moe(h_TD), routed_TD + moe.free(h_TD, gates_TN[:, E:]))


def test_without_free_experts_it_is_the_usual_mixture():
    moe = free_layer(num_zero=0, num_copy=0, num_constant=0)
    plain = make_layer("topk-softmax", num_experts=E, router_config={"renormalize": False})
    plain.load_state_dict(moe.state_dict())
    h_TD = tokens(63, dtype=torch.float64)
    assert moe.free is None
    torch.testing.assert_close(moe(h_TD), plain(h_TD), rtol=0, atol=1e-6)


def test_no_constant_experts_have_no_weights():
    assert not list(FreeExperts(4, ("zero", "copy")).parameters())
    out_TD = FreeExperts(2, ("zero", "copy"))(torch.ones(1, 2), torch.tensor([[0.5, 0.25]]))
    assert out_TD.tolist() == [[0.25, 0.25]]


class Stack(nn.Module):
    """Three layers, the second of which has no experts, as a decoder runs them."""

    def __init__(self):
        super().__init__()
        self.first = free_layer()
        self.dense = make_layer(num_experts=0, shared_width=4)
        self.last = free_layer(residual=True)

    def forward(self, h_TD):
        with pass_state(self):
            return self.last(self.dense(self.first(h_TD)))


def test_residuals_add_the_mapped_scores_of_the_layer_before():
    model, h_TD = Stack(), tokens(63, dtype=torch.float64)
    with record_routing(model) as routings:
        model(h_TD)
    first, last = routings
    x_TD = model.dense(model.first(h_TD))
    router = model.last.router
    expected = x_TD @ router.weight.T + first.scores_TE @ router.residual.T
    torch.testing.assert_close(last.scores_TE, expected)
    # Nothing is kept for the next pass, nor a hook.
    torch.testing.assert_close(model(h_TD[:5]), model(h_TD)[:5])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_residual_of_zero_does_not_hear_and_another_teaches_the_layer_before():
    model, h_TD = Stack().train(), tokens(63, dtype=torch.float64)
    router = model.last.router
    state = RouterState(previous=model.first.router(h_TD))
    routing = router(h_TD, state)
    routing.weights_TK.sum().backward()
    assert model.first.router.weight.grad.any()
    assert router.residual.grad.any()
    with torch.no_grad():
        router.residual.zero_()
    expected = torch.nn.functional.linear(h_TD, router.weight)
    assert torch.equal(router(h_TD, state).scores_TE, expected)


def test_fresh_residuals_are_zero():
    router = make_router("zero-computation", E, residual=True)
    router.reset_parameters()
    assert not router.residual.any()


def test_no_layer_before_is_an_error():
    router = make_router("zero-computation", E, residual=True)
    for state in (None, RouterState()):
        with pytest.raises(InputError, match=r"residual needs the scores of the layer before, got"):
            router(tokens(5), state)
    other = make_router("zero-computation", E, num_zero=3)(tokens(5))
    with pytest.raises(InputError, match=r"needs 10 scores of 5 tokens .* got \[5, 12\]; give"):
        router(tokens(5), RouterState(previous=other))


MASK_BS = torch.ones(7, 9, dtype=torch.bool)


@pytest.mark.parametrize("tau", [1.0, 0.75, 0.1])
def test_loss_is_the_formula(tau):
    routing = make_router("zero-computation", E)(tokens(63))
    chosen_TK = routing.scores_TE.topk(2).indices
    load_N = torch.bincount(chosen_TK.flatten(), minlength=N) / 63
    eta_N = torch.tensor([1.0] * E + [tau] * (N - E))
    expected = (eta_N * load_N * routing.scores_TE.softmax(-1).mean(0)).sum()
    value = make_loss("heterogeneous-balance", tau=tau)(routing, MASK_BS)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.25])
def test_loss_rests_where_free_experts_have_more_tokens_by_one_over_tau(tau):
    # Two experts, and one free one that stands for 1 / tau of them; top-1 and flat probabilities.
    # With s = 1 / tau, tokens 1, 1 and s of 2 + s: eta f is 1 / (2 + s) for all, so the gradient,
    # p (eta f - its mean), is zero. Experts with neurons have tau 2 / (tau 2 + 1) of the choices.
    router = make_router("zero-computation", 2, top_k=1, num_zero=1, num_copy=0, num_constant=0)
    share = round(1 / tau)
    favourites = [0, 1, *[2] * share]
    # Far too small to bend the probabilities, and enough to decide.
    routing = router(set_scores(router, 1e-6 * torch.eye(3)[favourites]))
    routing.scores_TE.retain_grad()
    mask_BS = torch.ones(1, 2 + share, dtype=torch.bool)
    make_loss("heterogeneous-balance", tau=tau)(routing, mask_BS).backward()
    assert routing.active_T().float().mean().item() == pytest.approx(2 * tau / (2 * tau + 1))
    assert routing.scores_TE.grad.abs().max() < 1e-6


def test_loss_needs_free_experts_and_a_positive_tau():
    with pytest.raises(InputError, match=r"needs a router with free experts, got one without"):
        make_loss("heterogeneous-balance")(make_router("topk-softmax", E)(tokens(63)), MASK_BS)
    with pytest.raises(InputError, match=r"tau must be above 0, got 0.0; 0.75 is the paper's"):
        make_loss("heterogeneous-balance", tau=0.0)
