"""The noisy top-k router: its two gates, its noise, and the chance of being chosen."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as nnf
from nn_cases import make_layer, make_loss, make_router, tokens

from moesaic.nn.layer import record_routing

E, K, D = 6, 2, 17


def in_training(num_tokens=63, *, seed=0, **options):
    """A router in training, its inputs and its routing."""
    router = make_router("noisy-top-k", E, seed=seed, **options).train()
    h_TD = tokens(num_tokens)
    torch.manual_seed(seed)
    return router, h_TD, router(h_TD)


def clean_and_spread(router, h_TD):
    """Scores without noise, and the deviation of their noise, from the formulas alone."""
    clean_TE = h_TD @ router.weight.T
    if router.mix is not None:
        clean_TE = clean_TE.tanh() @ router.mix.T
    return clean_TE, nnf.softplus(h_TD @ router.noise.T) + 0.01


@pytest.mark.parametrize("gate", ["mlp", "linear"])
def test_evaluation_is_a_softmax_of_the_best_scores(gate):
    router, h_TD = make_router("noisy-top-k", E, gate=gate, scale=3.0), tokens(63)
    routing = router(h_TD)
    clean_TE, _ = clean_and_spread(router, h_TD)
    torch.testing.assert_close(routing.scores_TE, clean_TE)
    best_TK, ids_TK = clean_TE.topk(K, dim=-1)
    assert torch.equal(routing.ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, 3.0 * best_TK.softmax(-1))
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.full((63,), 3.0))


def test_by_hand():
    # Scores log 1, log 3, log 2.5, log 1.5: the top 2 of a softmax are 3 and 2.5 of 5.5; E / K = 2.
    router = make_router("noisy-top-k", 4, gate="linear", top_k=2, scale=2.0)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([1.0, 3.0, 2.5, 1.5]).log()
    routing = router(torch.eye(1, D))
    assert routing.ids_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[12 / 11, 10 / 11]]))


def test_noise_has_the_deviation_of_the_formula():
    # One token many times: the noise is then a sample.
    router = make_router("noisy-top-k", E).train()
    h_TD = tokens(1).expand(20_000, D)
    torch.manual_seed(0)
    noise_TE = router(h_TD).scores_TE[:, :E] - router.eval()(h_TD).scores_TE
    _, spread_TE = clean_and_spread(router, h_TD)
    torch.testing.assert_close(noise_TE.mean(0), torch.zeros(E), atol=0.05, rtol=0)
    torch.testing.assert_close(noise_TE.std(0), spread_TE[0], atol=0, rtol=0.03)


def test_noise_starts_at_the_softplus_of_zero():
    router = make_layer("noisy-top-k", dtype=torch.float32).router
    router.reset_parameters()
    assert not router.noise.any()
    h_TD = tokens(20_000)
    torch.manual_seed(0)
    noise_TE = router.train()(h_TD).scores_TE[:, :E] - router.eval()(h_TD).scores_TE
    assert noise_TE.std().item() == pytest.approx(math.log(2) + 0.01, rel=0.02)


def test_the_noise_is_that_of_the_global_generator():
    router, h_TD = make_router("noisy-top-k", E).train(), tokens(63)
    torch.manual_seed(5)
    first = router(h_TD)
    second = router(h_TD)
    torch.manual_seed(5)
    assert torch.equal(router(h_TD).scores_TE, first.scores_TE)
    assert not torch.equal(second.scores_TE, first.scores_TE)


def test_training_weighs_the_noisy_scores():
    router, h_TD, routing = in_training(scale=3.0)
    best_TK, ids_TK = routing.scores_TE[:, :E].topk(K, dim=-1)
    assert torch.equal(routing.ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, 3.0 * best_TK.softmax(-1))
    clean_TE, _ = clean_and_spread(router, h_TD)
    assert not torch.equal(clean_TE.topk(K).indices, ids_TK)


def test_chance_is_that_of_drawing_ones_own_noise_again():
    router, h_TD, routing = in_training(num_tokens=3)
    noisy_TE, inside_TE = routing.scores_TE.split(E, dim=1)
    clean_TE, spread_TE = clean_and_spread(router, h_TD)
    draws = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    for t in range(3):
        for e in range(E):
            # In the top k: fewer than K of the others are above.
            others = torch.cat([noisy_TE[t, :e], noisy_TE[t, e + 1 :]])
            bar = others.sort(descending=True).values[K - 1]
            again = clean_TE[t, e] + draws * spread_TE[t, e]
            share = (again > bar).float().mean().item()
            chance = torch.special.ndtr(inside_TE[t, e]).item()
            assert chance == pytest.approx(share, abs=0.01), (t, e)


def test_chance_is_judged_by_noisy_scores_not_by_the_noise():
    # Scores 10, 9, 1 and noise so small that it decides nothing, top 2 of 3. The experts 0 and 1
    # are in for certain and 2 is out for certain. Comparing the noise alone with the third score
    # would take the bar of the last one inside for all, where expert 1 is at its own bar: near 1/2.
    router = make_router("noisy-top-k", 3, gate="linear", top_k=2).train()
    with torch.no_grad():
        router.noise.fill_(-100.0)
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([10.0, 9.0, 1.0])
    inside_TE = router(torch.eye(1, D)).scores_TE[:, 3:]
    assert torch.special.ndtr(inside_TE).tolist() == [[1.0, 1.0, 0.0]]


def test_load_teaches_gate_and_noise():
    router, _, routing = in_training()
    make_loss("load")(routing, torch.ones(7, 9, dtype=torch.bool)).backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_balancing_evens_the_load():
    # A gate that prefers expert 0 for every token, taught by the losses alone.
    router = make_router("noisy-top-k", E, gate="linear").train()
    h_TD = tokens(256)
    h_TD[:, 0] = 1.0
    with torch.no_grad():
        router.weight.mul_(0.1)
        router.weight[0, 0] += 4.0
        router.noise.zero_()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    torch.manual_seed(0)
    mask_BS = torch.ones(1, 256, dtype=torch.bool)
    before = router.eval()(h_TD).counts_E()
    router.train()
    for _ in range(150):
        routing = router(h_TD)
        loss = make_loss("load")(routing, mask_BS) + make_loss("importance")(routing, mask_BS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = router.eval()(h_TD).counts_E()
    assert before.max() == 256
    assert after.max() < 150


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_all_experts_leave_nothing_to_chance(training):
    router = make_router("noisy-top-k", E, top_k=E).train(training)
    routing = router(tokens(63))
    assert routing.scores_TE.shape == (63, E)
    assert (routing.active_T() == E).all()
    value = make_loss("load")(routing, torch.ones(7, 9, dtype=torch.bool))
    assert value.item() == 0.0


def test_linear_gate_starts_at_zero_and_learns():
    moe = make_layer("noisy-top-k", dtype=torch.float32, router_config={"gate": "linear"}).train()
    moe.router.reset_parameters()
    assert not moe.router.weight.any()
    torch.manual_seed(0)
    with record_routing(moe) as routings:
        moe(tokens(63)).square().sum().backward()
    # Noise alone chooses at first.
    assert (routings[0].counts_E() > 0).all()
    assert moe.router.weight.grad.any(1).all()
