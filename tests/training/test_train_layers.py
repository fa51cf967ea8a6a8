"""Training takes layers that run several times, and losses of two passes, as it takes others."""

import pytest
import torch
from calibration_cases import BLOCK, LLAMA, make_text
from model_cases import converted

from moesaic.nn.layer import moe_layers
from moesaic.training import TrainConfig, train

CHAIN = {
    "router": "topk-softmax",
    "router_options": {"top_k": 1},
    "iterations": 2,
    "iteration_residual": "change",
}


def settings(trains):
    return TrainConfig(
        tokens=4 * BLOCK,
        batch_blocks=2,
        active=0.0,
        distill=0.0,
        language=1.0,
        router_learning_rate=1e-2,
        trains=trains,
    )


@pytest.mark.parametrize("trains", ["routers", "lora"])
def test_every_router_of_a_chain_trains_at_the_rate_of_routers(trains, tmp_path):
    model = converted(LLAMA, losses={"load-balance": {"coef": 0.1}}, **CHAIN)
    before = [[r.weight.clone() for r in layer.routers()] for layer in moe_layers(model)]
    model, results = train(model, make_text(), settings(trains), tmp_path)
    # Two iterations of one expert of four.
    assert [line["active"] for line in results["log"]] == pytest.approx([0.5, 0.5])
    for layer, weights in zip(moe_layers(model), before, strict=True):
        for router, weight in zip(layer.routers(), weights, strict=True):
            moved = (router.weight - weight).abs().max()
            # AdamW's first steps are about the rate long.
            assert 5e-3 < moved < 3e-2


def test_losses_of_two_passes_are_logged(tmp_path):
    model = converted(LLAMA, router="stochastic", losses={"consistency": {"coef": 2.0}})
    torch.manual_seed(0)
    _, results = train(model, make_text(), settings("ffn"), tmp_path)
    for line in results["log"]:
        # One expert of four, in either pass.
        assert line["active"] == pytest.approx(0.25)
        assert line["loss"] == pytest.approx(line["language"] + line["aux"], rel=1e-5)
    assert any(line["aux"] > 0 for line in results["log"])
