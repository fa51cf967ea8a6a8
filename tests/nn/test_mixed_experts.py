"""Hecto, arXiv 2506.22919: a recurrent and a feed-forward expert, one of which runs per input."""

from __future__ import annotations

import math

import pytest
import torch
from nn_cases import hand_routing, make_loss, make_router, tokens
from torch import nn

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer, all_experts_on, pass_state
from moesaic.nn.routers._base import RouterState
from moesaic.nn.sequences import Sequences
from moesaic.nn.shape import layer_shape

D, F, S, FFN, GRU = 17, 5, 7, 0, 1


def make_hecto(*, kinds=("plain", "gru"), **options):
    """A layer of experts of two kinds; its weights are of order one."""
    torch.manual_seed(0)
    config = LayerConfig(
        num_experts=len(kinds),
        width=F,
        router="straight-through-top-k",
        router_options=options,
        experts=kinds,
        activation="tanh",
        bias=True,
        expert_bias=True,
    )
    layer = MoELayer(D, config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def inputs(num_tokens=63, *, seed=3, length=S):
    """A pooled vector and a sequence for each input, of lengths 1 to S."""
    values_TSD = tokens(num_tokens * length, D, seed=seed, dtype=torch.float64)
    lengths_T = torch.arange(num_tokens) % length + 1
    sequences = Sequences(values_TSD.reshape(num_tokens, length, D), lengths_T)
    return tokens(num_tokens, D, dtype=torch.float64), RouterState(sequences=sequences)


def gru_by_hand(cell, values_SD):
    """Hidden state after the last position, gate by gate."""
    w_ih, w_hh, b_ih, b_hh = (p.chunk(3) for p in cell.parameters())
    state_F = torch.zeros(F, dtype=torch.float64)
    for x_D in values_SD:
        x = [w @ x_D + b for w, b in zip(w_ih, b_ih, strict=True)]
        h = [w @ state_F + b for w, b in zip(w_hh, b_hh, strict=True)]
        reset, update = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid()
        state_F = (1 - update) * (x[2] + reset * h[2]).tanh() + update * state_F
    return state_F


def test_the_layer_is_the_formula_input_by_input():
    layer = make_hecto()
    h_TD, state = inputs()
    winner_T = (h_TD @ layer.router.weight.T).argmax(1)
    ffn, gru = layer.experts.parts
    expected = []
    for t, winner in enumerate(winner_T.tolist()):
        if winner == FFN:
            hidden_F = (ffn.up_proj[0] @ h_TD[t] + ffn.up_proj_bias[0]).tanh()
            expected.append(ffn.down_proj[0] @ hidden_F + ffn.down_proj_bias[0])
        else:
            length = state.sequences.lengths_T[t]
            state_F = gru_by_hand(gru.cells[0], state.sequences.values_TSD[t, :length])
            expected.append(gru.outs[0].weight @ state_F + gru.outs[0].bias)
    assert 10 < winner_T.sum() < 53
    torch.testing.assert_close(layer(h_TD, state), torch.stack(expected))


def test_one_expert_runs_for_each_input_and_the_other_hears_nothing():
    layer = make_hecto()
    h_TD, state = inputs()
    ran = []
    for part in layer.experts.parts:
        part.register_forward_hook(lambda part, args, out: ran.append(args[0].shape[0]))
    counts_E = layer.router(h_TD).counts_E().tolist()
    layer(h_TD, state)
    assert ran == counts_E
    assert sum(ran) == 63
    for winner, other in ((FFN, GRU), (GRU, FFN)):
        t = int((layer.router(h_TD).ids_TK[:, 0] == winner).nonzero()[0])
        layer.zero_grad()
        layer(h_TD[t : t + 1], RouterState(sequences=state.sequences.take([t]))).sum().backward()
        assert all(p.grad is None for p in layer.experts.parts[other].parameters())
        assert any(p.grad.any() for p in layer.experts.parts[winner].parameters())


def test_temperature_flattens_and_chooses_alike():
    h_TD = tokens(63)
    sharp = make_router("straight-through-top-k", 2, temperature=1.0)
    flat = make_router("straight-through-top-k", 2, temperature=1e6)
    assert torch.equal(sharp(h_TD).ids_TK, flat(h_TD).ids_TK)
    probs_TE = flat(h_TD).scores_TE.softmax(-1)
    torch.testing.assert_close(probs_TE, torch.full((63, 2), 0.5), rtol=0, atol=1e-4)


def test_permuting_inputs_permutes_outputs():
    layer = make_hecto()
    h_TD, state = inputs()
    order_T = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    moved = layer(h_TD[order_T], RouterState(sequences=state.sequences.take(order_T)))
    torch.testing.assert_close(moved, layer(h_TD, state)[order_T])


def test_padding_changes_nothing():
    layer = make_hecto()
    h_TD, state = inputs()
    values_TSD, lengths_T = state.sequences.values_TSD, state.sequences.lengths_T
    padding_TSD = torch.full((63, 3, D), 1e3, dtype=torch.float64)
    longer = Sequences(torch.cat([values_TSD, padding_TSD], dim=1), lengths_T)
    torch.testing.assert_close(layer(h_TD, RouterState(sequences=longer)), layer(h_TD, state))


def test_order_of_positions_matters_to_the_recurrent_expert_alone():
    layer = make_hecto()
    h_TD, state = inputs()
    whole_T = torch.full((63,), S)
    values_TSD = state.sequences.values_TSD
    winner_T = layer.router(h_TD).ids_TK[:, 0]
    outs = [
        layer(h_TD, RouterState(sequences=Sequences(values, whole_T)))
        for values in (values_TSD, values_TSD.flip(1))
    ]
    gap_T = (outs[0] - outs[1]).abs().max(1).values
    assert not gap_T[winner_T == FFN].any()
    assert (gap_T[winner_T == GRU] > 1e-4).all()


def test_the_gate_learns_through_the_estimator_at_an_output_of_the_same_scale():
    h_TD, state = inputs()
    layer = make_hecto()
    routing = layer.router(h_TD)
    assert torch.equal(routing.weights_TK, torch.ones(63, 1, dtype=torch.float64))
    layer(h_TD, state).sum().backward()
    # dy / dp of the winner is its output; without the estimator it would not depend on p.
    with torch.no_grad():
        outs_T = layer(h_TD, state).sum(1)
    weight = layer.router.weight.detach().clone().requires_grad_()
    winner_T1 = routing.ids_TK
    (outs_T * (h_TD @ weight.T / 1.5).softmax(-1).gather(1, winner_T1)[:, 0]).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, weight.grad)
    assert weight.grad.abs().max() > 1e-3


