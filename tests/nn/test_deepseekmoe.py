"""DeepSeekMoE, arXiv 2401.06066: fine experts, shared experts, plain gates and its two losses."""

from __future__ import annotations

import pytest
import torch
from nn_cases import expert_outputs, hand_routing, make_layer, make_loss, make_router, tokens

from moesaic.nn.layer import LayerConfig, MoELayer, record_routing
from moesaic.nn.routing import Routing

E, D, W, SHARED = 6, 17, 8, 2
PLAIN = {"top_k": 3, "renormalize": False}


def deepseek_layer(**layer):
    """Routed experts of width W beside the width of two shared ones."""
    options = {"num_experts": E, "width": W, "router_config": PLAIN, "shared_width": SHARED * W}
    return make_layer("topk-softmax", **{**options, **layer})


def cut(weights_EFD: torch.Tensor, pieces: int) -> torch.Tensor:
    """Cut the rows of every expert into pieces, which become experts."""
    return weights_EFD.unflatten(1, (pieces, -1)).flatten(0, 1)


@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_of_an_expert_with_its_gate_are_the_expert(pieces):
    coarse = make_layer("topk-softmax", num_experts=E, width=W, router_config=PLAIN)
    fine = make_layer(
        "topk-softmax", num_experts=E * pieces, width=W // pieces, router_config=PLAIN
    )
    gate_EFD, up_EFD = coarse.experts.gate_up_proj.chunk(2, dim=1)
    with torch.no_grad():
        fine.experts.gate_up_proj.copy_(torch.cat([cut(gate_EFD, pieces), cut(up_EFD, pieces)], 1))
        down_EFD = coarse.experts.down_proj.transpose(1, 2)
        fine.experts.down_proj.copy_(cut(down_EFD, pieces).transpose(1, 2))
    h_TD = tokens(63, dtype=torch.float64)
    parent = coarse.router(h_TD)
    ids_TKM = parent.ids_TK.unsqueeze(2) * pieces + torch.arange(pieces)
    weights_TK = parent.weights_TK.repeat_interleave(pieces, dim=1)
    routing = Routing(ids_TKM.flatten(1), weights_TK, parent.scores_TE, E * pieces)
    torch.testing.assert_close(
        fine.experts(h_TD, routing), coarse.experts(h_TD, parent), rtol=0, atol=1e-5
    )


def test_shared_experts_are_one_wide_network():
    moe, h_TD = deepseek_layer(num_experts=0), tokens(63, dtype=torch.float64)
    gate_FD, up_FD = moe.shared.gate_up_proj[0].chunk(2)
    alone = make_layer(num_experts=SHARED, width=W)
    with torch.no_grad():
        rows = [torch.cat(pair) for pair in zip(gate_FD.split(W), up_FD.split(W), strict=True)]
        alone.experts.gate_up_proj.copy_(torch.stack(rows))
        alone.experts.down_proj.copy_(torch.stack(moe.shared.down_proj[0].split(W, dim=1)))
    expected = expert_outputs(alone, h_TD).sum(1)
    torch.testing.assert_close(moe(h_TD), expected, rtol=0, atol=1e-6)


def test_layer_is_shared_experts_plus_gated_ones():
    moe, h_TD = deepseek_layer(), tokens(63, dtype=torch.float64)
    probs_TE = (h_TD @ moe.router.weight.T).softmax(-1)
    ranked_TE = probs_TE.argsort(1, descending=True).argsort(1)
    gates_TE = torch.where(ranked_TE < 3, probs_TE, 0.0)
    routed_TD = (gates_TE.unsqueeze(2) * expert_outputs(moe, h_TD)).sum(1)
    torch.testing.assert_close(moe(h_TD), routed_TD + moe.shared(h_TD))
    assert (gates_TE.sum(1) < 1).all()


