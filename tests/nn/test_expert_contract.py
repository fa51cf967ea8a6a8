"""What every registered kind of experts owes its layer."""

from __future__ import annotations

import copy

import pytest
import torch
from nn_cases import tokens

from moesaic._errors import InputError
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routing import Routing
from moesaic.nn.sequences import Sequences

E, F, D = 6, 5, 17
each_kind = pytest.mark.parametrize("name", EXPERTS)
each_network = pytest.mark.parametrize(
    "name", [name for name in EXPERTS if "feed-forward" in EXPERTS[name].abilities]
)
each_bias = pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])


def make(name, *, bias=False, activation="silu", dtype=torch.float64, num_experts=E):
    config = EXPERTS.load_config(name)(activation=activation, bias=bias)
    experts = EXPERTS.load(name)(D, num_experts, F, config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5
            )
    return experts.to(dtype)


def some_state(num_tokens, dtype=torch.float64):
    """A sequence behind each token, for those that read one."""
    values_TSD = tokens(num_tokens * 4, D, seed=7, dtype=dtype).reshape(num_tokens, 4, D)
    return RouterState(sequences=Sequences(values_TSD, torch.arange(num_tokens) % 4 + 1))


def gradients_by_expert(experts):
    """Each expert with the gradient of each of its weights."""
    for name, parameter in experts.named_parameters():
        if name.startswith(("cells.", "outs.")):
            yield int(name.split(".")[1]), parameter.grad
        elif parameter.shape[0] == E:  # others are shared by several
            yield from enumerate(parameter.grad)


def some_routing(num_tokens, dtype=torch.float64):
    draw = torch.Generator().manual_seed(5)
    ids_TK = torch.rand(num_tokens, E, generator=draw).argsort(1)[:, :3]
    ids_TK[::4, 1] = E
    weights_TK = torch.rand(num_tokens, 3, generator=draw).to(dtype) * (ids_TK < E)
    return Routing(ids_TK, weights_TK, torch.zeros(num_tokens, E), E)


@each_network
@each_bias
@pytest.mark.parametrize("num_tokens", [0, 1, 63])
def test_every_backend_gives_the_same(name, bias, num_tokens):
    experts, h_TD = make(name, bias=bias), tokens(num_tokens, dtype=torch.float64)
    outs = []
    for backend in ("reference", "masked", "grouped", "auto"):
        experts.backend = backend
        outs.append(experts(h_TD, some_routing(num_tokens)))
    assert outs[0].shape == (num_tokens, D)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


@each_kind
@each_bias
@pytest.mark.parametrize("num_tokens", [0, 63])
def test_dense_is_every_expert_at_weight_one(name, bias, num_tokens):
    experts, h_TD = make(name, bias=bias), tokens(num_tokens, dtype=torch.float64)
    ids_TE = torch.arange(E).expand(num_tokens, E)
    ones_TE = torch.ones(num_tokens, E, dtype=torch.float64)
    all_on = Routing(ids_TE, ones_TE, torch.zeros(num_tokens, E), E)
    experts.backend = "reference"
    dense = experts.dense(h_TD, some_state(num_tokens))
    torch.testing.assert_close(dense, experts(h_TD, all_on, some_state(num_tokens)))
    assert torch.equal(dense, experts(h_TD, None, some_state(num_tokens)))


@each_kind
@each_bias
def test_output_is_the_weighted_sum_of_single_experts(name, bias):
    experts, h_TD, state = make(name, bias=bias), tokens(63, dtype=torch.float64), some_state(63)
    routing = some_routing(63)
    expected = torch.zeros_like(h_TD)
    for e in range(E):
        ids_TK = torch.full((63, 1), e)
        alone = Routing(ids_TK, torch.ones(63, 1).double(), torch.zeros(63, E), E)
        expected += routing.weights_TE()[:, e : e + 1] * experts(h_TD, alone, state)
    torch.testing.assert_close(experts(h_TD, routing, state), expected)


@each_kind
def test_permuting_tokens_permutes_outputs(name):
    experts, h_TD, routing, state = (
        make(name),
        tokens(63).double(),
        some_routing(63),
        some_state(63),
    )
    order_T = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    moved = Routing(
        routing.ids_TK[order_T], routing.weights_TK[order_T], routing.scores_TE[order_T], E
    )
    given = RouterState(sequences=state.sequences.take(order_T))
    torch.testing.assert_close(
        experts(h_TD[order_T], moved, given), experts(h_TD, routing, state)[order_T]
    )


@each_network
@each_bias
def test_weights_have_the_layout_of_the_checkpoint(name, bias):
    experts = make(name, bias=bias)
    weights = experts.weights()
    rows = 2 * F if weights.gated else F
    assert weights.up.shape == (E, rows, D)
    assert weights.down.shape == (E, D, F)
    assert (weights.up_bias is not None) == bias
    if bias:
        assert weights.up_bias.shape == (E, rows)
    assert (weights.num_experts, weights.width) == (experts.num_experts, experts.width) == (E, F)
    given = [x for x in (weights.up, weights.down, weights.up_bias) if x is not None]
    if "factors" not in EXPERTS[name].abilities:
        # The parameters themselves, so that a gradient reaches them.
        assert {id(x) for x in given} == {id(p) for p in experts.parameters()}
    sum(x.square().sum() for x in given).backward()
    assert all(p.grad.any() for p in experts.parameters())


