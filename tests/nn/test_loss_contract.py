"""What every registered loss owes training, and each loss by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from nn_cases import hand_routing, make_loss, make_router, route, tokens

from moesaic._errors import InputError
from moesaic.nn.losses._table import LOSSES
from moesaic.nn.routers._table import ROUTERS

E, B, S = 6, 3, 5
# Each loss with every router that scores as the loss expects, in each of its variants.
VARIANTS = {
    "heterogeneous-balance": [{}, {"tau": 0.1}],
    "load-balance": [{}, {"scope": "sequence"}, {"scope": "global"}, {"share_of": "choices"}],
    "sparsity": [{}, {"of": "straight-through"}],
}
PAIRS = [
    pytest.param(
        loss, options, router, id="-".join([loss, *map(str, options.values()), "of", router])
    )
    for loss in LOSSES
    if "two-passes" not in LOSSES[loss].abilities
    for options in VARIANTS.get(loss, [{}])
    for router in ROUTERS
    if LOSSES[loss].abilities <= ROUTERS[router].abilities
]
each_pair = pytest.mark.parametrize(("loss", "options", "router"), PAIRS)
MASK_BS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], dtype=torch.bool)


def routed(router: str, *, seed: int = 1, num_tokens: int = B * S):
    """A routing whose scores and weights are leaves."""
    torch.manual_seed(seed)
    return cut_off(route(make_router(router, E).train(), tokens(num_tokens, seed=seed)))


def cut_off(routing):
    return dataclasses.replace(
        routing,
        scores_TE=routing.scores_TE.detach().requires_grad_(),
        weights_TK=routing.weights_TK.detach().requires_grad_(),
    )


def by_token(routing):
    """What a routing holds for each token, by field."""
    fields = ("ids_TK", "weights_TK", "scores_TE", "free_weights_TZ")
    values = {field: getattr(routing, field) for field in fields}
    return {field: value for field, value in values.items() if value is not None}


def gradients(routing):
    """Of what the loss read, scores or weights."""
    grads = [routing.scores_TE.grad, routing.weights_TK.grad]
    return [grad for grad in grads if grad is not None]


def test_every_loss_has_a_router():
    of_routing = {loss for loss in LOSSES if "two-passes" not in LOSSES[loss].abilities}
    assert {pair.values[0] for pair in PAIRS} == of_routing


@each_pair
def test_is_a_float32_scalar_that_teaches(loss, options, router):
    routing = routed(router)
    value = make_loss(loss, **options)(routing, MASK_BS)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value > 0
    value.backward()
    assert all(grad.isfinite().all() for grad in gradients(routing))
    assert any(grad[MASK_BS.flatten()].any() for grad in gradients(routing))


@each_pair
def test_padding_gets_no_gradient_and_changes_nothing(loss, options, router):
    routing, function = routed(router), make_loss(loss, **options)
    value = function(routing, MASK_BS)
    value.backward()
    assert not any(grad[~MASK_BS.flatten()].any() for grad in gradients(routing))
    other = routed(router, seed=9)
    mask_T1 = MASK_BS.flatten().unsqueeze(1)
    mixed = {
        field: torch.where(mask_T1, value, getattr(other, field))
        for field, value in by_token(routing).items()
    }
    swapped = dataclasses.replace(routing, **mixed)
    torch.testing.assert_close(function(swapped, MASK_BS), value)


@each_pair
def test_nothing_but_padding_is_zero(loss, options, router):
    routing = routed(router)
    value = make_loss(loss, **options)(routing, torch.zeros_like(MASK_BS))
    assert value.item() == 0.0
    value.backward()
    assert not any(grad.any() for grad in gradients(routing))


@each_pair
@pytest.mark.parametrize("shape", [(0, 5), (1, 0)], ids=["no-sequence", "no-position"])
def test_no_token_at_all_is_zero(loss, options, router, shape):
    routing = routed(router, num_tokens=0)
    value = make_loss(loss, **options)(routing, torch.ones(shape, dtype=torch.bool))
    assert value.item() == 0.0


@each_pair
def test_order_of_tokens_in_a_sequence_does_not_matter(loss, options, router):
    routing, function = routed(router), make_loss(loss, **options)
    draw = torch.Generator().manual_seed(0)
    order_T = torch.cat([b * S + torch.randperm(S, generator=draw) for b in range(B)])
    moved = {field: value[order_T] for field, value in by_token(routing).items()}
    permuted = dataclasses.replace(routing, **moved)
    mask_BS = MASK_BS.flatten()[order_T].reshape(B, S)
    torch.testing.assert_close(function(permuted, mask_BS), function(routing, MASK_BS))


@each_pair
def test_saturated_scores_stay_finite(loss, options, router):
    routing = cut_off(route(make_router(router, E, spread_out=1e4).train(), tokens(B * S)))
    value = make_loss(loss, **options)(routing, MASK_BS)
    value.backward()
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(routing))


def test_entropy_by_hand():
    # p = 1/2, 1/4, 1/4: entropy = 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2. p = one-hot: 0.
    # p uniform over 3: log 3, masked. Mean of the first two: 3/4 log 2.
    routing = hand_routing([[2, 1, 1], [1e30, 1, 1], [1, 1, 1]], [[0], [0], [0]])
    routing = dataclasses.replace(routing, scores_TE=routing.scores_TE.log())
    mask_BS = torch.tensor([[True, True, False]])
    value = make_loss("entropy")(routing, mask_BS)
    assert value.item() == pytest.approx(0.75 * math.log(2))


def test_z_loss_by_hand():
    # logsumexp(log 1, log 3) = log 4; logsumexp(0, 0) = log 2; squares, mean.
    routing = hand_routing([[0, math.log(3)], [0, 0]], [[1], [0]])
    value = make_loss("z-loss")(routing, torch.ones(1, 2, dtype=torch.bool))
    assert value.item() == pytest.approx((math.log(4) ** 2 + math.log(2) ** 2) / 2)


# Tokens with p = (3/4, 1/4), (1/2, 1/2), (1/4, 3/4), (1/2, 1/2).
PROBS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])


def test_load_balance_by_hand():
    # Chosen: 0, 0, 1, 0. F = (3/4, 1/4). Q = mean p = (1/2, 1/2). E * sum = 2 * 1/2 = 1.
    routing = hand_routing(PROBS.log(), [[0], [0], [1], [0]])
    mask_BS = torch.ones(2, 2, dtype=torch.bool)
    assert make_loss("load-balance")(routing, mask_BS).item() == pytest.approx(1.0)
    # Per sequence: first F = (1, 0), Q = (5/8, 3/8): 2 * 5/8 = 5/4.
    # Second F = (1/2, 1/2), Q = (3/8, 5/8): 2 * 1/2 = 1. Mean 9/8.
    sequence = make_loss("load-balance", scope="sequence")
    assert sequence(routing, mask_BS).item() == pytest.approx(9 / 8)
    # Without the third token F = (1, 0), Q = (7/12, 5/12): 2 * 7/12 = 7/6.
    mask_BS = torch.tensor([[True, True], [False, True]])
    assert make_loss("load-balance")(routing, mask_BS).item() == pytest.approx(7 / 6)
    # Second sequence of padding alone: the first one's 5/4.
    mask_BS = torch.tensor([[True, True], [False, False]])
    assert sequence(routing, mask_BS).item() == pytest.approx(5 / 4)


def test_load_of_several_experts_is_not_divided_by_their_number():
    # Both chosen everywhere: F = (1, 1), so the balanced loss is k = 2.
    routing = hand_routing(PROBS.log(), [[0, 1]] * 4)
    mask_BS = torch.ones(1, 4, dtype=torch.bool)
    assert make_loss("load-balance")(routing, mask_BS).item() == pytest.approx(2.0)


def test_load_as_a_share_of_choices_by_hand():
    # Both chosen everywhere: shares 1/2 each, so the loss is 1 and not k = 2.
    mask_BS = torch.ones(1, 4, dtype=torch.bool)
    loss = make_loss("load-balance", share_of="choices")
    both = hand_routing(PROBS.log(), [[0, 1]] * 4)
    assert loss(both, mask_BS).item() == pytest.approx(1.0)
    # Five choices, three of them of expert 0, and Q = (1/2, 1/2): 2 * (3/5 + 2/5) / 2 = 1. Without
    # the third token four choices, three of them of 0, and Q = (7/12, 5/12): 2 * 26/48 = 13/12.
    uneven = hand_routing(PROBS.log(), [[0, 2], [0, 1], [1, 2], [0, 2]], num_experts=2)
    assert loss(uneven, mask_BS).item() == pytest.approx(1.0)
    mask_BS = torch.tensor([[True, True, False, True]])
    assert loss(uneven, mask_BS).item() == pytest.approx(13 / 12)


def test_group_balance_by_hand():
    # Groups (0, 1) and (2, 3). Tokens 0 and 2: p = (4, 2, 1, 1) / 8, they take 0 and 1; token 1:
    # p = (1, 1, 2, 4) / 8, it takes 3. F = 4/3 (1, 1, 0, 1); its means are 4/3 and
    # 2/3. P summed: (6 + 2 + 6) / 24 = 7/12 and 5/12. 4/3 * 7/12 + 2/3 * 5/12 = 38/36.
    scores_TE = torch.tensor([[4.0, 2, 1, 1], [1, 1, 2, 4], [4.0, 2, 1, 1]]).log()
    routing = hand_routing(scores_TE, [[0], [3], [1]])
    mask_BS = torch.ones(1, 3, dtype=torch.bool)
    assert make_loss("group-balance")(routing, mask_BS).item() == pytest.approx(38 / 36)
    # Without token 2 the groups are even.
    mask_BS = torch.tensor([[True, True, False]])
    assert make_loss("group-balance")(routing, mask_BS).item() == pytest.approx(1.0)


def test_groups_divide_the_experts():
    routing = hand_routing(PROBS.log(), [[0]] * 4)
    mask_BS = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(InputError, match=r"num_groups must divide num_experts=2, got 3; choose"):
        make_loss("group-balance", num_groups=3)(routing, mask_BS)
    with pytest.raises(InputError, match=r"num_groups must be at least 1, got 0"):
        make_loss("group-balance", num_groups=0)


def test_null_balance_by_hand():
    # E = 2 real and M = 2 null experts, k = 2; ids 2 are null slots.
    # Scores give p = (4, 2, 1, 1) / 8 for token 0 and (1, 1, 2, 4) / 8 for token 1.
    # Token 0 takes real 0 and 1, token 1 two nulls: F = (1/2, 1/2), nulls 2/2 = 1 slot per token
    # shared by two: 1/2 each. P = (5/16, 3/16, 3/16, 5/16).
    # 4 * 1/2 * (5 + 3 + 3 + 5)/16 = 2.
    scores_TE = torch.tensor([[4.0, 2, 1, 1], [1, 1, 2, 4]]).log()
    routing = hand_routing(scores_TE, [[0, 1], [2, 2]], num_experts=2)
    mask_BS = torch.ones(1, 2, dtype=torch.bool)
    assert make_loss("null-balance")(routing, mask_BS).item() == pytest.approx(2.0)
    # Token 0 alone: F = (1, 1, 0, 0): 4 * (4 + 2) / 8 = 3.
    mask_BS = torch.tensor([[True, False]])
    assert make_loss("null-balance")(routing, mask_BS).item() == pytest.approx(3.0)


def test_sparsity_by_hand():
    # Gates 3/4 (on), 1/4 (off) and 3/5 (on), 1/2 (off): (3/4 + 3/5) / (2 tokens * 2 experts).
    scores_TE = torch.tensor([[3.0, 1 / 3], [1.5, 1.0]]).log()
    routing = hand_routing(scores_TE, [[0, 2], [0, 2]])
    mask_BS = torch.ones(2, 1, dtype=torch.bool)
    assert make_loss("sparsity")(routing, mask_BS).item() == pytest.approx(1.35 / 4)
    # The straight-through variant has the same value.
    through = make_loss("sparsity", of="straight-through")
    assert through(routing, mask_BS).item() == pytest.approx(1.35 / 4)


def test_importance_by_hand():
    # Weights are one: expert 0 gets 3 tokens, expert 1 gets 1. Mean 2, variance 1: 1 / 4.
    routing = hand_routing(PROBS.log(), [[0], [0], [1], [0]])
    mask_BS = torch.ones(2, 2, dtype=torch.bool)
    assert make_loss("importance")(routing, mask_BS).item() == pytest.approx(0.25)
    # A factor on all weights changes nothing.
    scaled = dataclasses.replace(routing, weights_TK=5.0 * routing.weights_TK)
    assert make_loss("importance")(scaled, mask_BS).item() == pytest.approx(0.25)
    # Weights 3/4, 1/2, 3/4 and 1/2: sums 7/4 and 3/4, mean 5/4, deviation 1/2: 4 / 25.
    weights_TK = torch.tensor([[0.75], [0.5], [0.75], [0.5]])
    weighed = dataclasses.replace(routing, weights_TK=weights_TK)
    assert make_loss("importance")(weighed, mask_BS).item() == pytest.approx(0.16)
    # Without the third token all is expert 0's: mean 7/8, deviation 7/8.
    mask_BS = torch.tensor([[True, True], [False, True]])
    assert make_loss("importance")(weighed, mask_BS).item() == pytest.approx(1.0)


def test_load_by_hand():
    # Two more columns: deviations inside the top k. The normal distribution is 1/2 at 0, 0.8413447
    # at 1 and 0.1586553 at -1. Sums 1/2 + 0.8413447 and 1/2 + 0.1586553, which is 1 +- 0.3413447.
    scores_TE = torch.tensor([[3.0, 1.0, 0.0, 0.0], [3.0, 1.0, 1.0, -1.0]])
    routing = hand_routing(scores_TE, [[0], [0]], num_experts=2)
    mask_BS = torch.ones(1, 2, dtype=torch.bool)
    assert make_loss("load")(routing, mask_BS).item() == pytest.approx(0.3413447**2)
    mask_BS = torch.tensor([[True, False]])
    assert make_loss("load")(routing, mask_BS).item() == pytest.approx(0.0, abs=1e-7)


def test_load_without_noise_counts_tokens():
    # 3 tokens and 1: mean 2, variance 1.
    routing = hand_routing(PROBS.log(), [[0], [0], [1], [0]])
    mask_BS = torch.ones(2, 2, dtype=torch.bool)
    assert make_loss("load")(routing, mask_BS).item() == pytest.approx(0.25)
