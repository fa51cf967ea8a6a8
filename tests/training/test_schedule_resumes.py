"""How far a router's schedule has come is state that trains: it is saved and taken up."""

import pytest
from calibration_cases import BLOCK, LLAMA, Killed, Watch, make_text
from model_cases import converted, same_state

from moesaic.models.checkpoint import load, new_manifest, save
from moesaic.nn.layer import moe_layers
from moesaic.training import TrainConfig, train

STEPS = 4


def start():
    return converted(
        LLAMA,
        router="progressive-top-k",
        router_options={"top_k": 1, "early_top_k": 3, "early_steps": 2},
    )


def settings(trains):
    return TrainConfig(
        tokens=STEPS * 2 * BLOCK, batch_blocks=2, checkpoint_every=1, active=0.0, trains=trains
    )


@pytest.mark.parametrize("trains", ["ffn", "lora"])
def test_training_goes_on_where_it_was(trains, tmp_path):
    whole, results = train(start(), make_text(), settings(trains), tmp_path / "whole")
    assert [layer.router.clock.step() for layer in moe_layers(whole)] == [STEPS] * 2
    # Three of four experts, then one.
    assert [line["active"] for line in results["log"]] == pytest.approx([0.75, 0.75, 0.25, 0.25])
    with pytest.raises(Killed):
        train(start(), make_text(), settings(trains), tmp_path / "cut", Watch(3 * 2 * BLOCK - 1))
    again, resumed = train(start(), make_text(), settings(trains), tmp_path / "cut")
    same_state(whole, again)
    assert resumed["log"] == results["log"]
    save(again, tmp_path / "model", new_manifest("dense", again))
    same_state(again, load(tmp_path / "model"))