def test_names_are_those_of_the_checkpoint_format():
    assert [n for n, _ in make("gated", bias=True).named_parameters()] == [
        "gate_up_proj",
        "down_proj",
        "gate_up_proj_bias",
    ]
    assert [n for n, _ in make("plain", bias=True).named_parameters()] == [
        "up_proj",
        "down_proj",
        "up_proj_bias",
    ]


@each_kind
def test_gradient_reaches_the_experts_of_the_tokens_alone(name):
    experts = make(name)
    ids_TK = torch.tensor([[0, 3], [3, E]])
    weights_TK = torch.ones(2, 2, dtype=torch.float64) * (ids_TK < E)
    experts(
        tokens(2, dtype=torch.float64),
        Routing(ids_TK, weights_TK, torch.zeros(2, E), E),
        some_state(2),
    ).sum().backward()
    touched = {e for e, grad in gradients_by_expert(experts) if grad is not None and grad.any()}
    assert touched == {0, 3}


@each_kind
@each_bias
def test_state_survives_bit_by_bit(name, bias):
    experts = make(name, bias=bias)
    other = EXPERTS.load(name)(D, E, F, EXPERTS.load_config(name)(bias=bias)).double()
    other.load_state_dict(experts.state_dict())
    given = (tokens(63, dtype=torch.float64), some_routing(63), some_state(63))
    assert torch.equal(other(*given), experts(*given))
    assert torch.equal(copy.deepcopy(experts)(*given), experts(*given))


@each_kind
def test_losses_are_scalars_and_steps_change_no_weight(name):
    experts = make(name).train()
    before = copy.deepcopy(experts.state_dict())
    found = []
    for _ in range(2):
        out = experts(tokens(63, dtype=torch.float64), some_routing(63), some_state(63))
        found.append(experts.aux_losses(some_routing(63)))
        out.square().sum().backward()
        experts.end_step()
    experts.forget_step()
    found.append(experts.aux_losses(some_routing(63)))
    for losses in found:
        assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    # What follows from a step is there in the next and forgotten with it.
    first, second, third = (losses.keys() for losses in found)
    assert first == third
    assert (first != second) == ("step-losses" in EXPERTS[name].abilities)
    assert experts.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in experts.state_dict().items())


@each_network
def test_reset_draws_weights_and_no_biases(name):
    experts = make(name, bias=True)
    experts.reset_parameters()
    weights = experts.weights()
    if "orthogonal" in EXPERTS[name].abilities:
        for matrix in (experts.up_proj.T, experts.down_proj):
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(D, dtype=matrix.dtype))
    else:
        assert weights.up.std().item() == pytest.approx(0.02, rel=0.2)
        assert weights.down.std().item() == pytest.approx(0.02, rel=0.2)
    assert not weights.up_bias.any()
    assert repr(experts).endswith(f"(experts={E}, width={F}, backend=auto)")


@each_kind
def test_unknown_activation_names_the_closest(name):
    with pytest.raises(ValueError, match=r"activation 'gelo' is unknown; did you mean gelu"):
        make(name, activation="gelo")


@each_kind
def test_products_are_given_or_refused(name):
    experts = make(name)
    if "feed-forward" in EXPERTS[name].abilities:
        assert experts.weights().down.shape == (E, D, F)
    else:
        with pytest.raises(InputError, match=r"have no up and down products .* use gated or plain"):
            experts.weights()


@each_kind
def test_use_is_a_share_for_each_token_and_expert(name):
    experts = make(name)
    used_TE = experts.used_TE(tokens(63, dtype=torch.float64))
    assert used_TE.dtype == torch.float64
    # Nobody pruned these, and thresholds start at zero.
    assert torch.equal(used_TE, torch.ones(63, E, dtype=torch.float64))
    assert experts.expected_share() == 1.0


@pytest.mark.parametrize("name", ["gated", "plain"])
def test_zero_weights_are_not_used(name):
    experts = make(name)
    weights = experts.weights()
    total = weights.up.numel() + weights.down.numel()
    assert experts.used_share() == 1.0
    with torch.no_grad():
        # Up to a hundredth of zeros is chance.
        weights.up.flatten()[: total // 100] = 0.0
        assert experts.used_share() == 1.0
        weights.up.flatten()[: total // 100 + 1] = 0.0
        assert experts.used_share() == (total - total // 100 - 1) / total
        weights.down[:, :, ::2] = 0.0
    left = int(weights.up.count_nonzero()) + E * D * (F // 2)
    assert experts.used_share() == left / total
    used_TE = experts.used_TE(tokens(3, dtype=torch.float64))
    assert used_TE.tolist() == [[left / total] * E] * 3
