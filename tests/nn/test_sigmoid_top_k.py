"""The k highest sigmoid gates, worked out by hand."""

import pytest
import torch
from nn_cases import make_router, set_scores

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer

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
