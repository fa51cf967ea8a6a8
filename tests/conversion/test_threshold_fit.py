"""Thresholds keep what they are asked to, of the largest, where blocks are on."""

import pytest
import torch
import torch.nn.functional as nnf

from moesaic.conversion.threshold_fit import fit_thresholds
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.experts.thresholded import ThresholdedConfig

E, F, D, T = 6, 10, 24, 400


def make(kind, **kept):
    experts = EXPERTS.load(kind)(D, E, F, ThresholdedConfig(**kept))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        # Columns of the down product differ in length, so magnitudes alone would choose otherwise.
        experts.down_proj.mul_(torch.rand(E, 1, F, generator=draw) * 3)
    return experts


def text():
    draw = torch.Generator().manual_seed(1)
    h_TD = torch.randn(T, D, generator=draw)
    return h_TD, (torch.rand(T, E, generator=draw) < 0.6).float()


@torch.no_grad()
@pytest.mark.parametrize("inputs", [1.0, 0.7])
def test_kept_parts_are_met_by_the_largest_of_gated_experts(inputs):
    kept = {"inputs": inputs, "gates": 0.7, "neurons": 0.4}
    experts, (h_TD, on_TE) = make("thresholded-gated", **kept), text()
    fit_thresholds(experts, h_TD, torch.arange(T), on_TE)
    weights = experts.weights()
    x_TD = h_TD * (h_TD.abs() > experts.input_threshold)
    assert float((x_TD != 0).float().mean()) == pytest.approx(inputs, abs=1e-3)
    gate_TEF, up_TEF = torch.einsum("td,erd->ter", x_TD, weights.up).chunk(2, dim=2)
    gate_TEF = nnf.silu(gate_TEF)
    on_TEF = (on_TE != 0).unsqueeze(2).expand_as(gate_TEF)
    open_TEF = gate_TEF.abs() > experts.gate_threshold
    assert float(open_TEF[on_TEF].float().mean()) == pytest.approx(0.7, abs=1e-3)
    length_EF = weights.down.norm(dim=1)
    # What a gate promises: its size, the usual size of the up product, the length of the column.
    promised_TEF = gate_TEF.abs() * up_TEF.square().mean(0).sqrt() * length_EF
    assert promised_TEF[on_TEF & open_TEF].min() > promised_TEF[on_TEF & ~open_TEF].max() * 0.999
    neurons_TEF = gate_TEF * up_TEF * open_TEF
    used_TEF = neurons_TEF.abs() > experts.neuron_threshold
    assert float(used_TEF[on_TEF].float().mean()) == pytest.approx(0.4, abs=1e-3)
    added_TEF = neurons_TEF.abs() * length_EF
    assert added_TEF[on_TEF & used_TEF].min() > added_TEF[on_TEF & ~used_TEF].max() * 0.999
    share = float((experts.used_TE(h_TD) * on_TE).sum() / on_TE.sum())
    assert share == pytest.approx(experts.expected_share(), abs=5e-3)


@torch.no_grad()
def test_plain_experts_have_no_gates_to_judge():
    experts, (h_TD, on_TE) = make("thresholded-plain", neurons=0.3), text()
    fit_thresholds(experts, h_TD, torch.arange(T), on_TE)
    used_TEF = torch.einsum("td,efd->tef", h_TD, experts.up_proj)
    used_TEF = nnf.silu(used_TEF).abs() > experts.neuron_threshold
    assert float(used_TEF[on_TE != 0].float().mean()) == pytest.approx(0.3, abs=1e-3)


@torch.no_grad()
def test_only_the_tokens_that_are_given_count():
    h_TD, on_TE = text()
    some = torch.arange(100)
    experts, others = (make("thresholded-gated", gates=0.7, neurons=0.4) for _ in range(2))
    fit_thresholds(experts, h_TD, some, on_TE[some])
    fit_thresholds(others, torch.cat([h_TD[some], 100 * h_TD]), some, on_TE[some])
    assert torch.equal(experts.neuron_threshold, others.neuron_threshold)


@torch.no_grad()
def test_nothing_on_leaves_the_thresholds_at_zero():
    experts, (h_TD, on_TE) = make("thresholded-gated", gates=0.7, neurons=0.4), text()
    fit_thresholds(experts, h_TD, torch.arange(T), torch.zeros_like(on_TE))
    assert not experts.neuron_threshold.any()


@torch.no_grad()
def test_everything_kept_leaves_them_at_zero():
    experts, (h_TD, on_TE) = make("thresholded-gated"), text()
    fit_thresholds(experts, h_TD, torch.arange(T), on_TE)
    assert not experts.neuron_threshold.any()
    assert not experts.gate_threshold.any()
