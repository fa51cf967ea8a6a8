"""What every registered router owes its layer; a new one is tested the moment it is listed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import dense_weights, end_schedules, make_router, route, router_options, tokens

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.routers._table import ROUTERS

each_router = pytest.mark.parametrize("name", ROUTERS)
# Those that decide by the token; the others draw.
HEARING = [name for name in ROUTERS if "random" not in ROUTERS[name].abilities]
each_hearing_router = pytest.mark.parametrize("name", HEARING)
each_random_router = pytest.mark.parametrize("name", [n for n in ROUTERS if n not in HEARING])
E = 6
# Parameters whose rows are no experts.
OF_NO_EXPERT = ("project", "cell.", "norm_", "task_")
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
    expected = seeded(copy.deepcopy(router).float(), h_TD.float())
    for routing in (seeded(router, h_TD), autocast(router.float(), h_TD.float())):
        assert torch.equal(routing.ids_TK, expected.ids_TK)
        assert torch.equal(routing.weights_TK, expected.weights_TK)


def seeded(router, h_TD):
    """Route from one state of the global generator, which noise may be drawn from."""
    torch.manual_seed(0)
    return route(router, h_TD)


def autocast(router, h_TD):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return seeded(router, h_TD)


@each_router
def test_training_and_evaluation_weigh_alike(name):
    router, h_TD = make_router(name, E), tokens(63)
    train, evaluate = route(router.train(), h_TD), route(router.eval(), h_TD)
    if "noise-in-training" in ROUTERS[name].abilities:
        assert not torch.equal(train.scores_TE[:, :E], evaluate.scores_TE)
        assert torch.equal(route(router, h_TD).scores_TE, evaluate.scores_TE)
    elif ROUTERS[name].abilities & {"batch-in-training", "random"}:
        # It then decides by other tokens too, or draws, but scores alike.
        assert torch.equal(train.scores_TE, evaluate.scores_TE)
    elif "scheduled" in ROUTERS[name].abilities:
        # Training begins otherwise and ends as evaluation always is.
        assert not torch.equal(train.weights_TE(), evaluate.weights_TE())
        end_schedules(router)
        for training in (True, False):
            assert torch.equal(router.train(training)(h_TD).weights_TE(), evaluate.weights_TE())
    else:
        assert torch.equal(train.weights_TE(), evaluate.weights_TE())
        assert torch.equal(train.active_TE(), evaluate.active_TE())
    # Otherwise nothing was decided.
    assert 0 < evaluate.active_TE().sum() < 63 * E


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


@each_hearing_router
def test_permuting_tokens_permutes_the_routing(name):
    router, h_TD = make_router(name, E), tokens(63)
    order_T = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        route(router, h_TD[order_T]).weights_TE(), route(router, h_TD).weights_TE()[order_T]
    )


@torch.no_grad()
def exchange_siblings(router):
    """Exchange the leaves of the last split of every tree; gives the new order."""
    trees, last = router.config.num_trees, E - 2
    walk = router._walk
    left, right = walk.index(E - 2), walk.index(E - 1)
    order_E = torch.arange(E)
    order_E[[left, right]] = order_E[[right, left]]
    for parameter in (router.weight, router.bias):
        each = parameter.unflatten(0, (trees, E))
        each.copy_(each[:, order_E].clone())
    for parameter in (router.split_weight, router.split_bias):
        parameter.unflatten(0, (trees, E - 1))[:, last] *= -1
    return order_E


@each_hearing_router
def test_renumbering_experts_renumbers_the_routing(name):
    router, h_TD = make_router(name, E), tokens(63)
    before = route(router, h_TD)
    order_E = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    if "groups" in ROUTERS[name].abilities:
        # Neighbours stay together, whichever their number.
        order_E = torch.arange(E).flip(0)
    if "trees" in ROUTERS[name].abilities:
        # A tree stays itself where two leaves of one split, and its sides, change places.
        order_E = exchange_siblings(router)
    if "fixed" in ROUTERS[name].abilities:
        router.table_VK.copy_(order_E.argsort()[router.table_VK])
    with torch.no_grad():
        for parameter_name, parameter in router.named_parameters():
            if "trees" in ROUTERS[name].abilities or parameter_name.startswith(OF_NO_EXPERT):
                continue
            # Rows after E are those of null experts.
            parameter[:E] = parameter[:E][order_E].clone()
            if parameter.shape[1:] == (E,):
                # Columns of hidden units that are numbered as the experts are.
                parameter.copy_(parameter[:, order_E])
    after = route(router, h_TD)
    torch.testing.assert_close(after.weights_TE(), before.weights_TE()[:, order_E])
    torch.testing.assert_close(after.scores_TE[:, :E], before.scores_TE[:, :E][:, order_E])


@each_hearing_router
def test_sequences_do_not_see_each_other(name):
    router, h_TD = make_router(name, E), tokens(63)
    if "sees-batch" in ROUTERS[name].abilities:
        return
    together = route(router, h_TD, num_sequences=7).weights_TE()
    alone = [route(router, part_TD, num_sequences=1).weights_TE() for part_TD in h_TD.split(9)]
    torch.testing.assert_close(torch.cat(alone), together)
    reads = "sequences" in ROUTERS[name].abilities
    assert reads == router.reads_sequences
    assert reads != torch.equal(together, route(router, h_TD).weights_TE())


@each_hearing_router
def test_tokens_do_not_see_each_other(name):
    if "sequences" in ROUTERS[name].abilities:
        return
    router, h_TD = make_router(name, E), tokens(63)
    together = route(router, h_TD).weights_TE()
    if "sees-batch" in ROUTERS[name].abilities:
        assert not torch.equal(route(router, h_TD[:5]).active_TE(), together[:5] != 0)
        return
    torch.testing.assert_close(route(router, h_TD[:5]).weights_TE(), together[:5])
    torch.testing.assert_close(
        torch.cat([route(router, h_D[None]).weights_TE() for h_D in h_TD]), together
    )


@each_hearing_router
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
    if ROUTERS[name].abilities & {"stateful", "sequences"}:
        return
    router, h_TD = make_router(name, E), tokens(63)
    alone = seeded(router, h_TD)
    torch.manual_seed(0)
    beside = route(router, h_TD, previous=alone, num_sequences=3)
    assert torch.equal(beside.weights_TE(), alone.weights_TE())


@each_router
def test_routing_is_pure(name):
    router, h_TD = make_router(name, E).train(), tokens(63)
    before = copy.deepcopy(router.state_dict())
    first, second = (seeded(router, h_TD) for _ in range(2))
    assert torch.equal(first.weights_TE(), second.weights_TE())
    for key, value in router.state_dict().items():
        assert torch.equal(value, before[key]), key


@each_random_router
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_draws_are_even_and_repeat_with_the_seed(name, training):
    router, h_TD = make_router(name, E).train(training), tokens(1)
    torch.manual_seed(0)
    draws = [router(h_TD).counts_E() for _ in range(1000)]
    torch.manual_seed(0)
    assert all(torch.equal(router(h_TD).counts_E(), counts_E) for counts_E in draws)
    # Binomial: three deviations of sqrt(1000 * 1/6 * 5/6).
    assert (torch.stack(draws).sum(0) - 1000 / E).abs().max() < 3 * (1000 / E * (1 - 1 / E)) ** 0.5


@pytest.mark.parametrize(
    "name", [name for name in ROUTERS if "scheduled" in ROUTERS[name].abilities]
)
def test_schedules_follow_the_steps_and_are_saved(name):
    router, h_TD = make_router(name, E).train(), tokens(63)
    first = seeded(router, h_TD)
    for _ in range(3):
        router.end_step()
    again = make_router(name, E, seed=5).train()
    again.load_state_dict(router.state_dict())
    assert again.clock.step() == 3
    assert torch.equal(seeded(again, h_TD).weights_TE(), seeded(router, h_TD).weights_TE())
    end_schedules(router)
    last = seeded(router, h_TD)
    assert not torch.equal(last.weights_TE(), first.weights_TE())
    # Evaluation does not ask how far training has come.
    evaluated = router.eval()(h_TD)
    router.clock.reset_parameters()
    assert torch.equal(router(h_TD).weights_TE(), evaluated.weights_TE())
    router.end_step()
    router.reset_parameters()
    assert router.clock.step() == 0


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


@each_hearing_router
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
    # Leaves of trees are uniform within 0.05.
    std = 0.05 / 3**0.5 if "trees" in ROUTERS[name].abilities else 0.02
    assert router.weight.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cmoe", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("cmoe", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("cmoe", {"bias_step": -1.0}, r"bias_step must be at least 0, got -1.0; 0.001 is"),
        ("cmoe", {"activation": "sliu"}, r"'sliu' is unknown; did you mean silu"),
        ("data-selection", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("data-selection", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("data-selection", {"capacity": 1.5}, r"capacity must be in \(0, 1\], got 1.5; 1 is"),
        (
            "dense-to-sparse",
            {"soft_steps": -1},
            r"soft_steps must be at least 0, got -1; 0 is none",
        ),
        (
            "dense-to-sparse",
            {"threshold": 1.0},
            r"threshold must be in \[0, 1\), got 1.0; 0.001 is",
        ),
        ("dense-to-sparse", {"threshold": 0.5}, r"below 1 / num_experts=0.1667, got 0.5; else a"),
        (
            "dense-to-sparse",
            {"temperature": {"start": 1.0, "end": 0.0, "steps": 1}},
            r"temperature must start and end above 0, got 1.0 and 0.0; 2 and 0.3 are usual",
        ),
        ("dense-to-sparse", {"temperature": {"start": 1.0}}, r"temperature lacks the option 'end'"),
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
        ("growing-top-k", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("growing-top-k", {"initial": 1}, r"initial must be at least top_k=2, got 1; the experts"),
        ("growing-top-k", {"initial": 7}, r"initial must be in \[1, num_experts=6\], got 7"),
        (
            "growing-top-k",
            {"start_step": 9, "end_step": 8},
            r"start_step must be in \[0, end_step=8\], got 9; a fifth",
        ),
        ("growing-top-k", {"seed": -1}, r"seed must be at least 0, got -1; each gives other"),
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
        ("permutation-search", {"router": "topk"}, r"router 'topk' is unknown; did you mean"),
        ("permutation-search", {"options": {"top_k": 7}}, r"top_k must be in \[1, num_experts=6\]"),
        ("permutation-search", {"search_steps": -1}, r"search_steps must be at least 0, got -1; 0"),
        ("permutation-search", {"noise": -1.0}, r"must be at least 0, got 0.0001 and -1.0"),
        (
            "permutation-search",
            {"router": "zero-computation"},
            r"router must have no free experts, got 'zero-computation'",
        ),
        ("progressive-top-k", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        (
            "progressive-top-k",
            {"early_top_k": 7},
            r"early_top_k must be in \[1, num_experts=6\], got 7",
        ),
        (
            "progressive-top-k",
            {"top_k": 3, "early_top_k": 2},
            r"early_top_k must be at least top_k=3, got 2; equal is no early stage",
        ),
        ("progressive-top-k", {"early_steps": -1}, r"early_steps must be at least 0, got -1; 0 is"),
        ("recurrent-top-k", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("recurrent-top-k", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("recurrent-top-k", {"size": 0}, r"size must be at least 1, got 0; 128 is the paper's"),
        ("recurrent-top-k", {"cell": "gur"}, r"'gur' is unknown; did you mean gru"),
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
        ("sigmoid-threshold", {"rank": -1}, r"rank must be at least 0, got -1; 0 is one whole map"),
        (
            "sigmoid-threshold",
            {"rank": 6},
            r"rank must be below 6 for 6 experts of .*, got 6",
        ),
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
        ("soft-trees", {"num_trees": 0}, r"num_trees must be at least 1, got 0; 2 is usual"),
        ("soft-trees", {"gamma": 0.0}, r"gamma must be above 0, got 0.0; 1 is usual"),
        ("soft-trees", {"entropy_coef": -1.0}, r"entropy_coef must be at least 0, got -1.0"),
        ("straight-through-top-k", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("straight-through-top-k", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("straight-through-top-k", {"temperature": 0.0}, r"temperature must be above 0, got 0.0"),
        ("straight-through-top-k", {"soft_steps": -1}, r"soft_steps must be at least 0, got -1; 0"),
        ("straight-through-top-k", {"weight": "on"}, r"'on' is unknown; did you mean one"),
        ("task-top-k", {"top_k": 0}, r"top_k must be at least 1, got 0; choose"),
        ("task-top-k", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("task-top-k", {"num_tasks": 0}, r"num_tasks and size must be at least 1, got 0 and 16"),
        ("task-top-k", {"probability": 1.5}, r"probability must be in \[0, 1\], got 1.5; 0.1 is"),
        ("token-rounding", {"top_k": 0}, r"top_k must be at least 1, got 0"),
        ("token-rounding", {"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ("token-rounding", {"tile_rows": 0}, r"tile_rows must be at least 1, got 0; 128 is"),
        ("token-rounding", {"rounding": "uo"}, r"'uo' is unknown; did you mean up"),
        ("stochastic", {"evaluation": "sequnce"}, r"'sequnce' is unknown; did you mean sequence"),
        ("stochastic", {"seed": -1}, r"seed must be at least 0, got -1; each gives other draws"),
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