def test_shared_part_does_not_ask_the_router():
    moe, h_TD = deepseek_layer(), tokens(63, dtype=torch.float64)
    moe.shared(h_TD).sum().backward()
    assert moe.router.weight.grad is None
    with torch.no_grad():
        before = moe.shared(h_TD)
        moe.router.weight.add_(1.0)
        assert torch.equal(moe.shared(h_TD), before)


def test_no_token_is_dropped_though_all_want_one_expert():
    moe = deepseek_layer()
    with torch.no_grad():
        moe.router.weight.copy_(torch.zeros(E, D))
        moe.router.weight[2] = 1.0
    routing = moe.router(tokens(63, dtype=torch.float64).abs())
    assert routing.counts_E()[2] == 63
    assert routing.active_T().tolist() == [3] * 63


def test_first_layer_may_stay_dense():
    dense = MoELayer(D, LayerConfig(num_experts=0, shared_width=4 * W))
    assert [name for name, _ in dense.named_children()] == ["shared"]


MASK_BS = torch.ones(7, 9, dtype=torch.bool)


def expert_loss(routing, **options):
    return make_loss("load-balance", share_of="choices", **options)(routing, MASK_BS).item()


def group_loss(routing, num_groups):
    return make_loss("group-balance", num_groups=num_groups)(routing, MASK_BS).item()


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_expert_loss_is_one_at_balance(scope):
    # Any choice at uniform probabilities, here all of one expert.
    flat = hand_routing(torch.zeros(63, E), [[0, 1, 2]] * 63)
    assert expert_loss(flat, scope=scope) == pytest.approx(1.0)
    # Any probabilities where every expert is chosen as often: all six by every token.
    even = hand_routing(tokens(63, E), [list(range(E))] * 63)
    assert expert_loss(even, scope=scope) == pytest.approx(1.0)


def test_groups_between_one_and_all_experts():
    # Ten times the usual spread, so that experts are far from even.
    routing = make_router("topk-softmax", E, spread_out=10.0, **PLAIN)(tokens(63))
    assert group_loss(routing, 1) == pytest.approx(1.0)
    assert group_loss(routing, E) == pytest.approx(expert_loss(routing))
    assert expert_loss(routing) != pytest.approx(1.0, abs=1e-3)


def test_expert_loss_is_the_formula():
    # F_i = E / (k T) times the tokens that select i, P_i the mean probability, written out.
    routing = make_router("topk-softmax", E, **PLAIN)(tokens(63))
    count_E = torch.bincount(routing.ids_TK.flatten(), minlength=E)
    load_E, probs_E = E / (3 * 63) * count_E, routing.scores_TE.softmax(-1).mean(0)
    assert expert_loss(routing) == pytest.approx((load_E * probs_E).sum().item())
    load_G, probs_G = load_E.reshape(3, 2).mean(1), probs_E.reshape(3, 2).sum(1)
    assert group_loss(routing, 3) == pytest.approx((load_G * probs_G).sum().item())


@pytest.mark.parametrize("name", ["load-balance", "group-balance"])
def test_gradient_flows_through_probabilities_alone(name):
    options = {"share_of": "choices"} if name == "load-balance" else {"num_groups": 3}
    moe = deepseek_layer().train()
    with record_routing(moe) as routings:
        moe(tokens(63, dtype=torch.float64))
    (routing,) = routings
    routing.scores_TE.retain_grad()
    make_loss(name, **options)(routing, MASK_BS).backward()
    # L = sum_i c_i P_i with c constant: dL/ds_te = p_te (c_e - sum_f c_f p_tf) / T.
    load_E = E / (3 * 63) * routing.counts_E().double()
    if name == "group-balance":
        load_E = load_E.reshape(3, 2).mean(1).repeat_interleave(2)
    probs_TE = routing.scores_TE.detach().softmax(-1)
    expected = probs_TE * (load_E - (probs_TE * load_E).sum(1, keepdim=True)) / 63
    torch.testing.assert_close(routing.scores_TE.grad, expected)
    assert moe.shared.gate_up_proj.grad is None
