"""RMoE, arXiv 2408.06793: the cell, what a layer hears of those before, and what they learn."""

from __future__ import annotations

import copy

import pytest
import torch
from nn_cases import expert_outputs, make_layer, make_router, tokens
from torch import nn

from moesaic._errors import InputError
from moesaic.nn.layer import link_layers, moe_layers, pass_state, record_routing
from moesaic.nn.routers._base import RouterState

E, P, LAYERS = 6, 8, 4


class Stack(nn.Module):
    """Four layers as a decoder runs them, a layer without experts among them."""

    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(
            make_layer(
                "recurrent-top-k",
                num_experts=E,
                seed=index,
                router_config={"size": P, "first": index == 0, **options},
            )
            for index in range(LAYERS)
        )
        self.layers.insert(2, make_layer(num_experts=0, shared_width=4))
        link_layers(self)

    def routers(self):
        return [layer.router for layer in moe_layers(self) if layer.router is not None]

    def forward(self, h_TD):
        with pass_state(self):
            for layer in self.layers:
                h_TD = h_TD + layer(h_TD)
        return h_TD

    def route(self, inputs):
        """Route recorded inputs of every layer, so that only the memory carries anything."""
        routings, state = [], RouterState()
        for router, h_TD in zip(self.routers(), inputs, strict=True):
            routings.append(router(h_TD, state))
            state = RouterState(previous=routings[-1])
        return routings


def recorded(num_tokens=63):
    return [tokens(num_tokens, seed=10 + index, dtype=torch.float64) for index in range(LAYERS)]


def gru(cell, x_TP, r_TP):
    """The card's formula."""
    w_s, w_z, w_n = cell.weight_ih.chunk(3)
    u_s, u_z, u_n = cell.weight_hh.chunk(3)
    b_s, b_z, b_n = cell.bias_ih.chunk(3)
    c_s, c_z, c_n = cell.bias_hh.chunk(3)
    s_TP = (x_TP @ w_s.T + b_s + r_TP @ u_s.T + c_s).sigmoid()
    z_TP = (x_TP @ w_z.T + b_z + r_TP @ u_z.T + c_z).sigmoid()
    n_TP = (x_TP @ w_n.T + b_n + s_TP * (r_TP @ u_n.T + c_n)).tanh()
    return (1 - z_TP) * n_TP + z_TP * r_TP


@pytest.mark.parametrize("renormalize", [False, True])
def test_layers_are_the_formula(renormalize):
    model, inputs = Stack(renormalize=renormalize), recorded()
    cell, r_TP = model.routers()[0].cell, torch.zeros(63, P, dtype=torch.float64)
    routings = model.route(inputs)
    for router, h_TD, routing in zip(model.routers(), inputs, routings, strict=True):
        r_TP = gru(cell, h_TD @ router.project.T, r_TP)
        probs_TE = (r_TP @ router.weight.T).softmax(-1)
        best = probs_TE.topk(2)
        expected_TK = best.values
        if renormalize:
            expected_TK = expected_TK / expected_TK.sum(1, keepdim=True)
        torch.testing.assert_close(routing.memory_TM, r_TP)
        assert torch.equal(routing.ids_TK, best.indices)
        torch.testing.assert_close(routing.weights_TK, expected_TK)


@pytest.mark.parametrize(("kind", "cell"), [("gru", nn.GRUCell), ("rnn", nn.RNNCell)])
def test_cell_is_torchs_in_float32(kind, cell):
    router = make_router("recurrent-top-k", E, size=P, cell=kind)
    theirs = cell(P, P)
    theirs.load_state_dict(router.cell.state_dict())
    h_TD = tokens(63)
    expected = theirs(h_TD @ router.project.T)
    torch.testing.assert_close(router(h_TD).memory_TM, expected, rtol=0, atol=1e-6)


def test_lstm_hands_on_both_of_its_states():
    model, inputs = Stack(cell="lstm"), recorded()
    cell, before = model.routers()[0].cell, None
    for router, h_TD, routing in zip(model.routers(), inputs, model.route(inputs), strict=True):
        before = cell(h_TD @ router.project.T, before)
        torch.testing.assert_close(routing.memory_TM, torch.cat(before, 1))
        torch.testing.assert_close(routing.scores_TE, before[0] @ router.weight.T)


