"""ReXMoE, arXiv 2510.17483: experts of a group of layers, and a pool that grows in training."""

from __future__ import annotations

import copy

import pytest
import torch
from nn_cases import expert_outputs, make_layer, make_router, tokens
from torch import nn

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer, all_experts_on, link_layers
from moesaic.nn.routing import Routing

N, LAYERS, K = 4, 4, 2
RAW = {"top_k": K, "renormalize": False}


class Stack(nn.Module):
    """Layers in groups, apart from each other: every one is given the same tokens."""

    def __init__(self, reuse=2, **options):
        super().__init__()
        self.layers = nn.ModuleList(
            make_layer(
                "topk-softmax",
                num_experts=N,
                router_config=RAW,
                seed=index,
                reuse=reuse,
                **options,
            )
            for index in range(LAYERS)
        )
        # One without experts has no part in any group.
        self.dense = make_layer(num_experts=0, shared_width=4)
        link_layers(self)

    def forward(self, h_TD):
        return [layer(h_TD) for layer in self.layers]


@pytest.fixture
def h_TD():
    return tokens(63, dtype=torch.float64)


@pytest.mark.parametrize("reuse", [2, 4])
def test_layers_choose_among_the_experts_of_their_group(h_TD, reuse):
    model = Stack(reuse, shared_width=3)
    for index, (layer, out_TD) in enumerate(zip(model.layers, model(h_TD), strict=True)):
        first = index - index % reuse
        group = model.layers[first : first + reuse]
        outs_TED = torch.cat([expert_outputs(member, h_TD) for member in group], 1)
        best = (h_TD @ layer.router.weight.T).softmax(-1).topk(K)
        gates_TE = torch.zeros(63, reuse * N).double().scatter(1, best.indices, best.values)
        expected = (gates_TE[:, :, None] * outs_TED).sum(1)
        torch.testing.assert_close(out_TD, expected + layer.shared(h_TD, None))


def test_alone_it_is_the_usual_mixture(h_TD):
    plain = make_layer("topk-softmax", num_experts=N, router_config=RAW)
    layer = Stack(reuse=1).layers[0]
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(h_TD), plain(h_TD), rtol=0, atol=1e-6)


def test_without_foreign_choices_it_is_the_usual_mixture(h_TD):
    model = Stack(reuse=2)
    for index, layer in enumerate(model.layers):
        plain = make_layer("topk-softmax", num_experts=N, router_config=RAW)
        own = slice(index % 2 * N, index % 2 * N + N)
        state = layer.state_dict()
        plain.load_state_dict({**state, "router.weight": state["router.weight"][own]})

        def forbid(router, args, routing, own=own):
            probs_TE = routing.scores_TE[:, own].softmax(-1)
            best = probs_TE.topk(K)
            return Routing(best.indices + own.start, best.values, routing.scores_TE, 2 * N)

        layer.router.register_forward_hook(forbid)
        torch.testing.assert_close(layer(h_TD), plain(h_TD), rtol=0, atol=1e-6)


def test_only_routers_grow():
    def size(model):
        return sum(p.numel() for p in model.parameters())

    assert size(Stack(reuse=4)) - size(Stack(reuse=1)) == 3 * N * 17 * LAYERS
    names = [name for name in Stack(reuse=4).state_dict() if "down_proj" in name]
    assert names == [
        "layers.0.experts.down_proj",
        "layers.1.experts.down_proj",
        "layers.2.experts.down_proj",
        "layers.3.experts.down_proj",
        "dense.shared.down_proj",
    ]


def test_one_weight_moves_its_group_and_no_other(h_TD):
    model = Stack(reuse=2)
    before = model(h_TD)
    with torch.no_grad():
        model.layers[2].experts.down_proj[1].add_(1.0)
    after = model(h_TD)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [False, False, True, True]
    # And there the tokens alone that chose it.
    for layer, old_TD, new_TD in zip(model.layers[2:], before[2:], after[2:], strict=True):
        uses_T = layer.router(h_TD).active_TE()[:, 1]
        assert 0 < uses_T.sum() < 63
        assert torch.equal((old_TD != new_TD).any(1), uses_T)


def test_gradient_is_the_sum_over_the_group(h_TD):
    model = Stack(reuse=2)
    weight = model.layers[0].experts.down_proj
    parts = [torch.autograd.grad(model.layers[i](h_TD).sum(), weight)[0] for i in range(2)]
    sum(out_TD.sum() for out_TD in model(h_TD)).backward()
    assert all(part.any() for part in parts)
    torch.testing.assert_close(weight.grad, sum(parts))


