"""MoGE, arXiv 2505.21411: equal counts by construction, global weights, extremes, groups moved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import make_layer, make_loss, make_router, set_scores, tokens

from moesaic.nn.layer import record_routing

E, G = 12, 4


def grouped(num_experts=E, **options):
    return make_router("grouped-top-k", num_experts, **{"num_groups": G, **options})


def imbalance(routing, num_groups=G):
    """Most less least expert computations of a device, by tokens; a weight of zero is one too."""
    load_E = torch.bincount(routing.ids_TK.flatten(), minlength=E)
    load_G = load_E.unflatten(0, (num_groups, -1)).sum(1)
    return float(load_G.max() - load_G.min()) / routing.ids_TK.shape[0]


@settings(max_examples=30, deadline=None)
@given(
    num_groups=st.integers(1, 5),
    size=st.integers(1, 4),
    data=st.data(),
    seed=st.integers(0, 2**31),
    spread_out=st.floats(0.0, 1e4),
)
def test_every_group_gives_as_many(num_groups, size, data, seed, spread_out):
    per_group = data.draw(st.integers(1, size))
    options = {"num_groups": num_groups, "per_group": per_group}
    router = grouped(num_groups * size, seed=seed, spread_out=spread_out, **options)
    routing = router(tokens(20, seed=seed))
    ids_TGJ = routing.ids_TK.unflatten(1, (num_groups, per_group))
    assert torch.equal(ids_TGJ // size, torch.arange(num_groups)[:, None].expand_as(ids_TGJ))
    assert all(len(set(ids)) == len(ids) for ids in routing.ids_TK.tolist())


@pytest.mark.parametrize("scores", [torch.zeros(E), torch.arange(E) * 50.0], ids=["flat", "steep"])
def test_devices_are_even_where_plain_top_k_is_not(scores):
    router = grouped()
    even = router(set_scores(router, scores.expand(16, E)))
    assert imbalance(even) == 0.0
    plain = make_router("topk-softmax", E, top_k=G)
    assert imbalance(plain(set_scores(plain, scores.expand(16, E)))) > 1.0
    assert imbalance(make_router("topk-softmax", E, top_k=G)(tokens(16))) > 0.0


def test_a_group_far_behind_gives_its_best():
    # All its probabilities are zero in float32.
    router = grouped()
    routing = router(set_scores(router, torch.arange(E)[None] * 50.0))
    assert routing.ids_TK.tolist() == [[2, 5, 8, 11]]


def test_one_group_is_top_k_without_renormalisation():
    router = grouped(num_groups=1, per_group=5)
    plain = make_router("topk-softmax", E, top_k=5, renormalize=False)
    plain.load_state_dict(router.state_dict())
    routing, expected = router(tokens(63)), plain(tokens(63))
    assert torch.equal(routing.ids_TK, expected.ids_TK)
    torch.testing.assert_close(routing.weights_TK, expected.weights_TK, rtol=0, atol=1e-6)


def test_whole_groups_are_the_dense_mixture():
    routing = grouped(per_group=E // G)(tokens(63))
    torch.testing.assert_close(routing.weights_TE(), routing.scores_TE.softmax(-1))


def test_mass_is_at_most_that_of_plain_top_k():
    routing = grouped()(tokens(63))
    best_TK = routing.scores_TE.softmax(-1).topk(G).values
    mass_T = routing.weights_TK.sum(1)
    assert (mass_T <= best_TK.sum(1) + 1e-6).all()
    assert (mass_T < 1).all()
    assert (mass_T < best_TK.sum(1) - 1e-3).any()


def test_by_hand():
    # Groups (0, 1) and (2, 3). p = (4, 2, 1, 1) / 8: 0 and, by the lower index, 2; then the scale.
    router = make_router("grouped-top-k", 4)
    scores_TE = torch.tensor([[4.0, 2, 1, 1], [1, 3, 2, 2]]).log()
    routing = router(set_scores(router, scores_TE))
    assert routing.ids_TK.tolist() == [[0, 2], [1, 2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[4.0, 1], [3, 2]]) / 8)
    scaled = make_router("grouped-top-k", 4, learn_scale=True)
    with torch.no_grad():
        scaled.scale.copy_(torch.tensor([0.5, 2.0, 4.0, 9.0]))
    routing = scaled(set_scores(scaled, scores_TE))
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[2.0, 4], [6, 8]]) / 8)


def test_a_fresh_scale_changes_nothing():
    router, scaled = grouped(), grouped(learn_scale=True)
    scaled.reset_parameters()
    scaled.weight.data.copy_(router.weight)
    assert torch.equal(scaled(tokens(63)).weights_TK, router(tokens(63)).weights_TK)
    scaled(tokens(63)).weights_TK.sum().backward()
    assert scaled.scale.grad.all()


def moved(moe, order_E):
    """The same layer with its experts in another order, router rows with them."""
    other = make_layer("grouped-top-k", num_experts=E, router_config={"num_groups": G})
    with torch.no_grad():
        other.router.weight.copy_(moe.router.weight[order_E])
        other.experts.gate_up_proj.copy_(moe.experts.gate_up_proj[order_E])
        other.experts.down_proj.copy_(moe.experts.down_proj[order_E])
    return other


def test_groups_may_change_places_and_experts_may_not_change_groups():
    moe = make_layer("grouped-top-k", num_experts=E, router_config={"num_groups": G})
    h_TD = tokens(63, dtype=torch.float64)
    groups = torch.arange(E).reshape(G, -1)
    torch.testing.assert_close(moved(moe, groups[[2, 0, 3, 1]].flatten())(h_TD), moe(h_TD))
    torch.testing.assert_close(moved(moe, groups.flip(1).flatten())(h_TD), moe(h_TD))
    assert not torch.allclose(moved(moe, groups.T.flatten())(h_TD), moe(h_TD))


def test_loss_is_one_at_balance_and_teaches_who_was_not_chosen():
    moe = make_layer("grouped-top-k", num_experts=E, router_config={"num_groups": G}).train()
    loss = make_loss("load-balance", share_of="choices")
    with record_routing(moe) as routings:
        moe(tokens(20, dtype=torch.float64))
    (routing,) = routings
    routing.scores_TE.retain_grad()
    loss(routing, torch.ones(4, 5, dtype=torch.bool)).backward()
    assert routing.scores_TE.grad[~routing.active_TE()].all()
    with torch.no_grad():
        moe.router.weight.zero_()
    flat = moe.router(tokens(20, dtype=torch.float64))
    assert loss(flat, torch.ones(4, 5, dtype=torch.bool)).item() == pytest.approx(1.0)
