"""Experts that leave out what is small: the numbers by hand, and against the plain formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as nnf
from nn_cases import tokens

from moesaic._errors import InputError
from moesaic.nn.experts._base import ExpertsConfig
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.experts.thresholded import Thresholded, ThresholdedConfig
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.routing import Routing
from moesaic.nn.shape import layer_shape
from moesaic.ops.weights import keep_large

E, F, D, T = 4, 6, 17, 63
KINDS = [name for name in EXPERTS if name.startswith("thresholded-")]
each_kind = pytest.mark.parametrize("name", KINDS)
each_bias = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


def make(name, *, bias=False, num_experts=E, zero=False):
    experts = EXPERTS.load(name)(D, num_experts, F, ExpertsConfig(bias=bias))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    if not zero:
        # Each neuron has others.
        neurons_EF, gates_EF = torch.rand(2, num_experts, F, generator=draw) * 0.2
        experts.set_thresholds(0.5, neurons_EF, gates_EF)
    return experts.double()


def plain(experts, h_TD, weights_TE):
    """Output, and which inputs, gates and neurons were kept, by the plain formula."""
    x_TD = h_TD * (h_TD.abs() > experts.input_threshold)
    up = experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
    z_TEM = torch.einsum("td,emd->tem", x_TD, up)
    bias = getattr(experts, "gate_up_proj_bias", None)
    bias = getattr(experts, "up_proj_bias", None) if bias is None else bias
    if bias is not None:
        z_TEM = z_TEM + bias
    if up.shape[1] == F:
        gate_TEF = a_TEF = nnf.silu(z_TEM)
    else:
        gate_TEF, up_TEF = z_TEM.chunk(2, dim=2)
        gate_TEF = nnf.silu(gate_TEF)
        gate_TEF = gate_TEF * (gate_TEF.abs() > experts.gate_threshold)
        a_TEF = gate_TEF * up_TEF
    a_TEF = a_TEF * (a_TEF.abs() > experts.neuron_threshold)
    out_TD = torch.einsum("tef,edf,te->td", a_TEF, experts.down_proj, weights_TE)
    return out_TD, x_TD, gate_TEF, a_TEF


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
    want_TD, x_TD, gate_TEF, a_TEF = plain(experts, h_TD, routing.weights_TE())
    assert 0.2 < x_TD.count_nonzero() / x_TD.numel() < 0.8
    kept = a_TEF.count_nonzero() / a_TEF.numel()
    assert 0.2 < kept < 0.95
    if name == "thresholded-gated":
        assert kept + 0.05 < gate_TEF.count_nonzero() / gate_TEF.numel() < 0.95
    experts.backend = backend
    torch.testing.assert_close(experts(h_TD, routing), want_TD)


@each_kind
@each_bias
def test_dense_output_is_the_plain_formula_with_or_without_routing(name, bias):
    experts, h_TD = make(name, bias=bias), tokens(T, dtype=torch.float64)
    want_TD, *_ = plain(experts, h_TD, torch.ones(T, E, dtype=torch.float64))
    torch.testing.assert_close(experts(h_TD, None), want_TD)
    torch.testing.assert_close(experts.dense(h_TD), want_TD)


@each_kind
@each_bias
def test_thresholds_of_zero_change_no_bit(name, bias):
    experts, h_TD = make(name, bias=bias, zero=True), tokens(T, dtype=torch.float64)
    ordinary = EXPERTS.load(name.removeprefix("thresholded-"))
    other = ordinary(D, E, F, ExpertsConfig(bias=bias)).double()
    # The same names, so that a dense network's weights load into either.
    other.load_state_dict({k: v for k, v in experts.state_dict().items() if "threshold" not in k})
    assert torch.equal(experts.dense(h_TD), other.dense(h_TD))
    assert torch.equal(experts.used_TE(h_TD), torch.ones(T, E, dtype=torch.float64))


@each_kind
@each_bias
def test_use_is_what_the_products_need(name, bias):
    experts, h_TD = make(name, bias=bias), tokens(T, dtype=torch.float64)
    _, x_TD, gate_TEF, a_TEF = plain(experts, h_TD, torch.ones(T, E, dtype=torch.float64))
    # Every kept input is read by all rows of gate and those of up whose gate is kept, every kept
    # neuron by D rows of down.
    gated = name == "thresholded-gated"
    rows_TE = F + (gate_TEF != 0).sum(2) if gated else torch.full((T, E), F)
    read_TE = (x_TD != 0).sum(1, keepdim=True) * rows_TE + (a_TEF != 0).sum(2) * D
    used_TE = experts.used_TE(h_TD)
    assert used_TE.dtype == torch.float64
    torch.testing.assert_close(used_TE, read_TE.double() / (D * (3 * F if gated else 2 * F)))
    assert len(used_TE.unique()) > 10
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
    assert experts.used_TE(h_TD)[:, 0].tolist() == pytest.approx([1.0, 4 / 6, 2 / 6, 0.0])
    # A gate of 5 * sigmoid(5) stays, one of 3 * sigmoid(3) goes: its up row, [1, 1], is not read.
    experts.set_thresholds(1.0, 2.0, 3.0)
    assert experts.used_TE(h_TD)[:, 0].tolist() == pytest.approx([1.0, 1 / 6, 1 / 6, 0.0])
    assert experts(h_TD)[1:].tolist() == [[0.0, 0.0]] * 3
    experts.set_thresholds(1.0, 2.0)
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
@each_bias
@pytest.mark.parametrize("backend", ["reference", "masked", "grouped"])
def test_every_gradient_is_that_of_the_plain_formula(name, bias, backend):
    experts, h_TD = make(name, bias=bias), tokens(9, dtype=torch.float64)
    ids_TK = torch.arange(E).expand(9, E)
    weights_TE = torch.rand(9, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    experts.backend = backend
    results = []
    for plainly in (True, False):
        h, w = h_TD.clone().requires_grad_(), weights_TE.clone().requires_grad_()
        experts.zero_grad()
        if plainly:
            out_TD = plain(experts, h, w)[0]
        else:
            out_TD = experts(h, Routing(ids_TK, w, torch.zeros(9, E), E))
        out_TD.square().sum().backward()
        results.append([h.grad, w.grad, *(p.grad.clone() for p in experts.parameters())])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


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
    layer.shared.set_thresholds(0.7, 0.1, 0.2)
    other.load_state_dict(layer.state_dict())
    assert float(other.shared.input_threshold) == pytest.approx(0.7)
    assert other.shared.neuron_threshold.tolist() == [pytest.approx([0.1] * F)]
    if name == "thresholded-gated":
        assert other.shared.gate_threshold.tolist() == [pytest.approx([0.2] * F)]
    assert torch.equal(other(tokens(5)), layer(tokens(5)))


def test_expected_share_by_hand():
    options = {"inputs": 0.5, "gates": 0.75, "neurons": 0.25}
    config = LayerConfig(
        num_experts=4,
        width=6,
        router="topk-softmax",
        experts="thresholded-gated",
        experts_options=options,
    )
    layer = MoELayer(D, config)
    # Half of the gate rows, half of three quarters of the up rows, a quarter of the down rows.
    assert layer.experts.expected_share() == pytest.approx((0.5 + 0.375 + 0.25) / 3)
    assert layer.experts.kept_options() == options
    shape = layer_shape(layer, dense_width=24)
    assert shape.expected_fraction(2.0) == pytest.approx(0.375 / 2)
    assert shape.experts_on(0.375 / 2) == pytest.approx(0.5)
    plain = MoELayer(
        D,
        dataclasses.replace(config, experts="thresholded-plain", experts_options={"neurons": 0.5}),
    )
    assert plain.experts.expected_share() == pytest.approx(0.75)


@pytest.mark.parametrize(
    "options", [{"inputs": 0.0}, {"gates": 1.1}, {"neurons": 0.0}, {"gates": 0.5, "neurons": 0.6}]
)
def test_settings_out_of_bounds_are_refused(options):
    with pytest.raises(InputError, match=r"must be in \(0, 1\] and neurons at most gates, got"):
        ThresholdedConfig(**options)
