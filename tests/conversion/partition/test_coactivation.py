import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic._errors import InputError
from moesaic.conversion.partition.coactivation import (
    CoactivationConfig,
    coactivation,
    exchange,
)
from moesaic.conversion.partition.random import RandomConfig, random

from .planted import blocks, planted_source, random_source, within

CONFIG = CoactivationConfig()


def objective_matrix(source):
    """Mean of |a_i| d_i |a_j| d_j, written out."""
    matrix_FF = source.stats["coactivation_FF"]
    length_F = (source.stats["energy_F"] / matrix_FF.diagonal()).sqrt()
    return matrix_FF * length_F * length_F[:, None]


@pytest.mark.parametrize(("num_neurons", "num_experts"), [(24, 2), (64, 4), (96, 8), (96, 24)])
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_recovered(num_neurons, num_experts, seed):
    source, group_F = planted_source(num_neurons, num_experts, seed)
    truth = blocks(group_F.argsort(stable=True), num_experts)
    assert blocks(coactivation(source, CONFIG), num_experts) == truth


def test_two_pairs_by_hand():
    # Neurons 0 and 3 fire together, 1 and 2 fire together and more strongly: their block is first.
    matrix_FF = torch.eye(4)
    matrix_FF[0, 3] = matrix_FF[3, 0] = 0.9
    matrix_FF[1, 2] = matrix_FF[2, 1] = 0.9
    source = by_hand(matrix_FF, torch.tensor([1.0, 1.5, 1.5, 1.0]))
    assert coactivation(source, CONFIG).tolist() == [1, 2, 0, 3]


def by_hand(matrix_FF, energy_F, num_experts=2):
    source = random_source(len(matrix_FF), num_experts)
    return dataclasses.replace(source, stats={"coactivation_FF": matrix_FF, "energy_F": energy_F})


@pytest.mark.parametrize("planted", [True, False])
@pytest.mark.parametrize("num_experts", [2, 6, 16])
def test_beats_contiguous_and_random(planted, num_experts):
    source = planted_source(96, num_experts)[0] if planted else random_source(96, num_experts)
    matrix_FF = objective_matrix(source)
    ours = within(matrix_FF, coactivation(source, CONFIG), num_experts)
    assert ours > within(matrix_FF, torch.arange(96), num_experts)
    for seed in range(5):
        rival = random(dataclasses.replace(source, seed=seed), RandomConfig())
        assert ours > within(matrix_FF, rival, num_experts)


@pytest.mark.parametrize("seed", range(6))
def test_small_cases_are_close_to_the_best_there_is(seed):
    source = random_source(8, 2, seed)
    matrix_FF = objective_matrix(source)
    best = max(
        within(matrix_FF, torch.tensor([*half, *(set(range(8)) - set(half))]), 2)
        for half in itertools.combinations(range(8), 4)
    )
    assert within(matrix_FF, coactivation(source, CONFIG), 2) >= 0.995 * best


def test_output_scale_follows_the_down_columns():
    # Equal activations everywhere; only the lengths of the columns tell neurons apart.
    length_F = torch.tensor([3.0, 1.0, 3.0, 1.0, 1.0, 3.0])
    source = by_hand(torch.full((6, 6), 0.5) + 0.5 * torch.eye(6), length_F**2)
    assert coactivation(source, CONFIG).tolist() == [0, 2, 5, 1, 3, 4]


def test_scale_none_needs_no_energy():
    source, group_F = planted_source(64, 4)
    bare = {"coactivation_FF": source.stats["coactivation_FF"]}
    permutation_F = coactivation(
        dataclasses.replace(source, stats=bare), CoactivationConfig(scale="none")
    )
    assert blocks(permutation_F, 4) == blocks(group_F.argsort(stable=True), 4)


def test_dead_neurons_are_accepted():
    source = random_source(24, 4)
    matrix_FF, energy_F = source.stats["coactivation_FF"], source.stats["energy_F"]
    matrix_FF[:7] = 0.0
    matrix_FF[:, :7] = 0.0
    energy_F[:7] = 0.0
    permutation_F = coactivation(source, CONFIG)
    assert sorted(permutation_F.tolist()) == list(range(24))
    assert set(permutation_F[-6:].tolist()) < set(range(7))


@pytest.mark.parametrize(
    ("stat", "value", "message"),
    [
        ("coactivation_FF", 0.0, r"diagonal of coactivation_FF must be at least 0"),
        ("coactivation_FF", -1.0, r"diagonal of coactivation_FF must be at least 0"),
        ("energy_F", 0.0, r"energy_F must be at least 0 for every neuron"),
        ("energy_F", -1.0, r"energy_F must be at least 0 for every neuron"),
    ],
)
def test_empty_statistics_are_refused(stat, value, message):
    source = random_source(24, 4)
    source.stats[stat].fill_(value)
    with pytest.raises(InputError, match=message):
        coactivation(source, CONFIG)


@pytest.mark.parametrize("field", ["rank", "max_iterations", "max_sweeps"])
def test_settings_out_of_bounds_are_refused(field):
    with pytest.raises(InputError, match=rf"{field} must be at least \d, got -1"):
        CoactivationConfig(**{field: -1})


@settings(max_examples=30, deadline=None)
@given(num_experts=st.integers(1, 6), size=st.integers(1, 7), seed=st.integers(0, 999))
def test_exchange_never_loses_and_reports_its_gain(num_experts, size, seed):
    rng = np.random.default_rng(seed)
    num_neurons = num_experts * size
    matrix_FF = rng.normal(size=(num_neurons, num_neurons)).astype(np.float32)
    matrix_FF = matrix_FF @ matrix_FF.T
    label_F = rng.permutation(np.arange(num_neurons) % num_experts)

    def value(labels):
        same_FF = labels[:, None] == labels
        return float(matrix_FF[same_FF].sum(dtype=np.float64))

    better_F, gain, _ = exchange(matrix_FF, label_F, max_sweeps=20)
    assert np.bincount(better_F, minlength=num_experts).tolist() == [size] * num_experts
    assert value(better_F) >= value(label_F) - 1e-3
    expected = value(label_F) * (1 + gain)
    assert value(better_F) == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_every_sweep_helps_until_none_does():
    source = random_source(96, 8)
    matrix_FF = objective_matrix(source)
    values = [
        within(matrix_FF, coactivation(source, CoactivationConfig(max_sweeps=sweeps)), 8)
        for sweeps in (0, 1, 3, 30)
    ]
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_renumbering_the_neurons_keeps_planted_blocks():
    source, _ = planted_source(64, 4)
    shuffle_F = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    moved = dataclasses.replace(
        source,
        stats={
            "coactivation_FF": source.stats["coactivation_FF"][shuffle_F][:, shuffle_F],
            "energy_F": source.stats["energy_F"][shuffle_F],
        },
    )
    assert blocks(shuffle_F[coactivation(moved, CONFIG)], 4) == blocks(
        coactivation(source, CONFIG), 4
    )
