"""What every registered router owes its layer; a new one is tested the moment it is listed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import dense_weights, make_router, route, router_options, tokens

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.routers._table import ROUTERS

each_router = pytest.mark.parametrize("name", ROUTERS)
E = 6
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def check_values(routing, num_tokens, num_experts):
    assert routing.num_experts == num_experts
    assert routing.ids_TK.dtype == torch.int64
    assert routing.ids_TK.shape == routing.weights_TK.shape
    assert routing.ids_TK.shape[0] == routing.scores_TE.shape[0] == num_tokens
    assert routing.scores_TE.shape[1] >= num_experts
    assert ((routing.ids_TK >= 0) & (routing.ids_TK <= num_experts)).all()
    assert (routing.weights_TK[routing.ids_TK == num_experts] == 0).all()
    assert routing.weights_TK.isfinite().all()
    for ids in routing.ids_TK.tolist():
        held = [i for i in ids if i < num_experts]
        assert len(held) == len(set(held))


@each_router
@FLOATS
@pytest.mark.parametrize("num_tokens", [0, 1, 63])
@pytest.mark.parametrize("num_experts", [1, E])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values(name, dtype, num_tokens, num_experts, training):
    router = make_router(name, num_experts).to(dtype).train(training)
    routing = route(router, tokens(num_tokens, dtype=dtype))
    check_values(routing, num_tokens, num_experts)
    better = torch.promote_types(dtype, torch.float32)
    assert routing.scores_TE.dtype == routing.weights_TK.dtype == better


@each_router
def test_half_precision_decides_as_float32_does(name):
    router = make_router(name, E).to(torch.bfloat16)
    h_TD = tokens(63, dtype=torch.bfloat16)
    expected = route(copy.deepcopy(router).float(), h_TD.float())
    for routing in (route(router, h_TD), autocast(router.float(), h_TD.float())):
        assert torch.equal(routing.ids_TK, expected.ids_TK)
        assert torch.equal(routing.weights_TK, expected.weights_TK)


def seeded(router, h_TD):
    """Route from one state of the global generator, which noise may be drawn from."""
    torch.manual_seed(0)
    return route(router, h_TD)


def autocast(router, h_TD):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return route(router, h_TD)


@each_router
def test_training_and_evaluation_weigh_alike(name):
    router, h_TD = make_router(name, E), tokens(63)
    train, evaluate = route(router.train(), h_TD), route(router.eval(), h_TD)
    if "noise-in-training" in ROUTERS[name].abilities:
        assert not torch.equal(train.scores_TE[:, :E], evaluate.scores_TE)
        assert torch.equal(route(router, h_TD).scores_TE, evaluate.scores_TE)
    elif "batch-in-training" in ROUTERS[name].abilities:
        # It then decides by other tokens too, but scores alike.
        assert torch.equal(train.scores_TE, evaluate.scores_TE)
    else:
        assert torch.equal(train.weights_TE(), evaluate.weights_TE())
        assert torch.equal(train.active_TE(), evaluate.active_TE())
    # Otherwise nothing was decided.
    assert 0 < train.active_TE().sum() < 63 * E


@pytest.mark.parametrize("estimator", ["straight-through", "hard", "hard-skip"])
def test_estimators_change_no_value(estimator):
    h_TD = tokens(63)
    router = make_router("sigmoid-threshold", E, estimator=estimator)
    expected = route(make_router("sigmoid-threshold", E), h_TD)
    for training in (True, False):
        routing = route(router.train(training), h_TD)
        check_values(routing, 63, E)
        assert torch.equal(routing.weights_TE(), expected.weights_TE())
        held_TK = routing.ids_TK < E
        if training and estimator != "hard-skip":
            assert held_TK.all()
        else:
            assert torch.equal(held_TK, expected.active_TE())


@each_router
def test_permuting_tokens_permutes_the_routing(name):
    router, h_TD = make_router(name, E), tokens(63)
    order_T = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        route(router, h_TD[order_T]).weights_TE(), route(router, h_TD).weights_TE()[order_T]
    )


@each_router
def test_renumbering_experts_renumbers_the_routing(name):
    router, h_TD = make_router(name, E), tokens(63)
    before = route(router, h_TD)
    order_E = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    if "groups" in ROUTERS[name].abilities:
        # Neighbours stay together, whichever their number.
        order_E = torch.arange(E).flip(0)
    if "fixed" in ROUTERS[name].abilities:
        router.table_VK.copy_(order_E.argsort()[router.table_VK])
    with torch.no_grad():
        for parameter in router.parameters():
            # Rows after E are those of null experts.
            parameter[:E] = parameter[:E][order_E].clone()
            if parameter.shape[1:] == (E,):
                # Columns of hidden units that are numbered as the experts are.
                parameter.copy_(parameter[:, order_E])
    after = route(router, h_TD)
    torch.testing.assert_close(after.weights_TE(), before.weights_TE()[:, order_E])
    torch.testing.assert_close(after.scores_TE[:, :E], before.scores_TE[:, :E][:, order_E])


@each_router
def test_tokens_do_not_see_each_other(name):
    router, h_TD = make_router(name, E), tokens(63)
    together = route(router, h_TD).weights_TE()
    if "sees-batch" in ROUTERS[name].abilities:
        assert not torch.equal(route(router, h_TD[:5]).active_TE(), together[:5] != 0)
        return
    torch.testing.assert_close(route(router, h_TD[:5]).weights_TE(), together[:5])
    torch.testing.assert_close(
        torch.cat([route(router, h_D[None]).weights_TE() for h_D in h_TD]), together
    )


@each_router
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["ordinary", "saturated"])
def test_gradients_are_finite(name, scale):
    router, h_TD = make_router(name, E, spread_out=scale).train(), tokens(63).requires_grad_()
    routing = route(router, h_TD)
    check_values(routing, 63, E)
    if "fixed" in ROUTERS[name].abilities:
        assert not routing.weights_TK.requires_grad
        return
    probe_TE = tokens(63, E, seed=3)
    (routing.weights_TE() * probe_TE).sum().backward()
    for parameter in (h_TD, *router.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    if scale == 1.0:
        assert router.weight.grad[:E].any(1).all()


@each_router
def test_plain_routers_ignore_the_state(name):
    if "stateful" in ROUTERS[name].abilities:
        return
    router, h_TD = make_router(name, E), tokens(63)
    alone = route(router, h_TD)
    beside = route(router, h_TD, previous=alone, progress=0.5)
    assert torch.equal(beside.weights_TE(), alone.weights_TE())


@each_router
def test_routing_is_pure(name):
    router, h_TD = make_router(name, E).train(), tokens(63)
    before = copy.deepcopy(router.state_dict())
    first, second = (seeded(router, h_TD) for _ in range(2))
    assert torch.equal(first.weights_TE(), second.weights_TE())
    for key, value in router.state_dict().items():
        assert torch.equal(value, before[key]), key


@each_router
@settings(max_examples=15, deadline=None)
@given(
    num_experts=st.integers(1, 9),
    num_tokens=st.integers(0, 9),
    seed=st.integers(0, 2**31),
    spread_out=st.floats(0.0, 30.0),
)
def test_abilities_tell_the_truth(name, num_experts, num_tokens, seed, spread_out):
    router = make_router(name, num_experts, seed=seed, spread_out=spread_out)
    routing = route(router, tokens(num_tokens, seed=seed))
    check_values(routing, num_tokens, num_experts)
    abilities = ROUTERS[name].abilities
    torch.testing.assert_close(
        routing.weights_TE().double(), dense_weights(routing), rtol=0, atol=0
    )
    held_T = (routing.ids_TK < num_experts).sum(1)
    if "top-k" in abilities:
        assert routing.ids_TK.shape[1] == router.config.top_k
    if "variable" not in abilities:
        assert (held_T == routing.ids_TK.shape[1]).all()
    if "may-choose-none" not in abilities and routing.scores_TE.shape[1] == num_experts:
        assert (held_T >= 1).all()


@each_router
def test_unknown_setting_names_the_closest(name):
    first = dataclasses.fields(ROUTERS.load_config(name))[0].name
    config = LayerConfig(num_experts=E, width=5, router=name, router_options={first[:-1]: 1})
    with pytest.raises(
        InputError, match=rf"router {name} option '{first[:-1]}' is unknown; did you mean .*{first}"
    ):
        MoELayer(17, config)


@each_router
def test_fresh_weights_are_small_and_differ(name):
    config = LayerConfig(
        num_experts=E, width=5, router=name, router_options=router_options(name, E)
    )
    router = MoELayer(256, config).router
    assert f"experts={E}" in router.extra_repr()
    if "fixed" in ROUTERS[name].abilities:
        assert not list(router.parameters())
        return
    before = router.weight.detach().clone()
    router.reset_parameters()
    assert not torch.equal(router.weight, before)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cmoe", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("cmoe", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("cmoe", {"bias_step": -1.0}, r"bias_step must be at least 0, got -1.0; 0.001 is"),
        ("cmoe", {"activation": "sliu"}, r"'sliu' is unknown; did you mean silu"),
        ("expert-choice", {"capacity": 0.0}, r"capacity must be above 0, got 0.0; 2 gives a token"),
        (
            "expert-choice",
            {"capacity": 7.0},
            r"capacity must be in \(0, num_experts=6\], got 7; low",
        ),
        ("grouped-top-k", {"num_groups": 0}, r"num_groups must be at least 1, got 0"),
        ("grouped-top-k", {"num_groups": 4}, r"num_groups must divide num_experts=6, got 4"),
        ("grouped-top-k", {"per_group": 0}, r"per_group must be at least 1, got 0"),
        (
            "grouped-top-k",
            {"num_groups": 3, "per_group": 3},
            r"per_group must be in \[1, num_experts / num_groups=2\], got 3; lower it or",
        ),
        (
            "hash",
            {"vocab_size": 0},
            r"vocab_size must be at least 1, got 0; give that of the model",
        ),
        ("hash", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("hash", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("hash", {"seed": -1}, r"seed must be at least 0, got -1"),
        ("linear-top-k", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("linear-top-k", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("mlp-top-k", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("nearest-top-k", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("noisy-top-k", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("noisy-top-k", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("noisy-top-k", {"scale": 0.0}, r"scale must be above 0, got 0.0; num_experts / top_k"),
        ("noisy-top-k", {"gate": "liner"}, r"'liner' is unknown; did you mean linear"),
        ("null-experts", {"num_null": -1}, r"num_null must be at least 0, got -1"),
        ("null-experts", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        (
            "null-experts",
            {"num_null": 2, "top_k": 9},
            r"top_k must be in \[1, num_experts \+ num_null=8\], got 9",
        ),
        ("selective-sinkhorn", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("selective-sinkhorn", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("selective-sinkhorn", {"probability": 2.0}, r"probability must be in \[0, 1\], got 2.0"),
        ("selective-sinkhorn", {"temperature": 0.0}, r"temperature must be above 0, got 0.0"),
        ("selective-sinkhorn", {"noise": -1.0}, r"noise must be at least 0, got -1.0"),
        ("selective-sinkhorn", {"max_rounds": 0}, r"max_rounds must be at least 1, got 0"),
        ("selective-sinkhorn", {"tolerance": 0.0}, r"tolerance must be in \(0, 1\), got 0.0"),
        ("selective-sinkhorn", {"gain": "linaer"}, r"'linaer' is unknown; did you mean linear"),
        ("sigmoid-threshold", {"threshold": 1.0}, r"threshold must be in \[0, 1\), got 1.0"),
        ("sigmoid-threshold", {"threshold": -0.1}, r"threshold must be in \[0, 1\), got -0.1"),
        ("sigmoid-threshold", {"threshold": float("nan")}, r"in \[0, 1\), got nan"),
        ("sigmoid-threshold", {"estimator": "sotf"}, r"'sotf' is unknown; did you mean soft"),
        (
            "sigmoid-threshold",
            {"value": "one", "estimator": "hard"},
            r"value 'one' leaves estimator 'hard' no gradient; use",
        ),
        (
            "sigmoid-threshold",
            {"value": "one", "estimator": "hard-skip"},
            r"value 'one' leaves estimator 'hard-skip' no gradient; use",
        ),
        ("sigmoid-top-k", {"bias_step": -1.0}, r"bias_step must be at least 0, got -1.0; 0.001 is"),
        ("sigmoid-top-k", {"bias_rule": "sing"}, r"'sing' is unknown; did you mean sign"),
        (
            "sigmoid-top-k",
            {"num_groups": 4},
            r"num_groups must divide num_experts=6, got 4; choose",
        ),
        (
            "sigmoid-top-k",
            {"num_groups": 2, "top_groups": 3},
            r"top_groups must be in \[1, num_groups=2\], got 3; 1 and 1 are no groups",
        ),
        (
            "sigmoid-top-k",
            {"num_groups": 3, "top_k": 3},
            r"top_k must be at most the 2 experts of top_groups=1, got 3; raise top_groups",
        ),
        ("zero-computation", {"top_k": 0}, r"top_k must be at least 1, got 0; 2 is usual"),
        ("zero-computation", {"top_k": 11}, r"top_k must be in \[1, num_experts=10\], got 11"),
        ("zero-computation", {"num_copy": -1}, r"must be at least 0, got 1, -1, 2; 1, 1 and 2"),
        ("token-rounding", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("token-rounding", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("token-rounding", {"tile_rows": 0}, r"tile_rows must be at least 1, got 0; 128 is"),
        ("token-rounding", {"rounding": "uo"}, r"'uo' is unknown; did you mean up"),
        ("top-p", {"threshold": 1.1}, r"threshold must be in \[0, 1\], got 1.1"),
        ("topk-softmax", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("topk-softmax", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("topk-softmax", {"renormalize": 1}, r"renormalize must be a bool, got 1"),
    ],
)
def test_wrong_settings_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        MoELayer(17, LayerConfig(num_experts=E, width=5, router=name, router_options=options))


def test_topk_softmax_by_hand():
    # exp of the scores is 1, 3, 2, 2, their sum 8: p = 1/8, 3/8, 2/8, 2/8.
    # Top 2 with a clear second place: scores 1, 3, 2.5, 1.5 of sum 8.
    router = make_router("topk-softmax", 4, top_k=2)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([1.0, 3.0, 2.5, 1.5]).log()
    h_TD = torch.zeros(1, 17).index_fill(1, torch.tensor([0]), 1.0)
    routing = router(h_TD)
    assert routing.ids_TK.tolist() == [[1, 2]]
    # 3 / 5.5 and 2.5 / 5.5.
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[6 / 11, 5 / 11]]))
    torch.testing.assert_close(routing.weights_TE(), torch.tensor([[0, 6 / 11, 5 / 11, 0]]))
    raw = make_router("topk-softmax", 4, top_k=2, renormalize=False)
    raw.load_state_dict(router.state_dict())
    # 3 / 8 and 2.5 / 8.
    torch.testing.assert_close(raw(h_TD).weights_TK, torch.tensor([[3 / 8, 2.5 / 8]]))
