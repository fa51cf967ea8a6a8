"""Gates whose scores are of low rank: two maps that route as their product does."""

import pytest
import torch

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer
from moesaic.nn.packed_layer import pack_layer
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold, SigmoidThresholdConfig

D, E, R = 12, 8, 3


def pair(**options):
    """A router of rank R, and one with the product of its maps."""
    torch.manual_seed(0)
    low = SigmoidThreshold(D, E, SigmoidThresholdConfig(rank=R, bias=True, **options)).double()
    whole = SigmoidThreshold(D, E, SigmoidThresholdConfig(bias=True, **options)).double()
    with torch.no_grad():
        low.weight.mul_(50)
        low.bias.normal_()
        whole.weight.copy_(low.map_ED())
        whole.bias.copy_(low.bias)
    return low, whole


@pytest.mark.parametrize("training", [True, False])
def test_it_routes_as_the_product_of_its_maps_and_learns_by_the_chain_rule(training):
    low, whole = pair()
    h_TD = torch.randn(40, D, dtype=torch.float64)
    routings = [router.train(training)(h_TD.requires_grad_()) for router in (low, whole)]
    torch.testing.assert_close(routings[0].weights_TE(), routings[1].weights_TE())
    assert torch.equal(routings[0].active_TE(), routings[1].active_TE())
    assert 0 < routings[0].active_TE().sum() < 40 * E
    probe_TE = torch.randn(40, E, dtype=torch.float64)
    of_inputs = [
        torch.autograd.grad((r.weights_TE() * probe_TE).sum(), h_TD, retain_graph=True)[0]
        for r in routings
    ]
    torch.testing.assert_close(*of_inputs)
    for routing in routings:
        (routing.weights_TE() * probe_TE).sum().backward()
    torch.testing.assert_close(low.bias.grad, whole.bias.grad)
    torch.testing.assert_close(low.weight.grad, whole.weight.grad @ low.down.T)
    torch.testing.assert_close(low.down.grad, low.weight.T @ whole.weight.grad)


def test_it_multiplies_two_small_maps():
    low, whole = pair()
    assert (low.num_multiplied(), whole.num_multiplied()) == (R * (E + D), E * D)


def test_fresh_scores_are_of_one_size_whatever_the_rank():
    torch.manual_seed(0)
    h_TD = torch.randn(200, 64)
    sizes = [
        SigmoidThreshold(64, 48, SigmoidThresholdConfig(rank=rank)).scores(h_TD).std().item()
        for rank in (0, 4, 32)
    ]
    assert max(sizes) < 1.5 * min(sizes)


def test_native_code_knows_one_map_and_leaves_the_decision_to_torch():
    low, _ = pair()
    assert low.choice() is None
    with pytest.raises(InputError, match="has no linear scores that native code could compute"):
        low.score_map()
    config = LayerConfig(
        num_experts=E, width=16, router="sigmoid-threshold", router_options={"rank": R}
    )
    assert pack_layer(MoELayer(64, config).eval(), "float32") is None
