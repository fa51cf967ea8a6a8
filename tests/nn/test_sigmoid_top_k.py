"""The k highest sigmoid gates, and auxiliary-loss-free balancing, arXiv 2408.15664, by hand."""

import pytest
import torch
from nn_cases import make_layer, make_router, set_scores, tokens
from torch.utils.checkpoint import checkpoint

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer, end_step

# Sigmoids of 0, log 3 and -log 3 are 1/2, 3/4 and 1/4.
LOG3 = 1.0986122886681098
SCORES = torch.tensor([[0.0, LOG3, -LOG3], [LOG3, 0.0, -LOG3]])


def test_the_highest_gates_weigh_themselves_times_the_scale():
    router = make_router("sigmoid-top-k", 3, scale=2.0)
    routing = router(set_scores(router, SCORES))
    assert routing.ids_TK.tolist() == [[1, 0], [0, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1.5, 1.0], [1.5, 1.0]]))
    torch.testing.assert_close(routing.scores_TE, SCORES)


def test_a_bias_decides_and_weighs_nothing():
    router = make_router("sigmoid-top-k", 3)
    router.choice_bias.copy_(torch.tensor([0.0, -0.6, 0.3]))
    # Choices are 0.5, 0.15 and 0.55, then 0.75, -0.1 and 0.55.
    routing = router(set_scores(router, SCORES))
    assert routing.ids_TK.tolist() == [[2, 0], [0, 2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.25, 0.5], [0.75, 0.25]]))


def test_the_bias_is_saved_and_no_parameter():
    router = make_router("sigmoid-top-k", 3)
    router.choice_bias.fill_(0.25)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    other = make_router("sigmoid-top-k", 3, seed=1)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.choice_bias, torch.full((3,), 0.25))
    other.reset_parameters()
    assert not other.choice_bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k must be at least 1, got 0; choose 1 to num_experts"),
        ({"top_k": 7}, r"top_k must be in \[1, num_experts=6\], got 7"),
        ({"scale": 0.0}, r"scale must be above 0, got 0.0; 1 leaves gates as they are"),
        ({"scale": float("inf")}, r"scale must be above 0, got inf"),
    ],
)
def test_bad_settings_are_said(options, message):
    config = LayerConfig(num_experts=6, width=5, router="sigmoid-top-k", router_options=options)
    with pytest.raises(InputError, match=message):
        MoELayer(17, config)


def test_normalized_gates_sum_to_the_scale():
    router = make_router("sigmoid-top-k", 3, scale=2.0, normalize=True)
    # 3/4 and 1/2 of a sum of 5/4.
    routing = router(set_scores(router, SCORES))
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1.2, 0.8], [1.2, 0.8]]))


# Experts 0 and 1 are chosen by both tokens, expert 2 by none: loads 2, 2, 0 with a mean of 4/3.
MOVES = {"sign": [-0.01, -0.01, 0.01], "proportional": [-0.02 / 3, -0.02 / 3, 0.04 / 3]}


def train_step(router, passes=1):
    """Route and differentiate; the optimiser itself is left out."""
    h_TD = set_scores(router, SCORES)
    for _ in range(passes):
        router(h_TD).weights_TK.sum().backward()


@pytest.mark.parametrize("rule", MOVES)
def test_a_step_moves_the_bias_against_the_load(rule):
    router = make_router("sigmoid-top-k", 3, bias_step=0.01, bias_rule=rule).train()
    train_step(router)
    assert not router.choice_bias.any(), "the batch that is being routed may not be used"
    router.end_step()
    torch.testing.assert_close(router.choice_bias, torch.tensor(MOVES[rule]))
    router.end_step()
    # No load, no move.
    torch.testing.assert_close(router.choice_bias, torch.tensor(MOVES[rule]))


@pytest.mark.parametrize(("rule", "times"), [("sign", 1), ("proportional", 3)])
def test_accumulated_passes_are_one_step(rule, times):
    router = make_router("sigmoid-top-k", 3, bias_step=0.01, bias_rule=rule).train()
    train_step(router, passes=3)
    router.end_step()
    torch.testing.assert_close(router.choice_bias, times * torch.tensor(MOVES[rule]))


def test_balanced_experts_do_not_move():
    router = make_router("sigmoid-top-k", 3, top_k=3, bias_step=0.01).train()
    train_step(router)
    router.end_step()
    assert not router.choice_bias.any()


def test_evaluation_and_a_step_of_zero_move_nothing():
    for router in (
        make_router("sigmoid-top-k", 3, bias_step=0.01).eval(),
        make_router("sigmoid-top-k", 3).train(),
    ):
        train_step(router)
        router.end_step()
        assert not router.choice_bias.any()


def test_sum_of_the_bias_stays_under_the_proportional_rule_alone():
    sums = {}
    for rule in MOVES:
        router = make_router("sigmoid-top-k", 6, bias_step=0.001, bias_rule=rule).train()
        for seed in range(20):
            router(tokens(63, seed=seed)).weights_TK.sum().backward()
            router.end_step()
        assert router.choice_bias.abs().max() > 1e-3
        sums[rule] = abs(router.choice_bias.double().sum().item())
    assert sums["proportional"] < 1e-6
    assert sums["sign"] > 1e-4