def test_a_copy_has_experts_of_its_own(h_TD):
    model = Stack(reuse=2)
    twin, expected = copy.deepcopy(model), model(h_TD)
    with torch.no_grad():
        for layer in model.layers:
            layer.experts.down_proj.zero_()
    for out_TD, old_TD in zip(twin(h_TD), expected, strict=True):
        assert torch.equal(out_TD, old_TD)


def test_all_experts_on_are_its_own(h_TD):
    model = Stack(reuse=2)
    with all_experts_on(model):
        for layer in model.layers:
            torch.testing.assert_close(layer(h_TD), expert_outputs(layer, h_TD).sum(1))


def test_layers_that_cannot_be_grouped_are_refused(h_TD):
    with pytest.raises(InputError, match=r"reuse=3 needs groups of 3 .* got 1 of 1 kinds from la"):
        Stack(reuse=3)
    mixed = nn.ModuleList([Stack(reuse=2).layers[0], Stack(reuse=4).layers[0]])
    with pytest.raises(InputError, match=r"reuse=2 needs groups .* got 2 of 2 kinds from layer 0"):
        link_layers(mixed)
    alone = make_layer("topk-softmax", num_experts=N, router_config=RAW, reuse=2)
    with pytest.raises(InputError, match=r"reuse=2 needs the experts of other layers, got none; r"):
        alone(h_TD)
    for options, message in (
        ({"reuse": 0}, r"reuse must be at least 1, got 0; 2 to 4 are usual"),
        ({"reuse": 2, "num_experts": 0}, r"reuse=2 need routed experts, got num_experts=0"),
    ):
        with pytest.raises(InputError, match=message):
            MoELayer(17, LayerConfig(**{"num_experts": N, "router": "top-p", **options}))


GROWTH = {"top_k": K, "initial": 4, "start_step": 10, "end_step": 30}


def growing(**options):
    return make_router("growing-top-k", 16, **{**GROWTH, **options}).train()


def at_step(router, step):
    router.clock.steps_done.fill_(step)
    return router


def test_the_pool_grows_by_the_papers_formula():
    router = growing()
    counts = [at_step(router, step).num_candidates() for step in range(40)]
    expected = [
        4 if t <= 10 else 16 if t > 30 else int((1 + 3 * (t - 10) / 20) * 4) for t in range(40)
    ]
    assert counts == expected
    assert counts[10] == 4
    assert counts[30] == 16
    assert counts == sorted(counts)


@pytest.mark.parametrize("step", [0, 17, 29, 30, 1000])
def test_as_many_can_be_chosen_as_are_candidates(step):
    router = at_step(growing(), step)
    reachable = router(tokens(4000)).counts_E() > 0
    assert reachable.sum() == router.num_candidates()
    assert router.eval()(tokens(4000)).counts_E().all()


@pytest.mark.parametrize("mask", ["probabilities", "logits"])
def test_what_masked_experts_weigh_is_missing_or_goes_to_the_rest(mask):
    router, h_TD = growing(mask=mask, top_k=4), tokens(63)
    routing = router(h_TD)
    total_T = routing.weights_TK.sum(1)
    open_E = routing.counts_E() > 0
    expected_T = routing.scores_TE.softmax(-1)[:, open_E].sum(1)
    if mask == "logits":
        expected_T = torch.ones(63)
    torch.testing.assert_close(total_T, expected_T)


def test_masked_experts_are_never_chosen_also_where_probabilities_underflow():
    router = growing()
    with torch.no_grad():
        router.weight.mul_(1e4)
    routing = router(tokens(500))
    assert (routing.counts_E() > 0).sum() <= 4
    assert (routing.ids_TK < 16).all()


def test_steps_layers_and_seeds_choose_apart_and_processes_alike():
    def chosen(router, step):
        return (at_step(router, step)(tokens(4000)).counts_E() > 0).tolist()

    layers = [growing(), growing()]
    layers[1].link(layers)
    other = make_router("growing-top-k", 16, **GROWTH).train()
    assert chosen(layers[0], 3) == chosen(other, 3)
    assert chosen(layers[0], 3) != chosen(layers[0], 4)
    assert chosen(layers[0], 3) != chosen(layers[1], 3)