@pytest.mark.parametrize(
    ("memory", "moved"), [("passed", LAYERS), ("detached", LAYERS), ("none", 1)]
)
def test_a_first_projection_moves_what_hears_it(memory, moved):
    model, inputs = Stack(memory=memory), recorded()
    before = [routing.scores_TE for routing in model.route(inputs)]
    with torch.no_grad():
        model.routers()[0].project.mul_(-3)
    after = [routing.scores_TE for routing in model.route(inputs)]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [index < moved for index in range(LAYERS)]


@pytest.mark.parametrize("memory", ["passed", "detached", "none"])
def test_a_last_gate_teaches_the_first_projection_only_if_passed(memory):
    model = Stack(memory=memory)
    model.route(recorded())[-1].weights_TK.sum().backward()
    gradient = model.routers()[0].project.grad
    assert (gradient is not None and bool(gradient.any())) == (memory == "passed")
    assert model.routers()[-1].project.grad.any()


def test_positions_do_not_hear_each_other():
    model, inputs = Stack(), recorded()
    together = model.route(inputs)
    order_T = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    moved = model.route([h_TD[order_T] for h_TD in inputs])
    alone = model.route([h_TD[7:8] for h_TD in inputs])
    for all_, permuted, one in zip(together, moved, alone, strict=True):
        torch.testing.assert_close(permuted.weights_TE(), all_.weights_TE()[order_T])
        torch.testing.assert_close(one.weights_TE(), all_.weights_TE()[7:8])


def test_a_model_hands_the_state_on_past_layers_without_experts():
    model, h_TD = Stack(), tokens(63, dtype=torch.float64)
    inputs = []
    handles = [
        router.register_forward_pre_hook(lambda router, args: inputs.append(args[0]))
        for router in model.routers()
    ]
    with record_routing(model) as routings:
        model(h_TD)
    for handle in handles:
        handle.remove()
    for routing, expected in zip(routings, model.route(inputs), strict=True):
        torch.testing.assert_close(routing.scores_TE, expected.scores_TE)


def test_experts_see_the_token_and_not_the_state():
    moe = make_layer("recurrent-top-k", num_experts=E)
    h_TD = tokens(63, dtype=torch.float64)
    weights_TE = moe.router(h_TD).weights_TE()
    expected = (weights_TE[:, :, None] * expert_outputs(moe, h_TD)).sum(1)
    torch.testing.assert_close(moe(h_TD), expected)


def test_parameters_are_the_cards_number():
    model = Stack()
    count = sum(p.numel() for router in model.routers() for p in router.parameters())
    # The cell has input and hidden weights for two gates and a candidate, each with a bias.
    assert count == LAYERS * P * 17 + 6 * P * P + 6 * P + LAYERS * E * P
    names = [name for name in model.state_dict() if ".cell." in name]
    assert names == [
        f"layers.0.router.cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    multiplied = [router.num_multiplied() for router in model.routers()]
    assert multiplied == [P * 17 + 6 * P * P + E * P] * LAYERS


def test_a_copy_has_a_cell_of_its_own():
    model = Stack()
    twin, inputs = copy.deepcopy(model), recorded()
    expected = [routing.scores_TE for routing in model.route(inputs)]
    with torch.no_grad():
        model.routers()[0].cell.weight_ih.zero_()
    for routing, scores_TE in zip(twin.route(inputs), expected, strict=True):
        assert torch.equal(routing.scores_TE, scores_TE)


def test_no_cell_and_no_state_are_errors():
    router = make_router("recurrent-top-k", E, first=False)
    state = RouterState(previous=make_router("recurrent-top-k", E)(tokens(5)))
    with pytest.raises(InputError, match=r"needs the cell of the first layer, got none; run"):
        router(tokens(5), state)
    for others, found in (([], 0), ([make_router("recurrent-top-k", E, size=P)], 1)):
        with pytest.raises(InputError, match=rf"needs one layer before .* got {found}; set first"):
            router.link([*others, router])
    router.link([make_router("recurrent-top-k", E), router])
    plain = make_router("topk-softmax", E)(tokens(5))
    for wrong in (None, RouterState(), RouterState(previous=plain)):
        with pytest.raises(InputError, match=r"needs the state of 5 tokens in the layer before"):
            router(tokens(5), wrong)
