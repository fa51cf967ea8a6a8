import dataclasses
import itertools

import numpy as np
import pytest
import torch

from moesaic._errors import InputError
from moesaic.conversion.partition._assignment import balanced_assignment
from moesaic.conversion.partition._base import PartitionInput
from moesaic.conversion.partition.learned import LearnedConfig, gains, learned, sinkhorn

from .planted import blocks, gated, random_source


def topics(num_groups, size, seed=0):
    """Group g of the neurons fires for inputs of topic g alone; the groups are shuffled.

    With one block in num_groups on, the right blocks lose next to nothing and any others much.
    """
    rng = torch.Generator().manual_seed(seed)
    group_F = (torch.arange(num_groups * size) % num_groups)[
        torch.randperm(num_groups * size, generator=rng)
    ]
    centre_GD = torch.linalg.qr(torch.randn(8, num_groups, generator=rng))[0].T
    topic_T = torch.randint(num_groups, (800,), generator=rng)
    h_TD = centre_GD[topic_T] + 0.05 * torch.randn(800, 8, generator=rng)
    gate_FD = 6.0 * centre_GD[group_F] - 3.0 * centre_GD.sum(0)
    up_FD = centre_GD[group_F] + 0.1 * torch.randn(len(group_F), 8, generator=rng)
    source = PartitionInput(
        num_experts=num_groups,
        num_neurons=num_groups * size,
        down_DF=torch.randn(8, num_groups * size, generator=rng),
        neurons=gated(gate_FD, up_FD),
        stats={"h_TD": h_TD},
        seed=seed,
    )
    return source, blocks(group_F.argsort(stable=True), num_groups)


@pytest.mark.parametrize("seed", range(4))
def test_topics_are_recovered_from_a_bad_start(seed):
    source, truth = topics(4, 6, seed)
    config = LearnedConfig(start="contiguous", active=0.25, steps=300, learning_rate=0.5)
    assert blocks(torch.arange(24), 4) != truth
    assert blocks(learned(source, config), 4) == truth


def test_without_steps_the_start_stays():
    source = random_source(24, 4)
    config = LearnedConfig(start="random", steps=0)
    random_F = learned(source, config)
    assert torch.equal(random_F, learned(dataclasses.replace(source), config))
    assert not torch.equal(random_F, torch.arange(24))


def test_gradients_are_not_the_callers_business():
    source = random_source(24, 4)
    with torch.no_grad():
        first_F = learned(source, LearnedConfig(steps=3))
    assert torch.equal(first_F, learned(source, LearnedConfig(steps=3)))


@pytest.mark.parametrize("shape", [(24, 4), (35, 5), (12, 12), (6, 1)])
def test_sinkhorn_gives_equal_loads(shape):
    logits_FE = 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plan_FE, price_E = sinkhorn(logits_FE, torch.zeros(shape[1]), iterations=300)
    torch.testing.assert_close(plan_FE.sum(1), torch.ones(shape[0]))
    torch.testing.assert_close(
        plan_FE.sum(0), torch.full((shape[1],), shape[0] / shape[1]), atol=1e-3, rtol=0
    )
    # Prices that fit already: one iteration is enough.
    again_FE, _ = sinkhorn(logits_FE, price_E, iterations=1)
    torch.testing.assert_close(again_FE, plan_FE, atol=1e-3, rtol=0)


def test_a_plan_has_gradients():
    logits_FE = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x: sinkhorn(x, torch.zeros(3, dtype=torch.float64))[0], logits_FE
    )


def test_any_prices_give_the_best_assignment():
    cost_FE = np.random.default_rng(0).normal(size=(40, 8))
    best = cost_FE[np.arange(40), balanced_assignment(cost_FE)].sum()
    for scale in (0.0, 1.0, 10.0):
        price_E = scale * np.random.default_rng(1).normal(size=8)
        label_F = balanced_assignment(cost_FE, price_E)
        assert np.bincount(label_F).tolist() == [5] * 8
        assert cost_FE[np.arange(40), label_F].sum() == pytest.approx(best)


def worth(saved_BF, score_BF, label_F, num_experts, price, threshold):
    """Sum over blocks of saving less price, times gate, mean over tokens; written out."""
    total = 0.0
    for e in range(num_experts):
        member_F = label_F == e
        gate_B = (score_BF[:, member_F].sum(1) - threshold).sigmoid()
        total += float(((saved_BF[:, member_F].sum(1) - price) * gate_B).sum())
    return total / len(saved_BF)


def test_gains_are_what_a_move_changes():
    rng = torch.Generator().manual_seed(0)
    saved_BF = torch.randn(7, 12, generator=rng, dtype=torch.float64)
    # Small scores, for which the second order is close.
    score_BF = 0.05 * torch.randn(7, 12, generator=rng, dtype=torch.float64)
    label_F = torch.arange(12) % 3
    onehot_FE = torch.nn.functional.one_hot(label_F, 3).double()
    worth_BE, sums_BE = saved_BF @ onehot_FE - 0.1, score_BF @ onehot_FE - 0.2
    gain_FE = gains(saved_BF, score_BF, worth_BE, sums_BE, label_F)
    now = worth(saved_BF, score_BF, label_F, 3, 0.1, 0.2)
    for f, e in itertools.product(range(12), range(3)):
        moved_F = label_F.clone()
        moved_F[f] = e
        change = worth(saved_BF, score_BF, moved_F, 3, 0.1, 0.2) - now
        assert float(gain_FE[f, e] - gain_FE[f, label_F[f]]) == pytest.approx(change, abs=1e-4)


def test_what_is_missing_is_named():
    source = random_source(24, 4)
    for field in ("down_DF", "neurons"):
        with pytest.raises(InputError, match=r"'learned' needs down_DF and neurons"):
            learned(dataclasses.replace(source, **{field: None}), LearnedConfig())
    bare = {name: value for name, value in source.stats.items() if name != "h_TD"}
    with pytest.raises(InputError, match=r"'learned' needs the statistic h_TD.*'inputs'"):
        learned(dataclasses.replace(source, stats=bare), LearnedConfig())
    empty = source.stats | {"h_TD": torch.zeros(0, 6)}
    with pytest.raises(InputError, match=r"h_TD has 0 tokens; calibrate"):
        learned(dataclasses.replace(source, stats=empty), LearnedConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "learned"}, r"start must be another partition, got 'learned'"),
        ({"start": "coactivaton"}, r"did you mean coactivation"),
        ({"active": 0.0}, r"active must be in \(0, 1\), got 0.0"),
        ({"active": 1.0}, r"active must be in \(0, 1\), got 1.0"),
        ({"steps": -1}, r"steps must be at least 0, got -1"),
        ({"temperature": 0.0}, r"temperature must be above 0 and finite, got 0.0"),
        ({"learning_rate": float("inf")}, r"learning_rate must be above 0 and finite, got inf"),
        ({"router_rate": -1.0}, r"router_rate must be above 0 and finite, got -1.0"),
    ],
)
def test_settings_out_of_bounds_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        LearnedConfig(**options)
