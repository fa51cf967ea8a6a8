import dataclasses

import pytest
import torch

from moesaic._errors import InputError
from moesaic.conversion.partition.weights import WeightsConfig, weights

from .planted import blocks, planted_source, random_source


@pytest.mark.parametrize("rows", ["auto", "up", "gate", "both"])
@pytest.mark.parametrize(("num_neurons", "num_experts"), [(24, 2), (64, 4), (96, 8)])
def test_planted_groups_are_recovered(rows, num_neurons, num_experts):
    source, group_F = planted_source(num_neurons, num_experts)
    truth = blocks(group_F.argsort(stable=True), num_experts)
    assert blocks(weights(source, WeightsConfig(rows=rows)), num_experts) == truth


def test_the_length_of_a_row_does_not_matter():
    source = random_source(48, 6)
    scale_F1 = torch.logspace(-3, 3, 48)[:, None]
    longer = dataclasses.replace(source, gate_FD=source.gate_FD * scale_F1)
    assert torch.equal(weights(source, WeightsConfig()), weights(longer, WeightsConfig()))


def test_rows_of_zeros_are_accepted():
    source = random_source(24, 4)
    source.gate_FD[:9] = 0.0
    assert sorted(weights(source, WeightsConfig()).tolist()) == list(range(24))


def test_auto_takes_the_matrix_that_feeds_the_activation():
    gated = random_source(48, 6)
    plain = dataclasses.replace(gated, gate_FD=None)
    auto, up, gate = (WeightsConfig(rows=rows) for rows in ("auto", "up", "gate"))
    assert torch.equal(weights(gated, auto), weights(gated, gate))
    assert torch.equal(weights(plain, auto), weights(plain, up))
    assert not torch.equal(weights(gated, up), weights(gated, gate))


@pytest.mark.parametrize("rows", ["gate", "both"])
def test_a_plain_ffn_has_no_gate(rows):
    plain = dataclasses.replace(random_source(24, 4), gate_FD=None)
    with pytest.raises(InputError, match=rf"rows={rows} needs the gate matrix; choose rows=up"):
        weights(plain, WeightsConfig(rows=rows))


def test_weights_that_are_not_finite_are_refused():
    source = random_source(24, 4)
    source.gate_FD[2, 3] = torch.inf
    with pytest.raises(InputError, match=r"gate matrix has weights that are not finite"):
        weights(source, WeightsConfig())


def test_settings_out_of_bounds_are_refused():
    with pytest.raises(InputError, match=r"max_iterations must be at least 1, got 0"):
        WeightsConfig(max_iterations=0)
