"""EvoMoE, arXiv 2112.14397: a gate whose experts per token fall from all to one."""

from __future__ import annotations

import pytest
import torch
from nn_cases import end_schedules, make_layer, make_loss, make_router, set_scores, tokens

E = 6


def at(temperature, *, steps=1, soft_steps=10, **options):
    """A gate whose temperature is this from the first step on."""
    schedule = {"start": temperature, "end": temperature, "steps": steps}
    return make_router(
        "dense-to-sparse", E, temperature=schedule, soft_steps=soft_steps, **options
    ).train()


def test_a_falling_temperature_leaves_fewer_experts_and_never_none():
    h_TD = tokens(63)
    counts = []
    for temperature in (1e3, 2.0, 1.0, 0.5, 0.2, 1e-3):
        torch.manual_seed(0)
        router = at(temperature)
        active = torch.stack([router(h_TD).active_T() for _ in range(30)])
        assert active.min() >= 1
        counts.append(float(active.double().mean()))
    assert counts[0] == E
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("weight", ["gumbel", "softmax"])
def test_training_is_the_formula(weight):
    router, h_TD = at(0.7, weight=weight), tokens(63)
    torch.manual_seed(0)
    routing = router(h_TD)
    torch.manual_seed(0)
    scores_TE = h_TD @ router.weight.T
    noise_TE = -torch.empty_like(scores_TE).exponential_().log()
    p_TE = ((scores_TE + noise_TE) / 0.7).softmax(-1)
    weights_TE = p_TE if weight == "gumbel" else scores_TE.softmax(-1)
    kept_TE = p_TE > 0.001
    assert 1 < kept_TE.sum(1).double().mean() < E
    torch.testing.assert_close(routing.weights_TE(), weights_TE * kept_TE)
    assert torch.equal(routing.active_TE(), kept_TE)


def test_the_noise_is_gumbel():
    router = at(1.0)
    # With equal scores p is exp(-log(exponential)) over its sum; logits are minus log exponential,
    # whose mean is Euler's constant and whose variance is pi^2 / 6.
    h_TD = set_scores(router, torch.zeros(17, E))
    torch.manual_seed(0)
    draws = torch.cat([router(h_TD).scores_TE for _ in range(300)])
    assert draws.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert draws.var().item() == pytest.approx(1.6449, abs=0.05)


@pytest.mark.parametrize("weight", ["gumbel", "softmax"])
def test_after_the_soft_steps_the_best_of_the_noisy_ones_is_left(weight):
    router, h_TD = at(0.7, soft_steps=1, weight=weight), tokens(63)
    torch.manual_seed(0)
    soft = router(h_TD)
    router.end_step()
    torch.manual_seed(0)
    hard = router(h_TD)
    assert hard.ids_TK.shape == (63, 1)
    assert torch.equal(hard.ids_TK, soft.ids_TK[:, :1])
    assert torch.equal(hard.weights_TK, soft.weights_TK[:, :1])


@pytest.mark.parametrize(("weight", "temperature"), [("gumbel", 0.4), ("softmax", 1.0)])
def test_evaluation_is_the_best_expert_without_noise(weight, temperature):
    router, h_TD = at(0.4, weight=weight).eval(), tokens(63)
    routing = router(h_TD)
    probs_TE = (h_TD @ router.weight.T / temperature).softmax(-1)
    best = probs_TE.max(1, keepdim=True)
    assert torch.equal(routing.ids_TK, best.indices)
    torch.testing.assert_close(routing.weights_TK, best.values)


def test_gradients_reach_the_experts_that_are_kept():
    moe = make_layer(
        "dense-to-sparse",
        router_config={"temperature": {"start": 0.7, "end": 0.7, "steps": 1}, "soft_steps": 1},
    ).train()
    h_TD = tokens(1, dtype=torch.float64)
    for soft in (True, False):
        torch.manual_seed(0)
        kept = moe.router(h_TD).active_TE()[0]
        torch.manual_seed(0)
        moe.zero_grad()
        moe(h_TD).sum().backward()
        touched = moe.experts.down_proj.grad.flatten(1).any(1)
        assert torch.equal(touched, kept)
        assert (kept.sum() > 1) == soft
        assert moe.router.weight.grad.any()
        moe.router.end_step()


@pytest.mark.parametrize("weight", ["gumbel", "softmax"])
def test_the_balance_loss_of_the_paper_is_load_balance(weight):
    router, h_TD = at(0.7, weight=weight), tokens(63)
    torch.manual_seed(0)
    routing = router(h_TD)
    weights_TE = routing.scores_TE.softmax(-1)
    used_TE = routing.active_TE().float()
    expected = E**2 * (weights_TE.mean(0) * used_TE.mean(0)).mean()
    mask = torch.ones(1, 63, dtype=torch.bool)
    torch.testing.assert_close(make_loss("load-balance")(routing, mask), expected)


def test_experts_of_a_token_fall_over_the_training():
    schedule = {"start": 2.0, "end": 0.1, "steps": 8, "shape": "exponential"}
    router = make_router("dense-to-sparse", E, temperature=schedule, soft_steps=10).train()
    h_TD = tokens(63)
    torch.manual_seed(0)
    means = []
    for _ in range(12):
        means.append(float(router(h_TD).active_T().double().mean()))
        router.end_step()
    assert means[0] > 5.0
    assert means[9] < 3.0
    assert means[10:] == [1.0, 1.0]
    end_schedules(router)
    assert router(h_TD).ids_TK.shape == (63, 1)