def test_the_probability_may_weigh_instead():
    router = make_router("straight-through-top-k", 2, weight="probability")
    h_TD = tokens(63)
    routing = router(h_TD)
    probs_TE = (h_TD @ router.weight.T / 1.5).softmax(-1)
    torch.testing.assert_close(routing.weights_TK, probs_TE.max(1, keepdim=True).values)


def test_soft_steps_mix_all_experts_and_then_one_counts():
    router = make_router("straight-through-top-k", 2, soft_steps=2).train()
    h_TD = tokens(63)
    probs_TE = (h_TD @ router.weight.T / 1.5).softmax(-1)
    for _ in range(2):
        torch.testing.assert_close(router(h_TD).weights_TE(), probs_TE)
        assert router.eval()(h_TD).ids_TK.shape == (63, 1)
        router.train().end_step()
    again = make_router("straight-through-top-k", 2, soft_steps=2).train()
    again.load_state_dict(router.state_dict())
    for one in (router, again):
        assert torch.equal(one(h_TD).weights_TK, torch.ones(63, 1))


def test_diversity_by_hand():
    # Means of p over the two tokens that count: (3/4 + 1/4) / 2 = 1/2 each, so no divergence.
    # The first alone: 3/4 log(3/2) + 1/4 log(1/2).
    routing = hand_routing(
        torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.9, 0.1]]).log(), [[0], [1], [0]]
    )
    both = torch.tensor([[True, True, False]])
    assert make_loss("diversity")(routing, both).item() == pytest.approx(0.0, abs=1e-6)
    alone = make_loss("diversity")(routing, torch.tensor([[True, False, False]])).item()
    assert alone == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_kinds_mix_in_any_order_and_are_dense_together():
    layer = make_hecto(kinds=("gated", "plain", "plain", "gru", "gated"), top_k=2)
    h_TD, state = inputs()
    assert [type(part).__name__ for part in layer.experts.parts] == [
        "GatedExperts",
        "PlainExperts",
        "GruExperts",
        "GatedExperts",
    ]
    assert layer.experts.used_share() == 1.0
    routing = layer.router(h_TD)
    outs = []
    for part in layer.experts.parts:
        for e in range(part.num_experts):
            alone = hand_routing(torch.zeros(63, part.num_experts), [[e]] * 63)
            outs.append(part(h_TD, alone, state))
    each_TED = torch.stack(outs, 1)
    expected = (routing.weights_TE().unsqueeze(2) * each_TED).sum(1)
    torch.testing.assert_close(layer(h_TD, state), expected)
    with all_experts_on(layer):
        torch.testing.assert_close(layer(h_TD, state), each_TED.sum(1))
    assert repr(layer.experts).splitlines()[1].strip() == (
        "experts=5, width=5, kinds=gated, plain, plain, gru, gated"
    )
    # Two of five experts, each counted as its width.
    assert layer_shape(layer, 25).fraction(2) == pytest.approx(2 / 5)
    # As data, in a list, it is the same layer.
    assert build_config(LayerConfig, to_plain(layer.config), where="layer") == layer.config


