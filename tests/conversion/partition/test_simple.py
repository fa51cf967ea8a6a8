"""The partitions of a few lines: contiguous, random, importance."""

import dataclasses

import torch

from moesaic.conversion.partition.contiguous import ContiguousConfig, contiguous
from moesaic.conversion.partition.importance import ImportanceConfig, importance
from moesaic.conversion.partition.random import RandomConfig, random

from .planted import blocks, random_source


def test_contiguous_is_the_identity():
    assert contiguous(random_source(24, 4), ContiguousConfig()).tolist() == list(range(24))


def test_random_deals_every_neuron_everywhere():
    # Over 200 seeds neuron 0 lands in each of 4 blocks about 50 times (standard deviation 6).
    source = random_source(24, 4)
    counts_E = [0] * 4
    for seed in range(200):
        permutation_F = random(dataclasses.replace(source, seed=seed), RandomConfig())
        counts_E[permutation_F.tolist().index(0) // 6] += 1
    assert all(25 < count < 75 for count in counts_E)


def test_random_blocks_keep_the_old_order_inside():
    permutation_F = random(random_source(24, 4), RandomConfig())
    assert all(b == sorted(b) for b in permutation_F.reshape(4, 6).tolist())
    assert len(blocks(permutation_F, 4)) == 4


def test_importance_sorts_by_energy_and_keeps_ties_in_order():
    source = random_source(6, 2)
    energy_F = torch.tensor([0.1, 3.0, 0.1, 7.0, 3.0, 0.0])
    ranked = dataclasses.replace(source, stats={"energy_F": energy_F})
    assert importance(ranked, ImportanceConfig()).tolist() == [3, 1, 4, 0, 2, 5]
