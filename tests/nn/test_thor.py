"""THOR, arXiv 2110.04260: what is drawn when, and what its loss says of two passes."""

from __future__ import annotations

import math

import pytest
import torch
from nn_cases import expert_outputs, make_layer, make_loss, make_router, tokens
from torch import nn

from moesaic._errors import InputError
from moesaic.nn.layer import link_layers, record_routing
from moesaic.nn.losses._base import Passes
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routers.stochastic import Stochastic, StochasticConfig

E = 4


def thor_layer(**options):
    return make_layer("stochastic", num_experts=E, router_config=options)


def alike(moe):
    """Give all experts the weights of the first."""
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    return moe


@pytest.mark.parametrize("evaluation", ["token", "sequence", "all"])
def test_equal_experts_are_the_dense_network(evaluation):
    moe, h_BSD = alike(thor_layer(evaluation=evaluation)), tokens(63).double().reshape(3, 21, 17)
    expected = expert_outputs(moe, h_BSD.reshape(63, 17))[:, 0].reshape(3, 21, 17)
    for training in (True, False):
        torch.testing.assert_close(moe.train(training)(h_BSD), expected, rtol=0, atol=1e-6)


def test_in_training_one_expert_runs_and_learns():
    moe, h_TD = thor_layer().train(), tokens(63, dtype=torch.float64)
    torch.manual_seed(0)
    with record_routing(moe) as routings:
        out_TD = moe(h_TD)
    (drawn,) = routings[0].ids_TK.unique().tolist()
    torch.testing.assert_close(out_TD, expert_outputs(moe, h_TD)[:, drawn])
    out_TD.sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad.flatten(1).any(1).tolist() == [e == drawn for e in range(E)]


def test_layers_draw_apart():
    first, second = thor_layer().train(), thor_layer().train()
    torch.manual_seed(0)
    h_TD = tokens(1, dtype=torch.float64)
    pairs = {(int(first.router(h_TD).ids_TK), int(second.router(h_TD).ids_TK)) for _ in range(200)}
    assert len(pairs) == E**2


def test_tokens_draw_in_evaluation():
    router = make_router("stochastic", E)
    torch.manual_seed(0)
    counts_E = router(tokens(4000)).counts_E().double()
    # Three deviations of a binomial.
    assert (counts_E / 4000 - 1 / E).abs().max() < 3 * math.sqrt(1 / E * (1 - 1 / E) / 4000)


def sequences(router, num_sequences, length, seed_of_torch):
    torch.manual_seed(seed_of_torch)
    state = RouterState(num_sequences=num_sequences)
    ids_TK = router(tokens(num_sequences * length), state).ids_TK
    return ids_TK.reshape(num_sequences, length)


def test_sequences_draw_once_and_keep_their_draw():
    router = make_router("stochastic", E, evaluation="sequence")
    long_BS = sequences(router, 400, 5, seed_of_torch=0)
    assert (long_BS == long_BS[:, :1]).all()
    # One position at a time, whatever else is drawn in between.
    assert torch.equal(sequences(router, 400, 1, seed_of_torch=1), long_BS[:, :1])
    counts_E = torch.bincount(long_BS[:, 0], minlength=E).double()
    assert (counts_E / 400 - 1 / E).abs().max() < 3 * math.sqrt(1 / E * (1 - 1 / E) / 400)
    other = Stochastic(17, E, StochasticConfig(evaluation="sequence", seed=1)).eval()
    assert not torch.equal(sequences(other, 400, 1, seed_of_torch=0), long_BS[:, :1])


def test_linked_layers_draw_other_experts_for_a_sequence():
    layers = nn.ModuleList(thor_layer(evaluation="sequence").eval() for _ in range(2))
    link_layers(layers)
    first, second = (sequences(layer.router, 400, 1, seed_of_torch=0) for layer in layers)
    assert not torch.equal(first, second)
    # As often alike as chance has it.
    assert abs(float((first == second).double().mean()) - 1 / E) < 0.1


def test_a_layer_tells_its_router_the_sequences():
    moe = thor_layer(evaluation="sequence").eval()
    with record_routing(moe) as routings:
        for shape in ((6, 7, 17), (2, 3, 7, 17), (42, 17), (0, 7, 17)):
            moe(torch.zeros(shape, dtype=torch.float64))
    assert torch.equal(routings[0].ids_TK, routings[1].ids_TK)
    assert (routings[0].ids_TK.reshape(6, 7).diff(dim=1) == 0).all()
    assert len(routings[2].ids_TK.unique()) == 1
    with pytest.raises(InputError, match=r"to know the sequences of 5 tokens, got None; run"):
        moe.router(tokens(5))


def test_all_is_the_mean_of_the_experts():
    moe, h_TD = thor_layer(evaluation="all").eval(), tokens(63, dtype=torch.float64)
    torch.testing.assert_close(moe(h_TD), expert_outputs(moe, h_TD).mean(1))


def test_consistency_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): half of (1/4)(log 2) + (-1/4)(log 2/3) = 1/8 log 3.
    both = Passes(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    value = make_loss("consistency")(both, torch.ones(1, 1, dtype=torch.bool))
    assert value.item() == pytest.approx(math.log(3) / 8)


def test_consistency_is_half_of_both_divergences():
    first, second = tokens(15, 9, seed=1), tokens(15, 9, seed=2)
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)

    def kl(a, b):
        return torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean")

    value = make_loss("consistency")(Passes(first, second), torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(value, (kl(log_p, log_q) + kl(log_q, log_p)) / 2)
