"""The facts of DSMoE, arXiv 2502.12455, that hold exactly: identity, gradients, both paths.

Notation: u = dLoss/dy, z = gate logits, g = sigmoid(z), o_i = output of expert i, n experts, c
active ones, L layers.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import expert_outputs, make_layer, make_loss, tokens
from torch.utils.flop_counter import FlopCounterMode

from moesaic.nn.layer import all_experts_on, record_routing
from moesaic.ops import grouped

N, T = 6, 33


def gated(num_tokens=T, **config):
    """A layer in training with its inputs, its routing and u, in float64."""
    moe = make_layer(router_config=config).train()
    h_TD = tokens(num_tokens, dtype=torch.float64).requires_grad_()
    with record_routing(moe) as routings:
        y_TD = moe(h_TD)
    (routing,) = routings
    routing.scores_TE.retain_grad()
    return moe, h_TD, y_TD, routing


def closed_form(moe, h_TD, routing):
    """Gates, active experts and n / c, from the scores alone."""
    g_TE = routing.scores_TE.detach().sigmoid()
    on_TE = g_TE > moe.router.threshold
    scale_T1 = N / on_TE.sum(1, keepdim=True).clamp(min=1).double()
    return g_TE, on_TE, scale_T1


def test_output_is_the_formula():
    moe, h_TD, y_TD, routing = gated()
    g_TE, on_TE, scale_T1 = closed_form(moe, h_TD, routing)
    assert 0 < on_TE.sum() < N * T
    o_TED = expert_outputs(moe, h_TD)
    torch.testing.assert_close(routing.scores_TE, h_TD @ moe.router.weight.T)
    torch.testing.assert_close(y_TD, (scale_T1 * g_TE * on_TE).unsqueeze(2).mul(o_TED).sum(1))


def test_all_on_is_the_dense_network():
    moe = make_layer(dim=96, num_experts=8, width=32, dtype=torch.float32)
    h_TD = tokens(63, 96)
    gate, up = (x.flatten(0, 1) for x in moe.experts.gate_up_proj.split(32, dim=1))
    down = torch.cat(list(moe.experts.down_proj), dim=1)
    dense = nnf.linear(nnf.silu(nnf.linear(h_TD, gate)) * nnf.linear(h_TD, up), down)
    with all_experts_on(moe):
        torch.testing.assert_close(moe(h_TD), dense, rtol=0, atol=1e-5)
    assert (moe(h_TD) - dense).abs().max() > 0.1
    # Nothing is added but a gate per expert.
    num_added = sum(p.numel() for p in moe.parameters()) - sum(x.numel() for x in (gate, up, down))
    assert num_added == 96 * 8


def test_gates_of_one_are_the_dense_network():
    # Gates so far on that they are exactly one; then n / c = 1 and every weight is one.
    moe = make_layer(router_config={"bias": True}, dtype=torch.float32)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.fill_(40.0)
    h_TD = tokens(63)
    assert torch.equal(moe.router(h_TD).weights_TE(), torch.ones(63, N))
    with all_experts_on(moe):
        dense = moe(h_TD)
    for training in (True, False):
        torch.testing.assert_close(moe.train(training)(h_TD), dense, rtol=0, atol=1e-5)


def test_every_gate_learns_also_of_experts_that_are_off():
    moe, h_TD, y_TD, routing = gated()
    u_TD = tokens(T, seed=5, dtype=torch.float64)
    y_TD.backward(u_TD)
    g_TE, on_TE, scale_T1 = closed_form(moe, h_TD, routing)
    along_TE = (expert_outputs(moe, h_TD) @ u_TD.unsqueeze(2)).squeeze(2)
    expected = scale_T1 * along_TE * g_TE * (1 - g_TE)
    torch.testing.assert_close(routing.scores_TE.grad, expected)
    assert (routing.scores_TE.grad[~on_TE] != 0).all()


def test_without_the_estimator_gates_that_are_off_learn_nothing():
    moe, h_TD, y_TD, routing = gated(estimator="hard")
    u_TD = tokens(T, seed=5, dtype=torch.float64)
    y_TD.backward(u_TD)
    g_TE, on_TE, scale_T1 = closed_form(moe, h_TD, routing)
    along_TE = (expert_outputs(moe, h_TD) @ u_TD.unsqueeze(2)).squeeze(2)
    expected = on_TE * scale_T1 * along_TE * g_TE * (1 - g_TE)
    torch.testing.assert_close(routing.scores_TE.grad, expected)
    assert (routing.scores_TE.grad[~on_TE] == 0).all()


def test_values_do_not_depend_on_the_estimator():
    through, hard = gated()[2], gated(estimator="hard")[2]
    assert torch.equal(through, hard)
    torch.testing.assert_close(gated(estimator="hard-skip")[2], through)


def test_hard_skip_learns_what_hard_learns():
    def gradients(estimator):
        moe, h_TD, y_TD, routing = gated(estimator=estimator)
        mask_BS = torch.ones(1, T, dtype=torch.bool)
        u_TD = tokens(T, seed=5, dtype=torch.float64)
        ((y_TD * u_TD).sum() + make_loss("sparsity")(routing, mask_BS)).backward()
        named = {name: p.grad for name, p in moe.named_parameters()}
        return {"h": h_TD.grad, "scores": routing.scores_TE.grad, **named}

    hard, skip = gradients("hard"), gradients("hard-skip")
    assert hard.keys() == skip.keys()
    for name, value in hard.items():
        torch.testing.assert_close(skip[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("of", ["gates", "straight-through"])
def test_hard_skip_leaves_gates_that_are_off_to_the_losses(of):
    def scores_grad(with_output):
        moe, h_TD, y_TD, routing = gated(estimator="hard-skip")
        loss = make_loss("sparsity", of=of)(routing, torch.ones(1, T, dtype=torch.bool))
        u_TD = tokens(T, seed=5, dtype=torch.float64)
        (loss + with_output * (y_TD * u_TD).sum()).backward()
        return routing.scores_TE.grad, closed_form(moe, h_TD, routing)[1]

    (both, on_TE), (from_loss, _) = scores_grad(True), scores_grad(False)
    assert torch.equal(both[~on_TE], from_loss[~on_TE])
    assert (both != from_loss)[on_TE].all()


def test_hard_skip_does_not_compute_experts_that_are_off():
    def flops(estimator):
        config = {"estimator": estimator}
        moe = make_layer(dtype=torch.float32, width=128, router_config=config).train()
        h_TD = tokens(63).requires_grad_()
        with FlopCounterMode(display=False) as counter, record_routing(moe) as routings:
            moe(h_TD).sum().backward()
        return counter.get_total_flops(), routings[0].active_T().sum().item()

    # Products with 17 inputs: three of the experts' matrices and one of the router, each once
    # forward and twice backward.
    through, num_active = flops("straight-through")
    router, expert = 3 * 2 * 63 * 17 * N, 3 * 2 * 17 * 3 * 128
    assert through == router + 63 * N * expert
    assert flops("hard-skip") == (router + num_active * expert, num_active)
    assert 0 < num_active < 63 * N


def test_experts_that_are_off_learn_nothing():
    # One token, so that an expert is off for all of them.
    moe, h_TD, y_TD, routing = gated(num_tokens=1)
    u_TD = tokens(1, seed=5, dtype=torch.float64)
    y_TD.backward(u_TD)
    g_TE, on_TE, scale_T1 = closed_form(moe, h_TD, routing)
    assert 0 < on_TE.sum() < N
    for i in range(N):
        grads = [moe.experts.gate_up_proj.grad[i], moe.experts.down_proj.grad[i]]
        if not on_TE[0, i]:
            assert all((grad == 0).all() for grad in grads)
            continue
        # Down: (n / c) g_i u a_i^T, a_i the neurons of expert i.
        gate, up = (moe.experts.gate_up_proj[i] @ h_TD[0]).detach().split(5)
        a_F = nnf.silu(gate) * up
        expected = scale_T1[0] * g_TE[0, i] * torch.outer(u_TD[0], a_F)
        torch.testing.assert_close(grads[1], expected)
        assert grads[0].any()


def test_inputs_learn_through_experts_that_are_off():
    moe, h_TD, y_TD, routing = gated()
    u_TD = tokens(T, seed=5, dtype=torch.float64)
    y_TD.backward(u_TD)
    g_TE, on_TE, scale_T1 = closed_form(moe, h_TD, routing)
    # Through the outputs of active experts, with their weights held fixed ...
    h2_TD = h_TD.detach().clone().requires_grad_()
    o_TED = expert_outputs(moe, h2_TD)
    held_TE1 = (scale_T1 * g_TE * on_TE).unsqueeze(2)
    (through_outputs,) = torch.autograd.grad((held_TE1 * o_TED).sum(1), h2_TD, u_TD)
    # ... and through every gate: (n / c) <u, o_i> g_i (1 - g_i) Y_i.
    gate_TE = scale_T1 * (o_TED.detach() @ u_TD.unsqueeze(2)).squeeze(2) * g_TE * (1 - g_TE)
    from_off = (gate_TE * ~on_TE) @ moe.router.weight.detach()
    from_on = (gate_TE * on_TE) @ moe.router.weight.detach()
    torch.testing.assert_close(h_TD.grad, through_outputs + from_on + from_off)
    assert from_off.abs().max() > 1e-3


@pytest.mark.parametrize("num_layers", [1, 2])
def test_sparsity_pushes_the_active_gates_alone(num_layers):
    loss, mask_BS = make_loss("sparsity"), torch.ones(3, T // 3, dtype=torch.bool)
    layers = [gated() for _ in range(num_layers)]
    value = sum(loss(routing, mask_BS) for *_, routing in layers) / num_layers
    assert 0 <= value.item() < 1
    value.backward()
    for moe, h_TD, _, routing in layers:
        g_TE, on_TE, _ = closed_form(moe, h_TD, routing)
        expected = on_TE * g_TE * (1 - g_TE) / (num_layers * N * T)
        torch.testing.assert_close(routing.scores_TE.grad, expected)


def test_sparsity_counts_real_tokens_alone():
    *_, routing = gated()
    mask_BS = torch.arange(T).reshape(1, T) % 3 != 0
    make_loss("sparsity")(routing, mask_BS).backward()
    g_TE = routing.scores_TE.detach().sigmoid()
    expected = (g_TE > 0.5) * g_TE * (1 - g_TE) / (N * 22) * mask_BS.reshape(T, 1)
    torch.testing.assert_close(routing.scores_TE.grad, expected)


def test_sparsity_variant_pushes_every_gate():
    *_, routing = gated()
    make_loss("sparsity", of="straight-through")(
        routing, torch.ones(1, T, dtype=torch.bool)
    ).backward()
    g_TE = routing.scores_TE.detach().sigmoid()
    torch.testing.assert_close(routing.scores_TE.grad, g_TE * (1 - g_TE) / (N * T))


def test_training_and_inference_paths_agree_and_inference_skips(monkeypatch):
    moe = make_layer(dtype=torch.float32, width=128).train()
    h_TD = tokens(63)
    with record_routing(moe) as routings:
        masked = moe(h_TD)
    num_rows = []
    multiply = grouped._grouped_mm
    monkeypatch.setattr(
        grouped, "_grouped_mm", lambda *a: num_rows.append(a[0].shape[0]) or multiply(*a)
    )
    with torch.no_grad():
        gathered = moe.eval()(h_TD)
    torch.testing.assert_close(gathered, masked, rtol=1e-5, atol=1e-5)
    num_active = routings[0].active_T().sum().item()
    assert 0 < num_active < 63 * N
    assert num_rows == [num_active, num_active]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    thresholds=st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=6),
)
def test_a_higher_threshold_never_activates_more(seed, thresholds):
    moe = make_layer(seed=seed).eval()
    h_TD = tokens(63, seed=seed, dtype=torch.float64)
    means = []
    for threshold in sorted(thresholds):
        moe.router.threshold = threshold
        active_TE = moe.router(h_TD).active_TE()
        means.append(active_TE.sum().item() / 63)
    assert means == sorted(means, reverse=True)


def test_threshold_moves_after_construction():
    moe = make_layer().eval()
    h_TD = tokens(63, dtype=torch.float64)
    before, routing = moe(h_TD), moe.router(h_TD)
    moe.router.threshold = 0.7
    g_TE = routing.scores_TE.sigmoid()
    assert torch.equal(moe.router(h_TD).active_TE(), g_TE > 0.7)
    assert not torch.equal(moe(h_TD), before)
    assert "threshold=0.7" in repr(moe.router)
    moe.router.threshold = 0.5
    assert torch.equal(moe(h_TD), before)


def test_threshold_is_exceeded_strictly_and_zero_active_tokens_still_learn():
    # Y = 0: every gate is exactly 0.5, so all are off, for every token.
    moe = make_layer().train()
    with torch.no_grad():
        moe.router.weight.zero_()
    h_TD = tokens(T, dtype=torch.float64).requires_grad_()
    with record_routing(moe) as routings:
        y_TD = moe(h_TD)
    (routing,) = routings
    assert routing.active_T().sum() == 0
    assert (y_TD == 0).all()
    routing.scores_TE.retain_grad()
    u_TD = tokens(T, seed=5, dtype=torch.float64)
    y_TD.backward(u_TD)
    # c is clamped to 1, and g (1 - g) = 1/4: n <u, o_i> / 4.
    expected = N * (expert_outputs(moe, h_TD) @ u_TD.unsqueeze(2)).squeeze(2) / 4
    torch.testing.assert_close(routing.scores_TE.grad, expected)
    assert moe.router.weight.grad.any()
    with torch.no_grad():
        assert (moe.eval()(h_TD) == 0).all()


def test_soft_trains_with_every_gate_on_and_thresholds_at_inference():
    moe, h_TD, y_TD, routing = gated(estimator="soft")
    g_TE = routing.scores_TE.sigmoid()
    assert routing.active_TE().all()
    torch.testing.assert_close(y_TD, (g_TE.unsqueeze(2) * expert_outputs(moe, h_TD)).sum(1))
    evaluated = moe.router.eval()(h_TD)
    assert torch.equal(evaluated.active_TE(), g_TE > 0.5)


def test_normalisation_can_be_left_out():
    moe, h_TD, _, routing = gated(normalize="none")
    g_TE, on_TE, _ = closed_form(moe, h_TD, routing)
    torch.testing.assert_close(routing.weights_TE(), g_TE * on_TE)


def test_weight_of_one_starts_as_the_dense_network_and_still_teaches_every_gate():
    moe, h_TD, y_TD, routing = gated(value="one", normalize="none")
    u_TD = tokens(T, seed=5, dtype=torch.float64)
    y_TD.backward(u_TD)
    g_TE, on_TE, _ = closed_form(moe, h_TD, routing)
    assert torch.equal(routing.weights_TE(), on_TE.double())
    along_TE = (expert_outputs(moe, h_TD) @ u_TD.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(routing.scores_TE.grad, along_TE * g_TE * (1 - g_TE))
    # Every gate on: the dense network exactly, with or without n / c.
    for normalize in ("none", "count"):
        config = {"value": "one", "normalize": normalize, "bias": True}
        other = make_layer(router_config=config)
        with torch.no_grad():
            other.router.bias.fill_(40.0)
        with all_experts_on(other):
            dense = other(h_TD)
        for training in (True, False):
            torch.testing.assert_close(other.train(training)(h_TD), dense)


def test_count_carries_no_gradient():
    # If c had a gradient, the weight of one expert would move the gates of the others.
    *_, routing = gated()
    routing.weights_TK[:, 0].sum().backward()
    assert routing.scores_TE.grad[:, 0].all()
    assert not routing.scores_TE.grad[:, 1:].any()


def test_by_hand():
    # n = 4, gates 0.9, 0.6, 0.5, 0.2: two exceed 0.5, n / c = 2, weights 1.8, 1.2, 0, 0.
    moe = make_layer(num_experts=4, dtype=torch.float32).eval()
    gates = torch.tensor([0.9, 0.6, 0.5, 0.2])
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, 0] = gates.logit()
    h_TD = torch.zeros(1, 17).index_fill(1, torch.tensor([0]), 1.0)
    routing = moe.router(h_TD)
    torch.testing.assert_close(routing.weights_TE(), torch.tensor([[1.8, 1.2, 0.0, 0.0]]))
    assert routing.ids_TK.tolist() == [[0, 1, 4, 4]]
    # In training the slots that are off keep their expert.
    assert moe.router.train()(h_TD).ids_TK.tolist() == [[0, 1, 2, 3]]
