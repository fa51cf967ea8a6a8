"""What looks at the whole model: kept in its own file, measured once, named when it is missing."""

import pytest
import torch
from calibration_cases import BLOCK, LLAMA, Killed, Watch, ids_of, make_text
from model_cases import LAYERS, converted, dense_model

from moesaic._errors import CheckpointError, InputError
from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.calibration.stats import layer_file, open_stats, pass_file

TEXT = make_text()
CONFIG = CalibrationConfig(tokens=TEXT.num_tokens)


@pytest.mark.parametrize("model", [dense_model(LLAMA), converted(LLAMA)], ids=["dense", "moe"])
def test_tokens_are_the_text_and_need_no_walk(model, tmp_path):
    watch = Watch()
    config = CalibrationConfig(tokens=TEXT.num_tokens, seed=4)
    stats = calibrate(model, TEXT, ("tokens",), config, tmp_path, watch)
    assert watch.total == 0
    assert not layer_file(tmp_path, 0).exists()
    sample = ids_of(TEXT.take(len(TEXT), seed=4))
    assert torch.equal(stats.whole()["tokens.ids_NS"].long(), sample)
    assert stats.layer(0) == {}
    assert stats.num_tokens == TEXT.num_tokens
    assert open_stats(tmp_path) == stats


def test_walk_alone_says_nothing_of_the_whole_model(tmp_path):
    stats = calibrate(dense_model(LLAMA), TEXT, ("moments",), CONFIG, tmp_path)
    assert stats.whole() == {}
    assert stats.passes == ()


def test_what_is_measured_is_not_measured_again(tmp_path):
    model = dense_model(LLAMA)
    names = ("gradients", "moments", "sensitivity")
    # The walk and the gradients are done, the sensitivity is not.
    stop = (LAYERS + 1) * TEXT.num_tokens + 20
    with pytest.raises(Killed):
        calibrate(model, TEXT, names, CONFIG, tmp_path, Watch(stop))
    assert pass_file(tmp_path, "gradients").is_file()
    watch = Watch()
    stats = calibrate(model, TEXT, names, CONFIG, tmp_path, watch)
    # Of the sensitivity two blocks are done as well.
    assert watch.done == TEXT.num_tokens - 2 * BLOCK
    assert stats.passes == ("gradients", "sensitivity")
    assert len(stats.sensitivity) == LAYERS


def test_damaged_files_are_named(tmp_path):
    model = dense_model(LLAMA)
    stats = calibrate(model, TEXT, ("tokens",), CONFIG, tmp_path)
    file = pass_file(tmp_path, "tokens")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tokens.safetensors cannot be read .*delete"):
        stats.whole()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tokens.safetensors is missing; delete .* again"):
        calibrate(model, TEXT, ("tokens",), CONFIG, tmp_path)


def test_near_name_is_suggested(tmp_path):
    with pytest.raises(InputError, match=r"collector 'token' is unknown; did you mean tokens"):
        calibrate(dense_model(LLAMA), TEXT, ("token",), CONFIG, tmp_path)


def test_a_damaged_unfinished_pass_is_named(tmp_path):
    model = dense_model(LLAMA)
    with pytest.raises(Killed):
        calibrate(model, TEXT, ("gradients",), CONFIG, tmp_path, Watch(20))
    file = tmp_path / "gradients.unfinished"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"gradients.unfinished cannot be read .*; delete"):
        calibrate(model, TEXT, ("gradients",), CONFIG, tmp_path)