def test_no_input_is_no_output():
    layer = make_hecto()
    h_TD, state = inputs(0)
    assert layer(h_TD, state).shape == (0, D)


def test_a_pass_keeps_the_sequences_of_its_caller():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = MoELayer(D, LayerConfig(num_experts=2, width=F, router="zero-computation"))
            self.second = MoELayer(
                D,
                LayerConfig(
                    num_experts=2,
                    width=F,
                    router="zero-computation",
                    router_options={"residual": True},
                    experts=("plain", "gru"),
                ),
            )

        def forward(self, h_TD, state):
            with pass_state(self):
                return self.second(self.first(h_TD, state), state=state)

    model = Model().double()
    assert model(*inputs()).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: make_hecto()(inputs()[0]),
            r"need a sequence for each of the \d+ tokens, got none",
        ),
        (
            lambda: LayerConfig(num_experts=3, router="top-p", experts=("plain", "gru")),
            r"one for each of the num_experts=3, got 2; name as many",
        ),
        (
            lambda: LayerConfig(
                num_experts=2, router="top-p", experts=("plain", "gru"), shared_width=4
            ),
            r"shared_width must be 0 where experts differ in kind, got 4",
        ),
        (
            lambda: MoELayer(D, LayerConfig(num_experts=1, router="top-p", experts=("grru",))),
            r"experts 'grru' is unknown; did you mean gru",
        ),
        (
            lambda: Sequences(torch.zeros(2, 3, D), torch.tensor([1, 4])),
            r"lengths must be in \[1, 3\], got 1 to 4; padding stands behind a sequence",
        ),
        (
            lambda: Sequences(torch.zeros(2, 3, D), torch.tensor([1])),
            r"lengths must be one for each of the 2 sequences, got the shape \[1\]",
        ),
        (lambda: make_hecto().experts.weights(), r"MixedExperts have no up and down products"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