def test_a_bias_that_is_equal_for_all_changes_nothing():
    router, h_TD = make_router("sigmoid-top-k", 6), tokens(63)
    before = router(h_TD)
    router.choice_bias.fill_(0.25)
    assert torch.equal(router(h_TD).ids_TK, before.ids_TK)
    # Where a bias leaves the choice as it was, weights are as they were.
    router.choice_bias.copy_(torch.linspace(-0.2, 0.2, 6))
    after = router(h_TD)
    same_T = (after.active_TE() == before.active_TE()).all(1)
    assert 0 < same_T.sum() < 63
    assert torch.equal(after.weights_TE()[same_T], before.weights_TE()[same_T])


def test_half_precision_does_not_swallow_a_step():
    router = make_router("sigmoid-top-k", 3, bias_step=0.001)
    router.choice_bias.fill_(0.5)
    router = router.to(torch.bfloat16).train()
    train_step(router)
    router.end_step()
    expected = torch.tensor([0.499, 0.499, 0.501])
    torch.testing.assert_close(router.choice_bias, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_is_recomputed_counts_once(reentrant):
    options = {"bias_step": 1.0, "bias_rule": "proportional"}
    moe = make_layer("sigmoid-top-k", router_config=options).train()
    h_TD = tokens(63, dtype=torch.float64).requires_grad_()
    load_E = moe.router(h_TD.detach()).counts_E()
    checkpoint(moe, h_TD, use_reentrant=reentrant).sum().backward()
    end_step(moe)
    torch.testing.assert_close(moe.router.choice_bias, (21 - load_E).double())


def test_steps_balance_a_load_that_was_skewed():
    router = make_router("sigmoid-top-k", 6, bias_step=0.005).train()
    h_TD = tokens(120)
    with torch.no_grad():
        # Expert 0 is every token's favourite.
        router.weight[0] *= 5.0
        h_TD += router.weight[0]
    before_E = router(h_TD).counts_E()
    for _ in range(300):
        router(h_TD).weights_TK.sum().backward()
        router.end_step()
    after_E = router(h_TD).counts_E()
    # 120 * 2 / 6 = 40 tokens each.
    assert before_E[0] > 80
    assert (after_E - 40).abs().max() <= 5


def test_who_never_ends_a_step_hears_of_it(caplog):
    router = make_router("sigmoid-top-k", 3, bias_step=0.01).train()
    train_step(router, passes=1001)
    assert [r.message for r in caplog.records] == [
        "the loads of 1000 passes wait to move a router's bias; call "
        "moesaic.nn.layer.end_step(model) after optimizer.step()"
    ]


def test_groups_are_chosen_by_their_best_two():
    # Gates of 1/2 are the score zero; groups are (0, 1, 2), (3, 4, 5).
    router = make_router("sigmoid-top-k", 6, num_groups=2, top_groups=1)
    # 3/4 + 1/4 = 1 against 1/2 + 1/2 + a bit: the second group, though the best expert is outside.
    scores = torch.tensor([[LOG3, -LOG3, -LOG3, 0.1, 0.0, -LOG3]])
    routing = router(set_scores(router, scores))
    assert routing.ids_TK.tolist() == [[3, 4]]
    torch.testing.assert_close(routing.weights_TK, scores[:, 3:5].sigmoid())
    # A bias takes part in the choice of the group.
    router.choice_bias[1] = 0.3
    assert router(set_scores(router, scores)).ids_TK.tolist() == [[0, 1]]
    # Both groups are no bar, and neither is one.
    for options in ({"num_groups": 2, "top_groups": 2}, {}):
        plain = make_router("sigmoid-top-k", 6, **options)
        assert plain(set_scores(plain, scores)).ids_TK.tolist() == [[0, 3]]


def test_nothing_outside_of_the_groups_is_chosen_whatever_the_bias():
    router = make_router("sigmoid-top-k", 6, top_k=3, num_groups=2, top_groups=1)
    # Every choice in the best group is below zero.
    router.choice_bias.copy_(torch.tensor([-2.0, -2.0, -2.0, -3.0, -3.0, -3.0]))
    assert sorted(router(tokens(1)).ids_TK[0].tolist()) == [0, 1, 2]


def test_groups_are_those_of_deepseek_v3():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=17,
        intermediate_size=8,
        moe_intermediate_size=8,
        n_routed_experts=12,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    options = {"num_groups": 4, "top_groups": 2, "normalize": True, "scale": 2.5, "top_k": 4}
    router = make_router("sigmoid-top-k", 12, **options)
    router.choice_bias.copy_(torch.linspace(-0.1, 0.1, 12))
    theirs = DeepseekV3TopkRouter(config)
    h_TD = tokens(63)
    with torch.no_grad():
        theirs.weight.copy_(router.weight)
        theirs.e_score_correction_bias.copy_(router.choice_bias)
        _, weights_TK, ids_TK = theirs(h_TD)
        ours = router(h_TD)
    expected_TE = torch.zeros(63, 12).scatter(1, ids_TK, weights_TK.float())
    torch.testing.assert_close(ours.weights_TE(), expected_TE)
