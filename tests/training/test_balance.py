"""The bias that balances CMoE's experts is state that trains: it is saved and taken up."""

import pytest
import torch
from calibration_cases import BLOCK, LLAMA, Killed, Watch, make_text
from model_cases import dense_model, same_state

from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.conversion.cmoe import CMoE, convert_cmoe
from moesaic.models.checkpoint import load, new_manifest, save
from moesaic.nn.layer import moe_layers
from moesaic.training import TrainConfig, train


@pytest.fixture
def start(tmp_path):
    """Makes the same converted model as often as it is asked."""
    tokens = CalibrationConfig(tokens=96, batch_blocks=2)
    stats = calibrate(dense_model(LLAMA), make_text(), ("inputs",), tokens, tmp_path / "stats")
    config = CMoE(experts=8, active=0.5)
    return lambda: convert_cmoe(dense_model(LLAMA), stats, config)[0]


def settings(trains):
    return TrainConfig(
        tokens=4 * 2 * BLOCK, batch_blocks=2, checkpoint_every=2, active=0.0, trains=trains
    )


@pytest.mark.parametrize("trains", ["ffn", "lora"])
def test_it_moves_and_is_taken_up(trains, start, tmp_path):
    whole, _ = train(start(), make_text(), settings(trains), tmp_path / "whole")
    moved = torch.stack([layer.router.balance for layer in moe_layers(whole)])
    assert moved.any()
    assert moved.abs().max() <= 4, "a step each"
    with pytest.raises(Killed):
        train(start(), make_text(), settings(trains), tmp_path / "cut", Watch(3 * 2 * BLOCK - 1))
    again, _ = train(start(), make_text(), settings(trains), tmp_path / "cut")
    same_state(whole, again)


def test_it_is_saved_and_loaded(start, tmp_path):
    model, _ = train(start(), make_text(), settings("ffn"), tmp_path / "training")
    save(model, tmp_path / "model", new_manifest("dense", model))
    same_state(model, load(tmp_path / "model"))
