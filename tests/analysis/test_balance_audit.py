"""The dual of balanced assignment, arXiv 2512.03915: identities that hold for any scores."""

from __future__ import annotations

import pytest
import torch

from moesaic.analysis.balance import audit_step, choose, dual_value, excess_load, lagrangian

T, E, K = 64, 8, 2


def scores(seed=0, num_tokens=T):
    """Gates with a few experts far ahead."""
    draw = torch.Generator().manual_seed(seed)
    noise_TE = torch.randn(num_tokens, E, generator=draw, dtype=torch.float64)
    return (noise_TE + torch.arange(E) / 3).sigmoid()


RULES = {
    "sign": lambda excess_E: -0.01 * excess_E.sign(),
    "proportional": lambda excess_E: -0.001 * excess_E,
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@each_rule
def test_change_is_benefit_less_gain_and_no_switch_is_wrong(rule):
    scores_TE, bias_E = scores(), torch.zeros(E, dtype=torch.float64)
    switches = 0
    for _ in range(200):
        excess_E = excess_load(choose(scores_TE, bias_E, K))
        after_E = bias_E + rule(excess_E)
        audit = audit_step(scores_TE, bias_E, after_E, K)
        assert audit.change == pytest.approx(audit.switching_benefit - audit.bias_gain, abs=1e-9)
        # Zero but for rounding where a token is indifferent.
        assert audit.switching_benefit >= -1e-9
        assert audit.wrong_switches == 0
        switches += audit.switches
        bias_E = after_E
    assert switches > 0


def test_gain_of_the_proportional_rule_is_its_step_times_the_squared_excess():
    scores_TE, bias_E = scores(), torch.zeros(E, dtype=torch.float64)
    excess_E = excess_load(choose(scores_TE, bias_E, K))
    audit = audit_step(scores_TE, bias_E, bias_E - 0.001 * excess_E, K)
    assert audit.bias_gain == pytest.approx(0.001 * float(excess_E.square().sum()))


def test_dual_is_the_lagrangian_of_the_best_choice_and_its_slope_the_excess():
    scores_TE = scores()
    bias_E = torch.linspace(0.3, -0.2, E, dtype=torch.float64)
    best_TE = choose(scores_TE, bias_E, K)
    value = dual_value(scores_TE, bias_E, K)
    assert value == pytest.approx(lagrangian(scores_TE, best_TE, bias_E), abs=1e-9)
    for seed in range(20):
        other_TE = choose(scores(seed + 1), bias_E, K)
        assert lagrangian(scores_TE, other_TE, bias_E) <= value + 1e-9
    for e in range(E):
        step_E = 1e-7 * torch.eye(E, dtype=torch.float64)[e]
        slope = (
            dual_value(scores_TE, bias_E + step_E, K) - dual_value(scores_TE, bias_E - step_E, K)
        ) / 2e-7
        assert slope == pytest.approx(float(excess_load(best_TE)[e]), abs=1e-5)


def test_by_hand():
    # Scores (3, 1) and (2, 1), k = 1: both choose the first, 2 tokens where the mean is 1.
    scores_TE = torch.tensor([[3.0, 1], [2, 1]], dtype=torch.float64)
    none_E = torch.zeros(2, dtype=torch.float64)
    assert excess_load(choose(scores_TE, none_E, 1)).tolist() == [1, -1]
    assert dual_value(scores_TE, none_E, 1) == 5.0
    # At (-1.5, 0) the second token changes: 3 + 1 at balance, whatever the bias.
    bias_E = torch.tensor([-1.5, 0.0], dtype=torch.float64)
    assert choose(scores_TE, bias_E, 1).tolist() == [[True, False], [False, True]]
    assert dual_value(scores_TE, bias_E, 1) == 4.0
    # It gains 1 - 0.5; the bias moved 1.5 against an excess of 1: 0.5 - 1.5 = 4 - 5.
    audit = audit_step(scores_TE, none_E, bias_E, 1)
    assert (audit.change, audit.switching_benefit, audit.bias_gain) == (-1.0, 0.5, 1.5)
    assert (audit.switches, audit.wrong_switches) == (1, 0)


@pytest.mark.parametrize("num_tokens", [64, 512])
def test_balance_comes_within_a_gap_that_does_not_grow_with_tokens(num_tokens):
    scores_TE, bias_E = scores(num_tokens=num_tokens), torch.zeros(E, dtype=torch.float64)
    start = excess_load(choose(scores_TE, bias_E, K)).abs().max()
    for step in range(800):
        excess_E = excess_load(choose(scores_TE, bias_E, K))
        bias_E = bias_E - 0.02 * 0.99**step * excess_E.sign()
    assert start > 10
    assert excess_load(choose(scores_TE, bias_E, K)).abs().max() <= E - 1
