"""Experts that leave out what is small: the numbers by hand, and against the plain formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from nn_cases import tokens

from moesaic.nn.experts._base import ExpertsConfig
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.experts.thresholded import Thresholded
from moesaic.ops.weights import keep_large
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.routing import Routing

E, F, D, T = 4, 6, 17, 63
KINDS = [name for name in EXPERTS if name.startswith("thresholded-")]
each_kind = pytest.mark.parametrize("name", KINDS)
each_bias = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


def make(name, *, bias=False, num_experts=E, thresholds=(0.5, 0.1)):
    experts = EXPERTS.load(name)(D, num_experts, F, ExpertsConfig(bias=bias))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    experts.set_thresholds(*thresholds)
    return experts.double()


def neurons(experts, x_TD):
    """Neurons of every expert before small ones are left out, [T, E, F], by the plain formula."""
    up = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    z_TEM = torch.einsum("td,emd->tem", x_TD, up)
    bias = getattr(experts, "gate_up_proj_bias", None)
    bias = getattr(experts, "up_proj_bias", None) if bias is None else bias
    if bias is not None:
        z_TEM = z_TEM + bias
    if up.shape[1] == F:
        return nnf.silu(z_TEM)
    gate_TEF, up_TEF = z_TEM.chunk(2, dim=2)
    return nnf.silu(gate_TEF) * up_TEF


def plain(experts, h_TD, weights_TE):
    """Output, and which inputs and neurons were kept."""
    x_TD = h_TD * (h_TD.abs() > experts.input_threshold)
    a_TEF = neurons(experts, x_TD)
    a_TEF = a_TEF * (a_TEF.abs() > experts.neuron_threshold)
    return torch.einsum("tef,edf,te->td", a_TEF, experts.down_proj, weights_TE), x_TD, a_TEF


def test_what_does_not_exceed_the_threshold_goes():
    x = torch.tensor([0.5, -0.5, 0.51, -3.0, 0.0, torch.nan])
    kept = keep_large(x, 0.5)
    assert kept[:5].tolist() == pytest.approx([0.0, 0.0, 0.51, -3.0, 0.0])
    # An error must not become a zero.
    assert kept[5].isnan()


@each_kind
@each_bias
@pytest.mark.parametrize("backend", ["reference", "masked", "grouped", "auto"])
def test_routed_output_is_the_plain_formula(name, bias, backend):
    experts, h_TD = make(name, bias=bias), tokens(T, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    ids_TK = torch.rand(T, E, generator=draw).argsort(1)[:, :2]
    weights_TK = torch.rand(T, 2, generator=draw).double()
    routing = Routing(ids_TK, weights_TK, torch.zeros(T, E), E)
    want_TD, x_TD, a_TEF = plain(experts, h_TD, routing.weights_TE())
    assert 0.2 < x_TD.count_nonzero() / x_TD.numel() < 0.8
    assert 0.2 < a_TEF.count_nonzero() / a_TEF.numel() < 0.95
    experts.backend = backend
    torch.testing.assert_close(experts(h_TD, routing), want_TD)


@each_kind
@each_bias
def test_dense_output_is_the_plain_formula_with_or_without_routing(name, bias):
    experts, h_TD = make(name, bias=bias), tokens(T, dtype=torch.float64)
    want_TD, _, _ = plain(experts, h_TD, torch.ones(T, E, dtype=torch.float64))
    torch.testing.assert_close(experts(h_TD, None), want_TD)
    torch.testing.assert_close(experts.dense(h_TD), want_TD)


@each_kind
@each_bias
def test_thresholds_of_zero_change_no_bit(name, bias):
    experts, h_TD = make(name, bias=bias, thresholds=(0.0, 0.0)), tokens(T, dtype=torch.float64)
    ordinary = EXPERTS.load(name.removeprefix("thresholded-"))
    other = ordinary(D, E, F, ExpertsConfig(bias=bias)).double()
    # The same names, so that a dense network's weights load into either.
    other.load_state_dict({k: v for k, v in experts.state_dict().items() if "threshold" not in k})
    assert torch.equal(experts.dense(h_TD), other.dense(h_TD))
    assert experts.used_TE(h_TD).tolist() == [1.0] * T


@each_kind
@each_bias
def test_use_is_what_the_products_need(name, bias):
    experts, h_TD = make(name, bias=bias), tokens(T, dtype=torch.float64)
    _, x_TD, a_TEF = plain(experts, h_TD, torch.ones(T, E, dtype=torch.float64))
    # Every kept input is read by all rows of gate and up, every kept neuron by D rows of down.
    rows = 2 * F if name == "thresholded-gated" else F
    read_T = (x_TD != 0).sum(1) * rows * E + (a_TEF != 0).sum((1, 2)) * D
    used_T = experts.used_TE(h_TD)
    assert used_T.dtype == torch.float64
    torch.testing.assert_close(used_T, read_T.double() / (E * D * (rows + F)))
    assert len(used_T.unique()) > 10
    assert experts.used_share() is None


def test_use_by_hand():
    # One neuron, two inputs: gate and up rows [1, 1], so a = silu(x1 + x2) * (x1 + x2).
    experts = EXPERTS.load("thresholded-gated")(2, 1, 1, ExpertsConfig())
    with torch.no_grad():
        experts.gate_up_proj.fill_(1.0)
        experts.down_proj.fill_(1.0)
    experts.set_thresholds(1.0, 2.0)
    h_TD = torch.tensor([[3.0, 2.0], [3.0, 0.5], [1.2, -0.9], [0.5, -1.0]])
    # Kept inputs 2, 2 x 1, 1, 0; neurons 25 * sigmoid(5), 9 * sigmoid(3), 1.44 * sigmoid(1.2) < 2
    # and 0. Of 6 weights are read: 2 x 2 + 2, 2 x 1 + 2, 2 x 1 and none.
    assert experts.used_TE(h_TD).tolist() == pytest.approx([1.0, 4 / 6, 2 / 6, 0.0])
    first = 25 / (1 + torch.exp(torch.tensor(-5.0)))
    second = 9 / (1 + torch.exp(torch.tensor(-3.0)))
    expected = torch.stack([first, second, torch.tensor(0.0), torch.tensor(0.0)])
    torch.testing.assert_close(experts(h_TD)[:, 0], expected)
    torch.testing.assert_close(experts(h_TD)[:, 1], expected)


@each_kind
def test_gradient_passes_what_is_kept_and_nothing_else(name):
    experts = make(name)
    h_TD = tokens(5, dtype=torch.float64).requires_grad_()
    experts.dense(h_TD).square().sum().backward()
    kept_TD = h_TD.detach().abs() > experts.input_threshold
    assert torch.equal(h_TD.grad != 0, kept_TD)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in experts.parameters())


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_keeps_dtype_and_use(name, dtype):
    experts, h_TD = make(name), tokens(T, dtype=torch.float64)
    exact_T = experts.used_TE(h_TD)
    lower = experts.to(dtype)
    assert lower(h_TD.to(dtype)).dtype == dtype
    assert float((lower.used_TE(h_TD.to(dtype)) - exact_T).abs().mean()) < 0.01


@each_kind
def test_layer_keeps_thresholds_with_its_weights(name):
    config = LayerConfig(num_experts=0, shared_width=F, experts=name)
    layer, other = MoELayer(D, config), MoELayer(D, config)
    assert isinstance(layer.shared, Thresholded)
    layer.shared.set_thresholds(0.7, 0.1)
    other.load_state_dict(layer.state_dict())
    assert float(other.shared.input_threshold) == pytest.approx(0.7)
    assert float(other.shared.neuron_threshold) == pytest.approx(0.1)
    assert torch.equal(other(tokens(5)), layer(tokens(5)))
