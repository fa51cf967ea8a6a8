"""Pruning in sequence goes on where it was cut, and refuses what it cannot use."""

import pytest
import torch
from compression_cases import LLAMA, Killed, Watch, make_text, measure, state
from model_cases import VOCAB, Case, dense_model, same_state
from safetensors.torch import load_file, save_file

from moesaic._errors import CheckpointError, InputError, RunError
from moesaic.calibration import walk
from moesaic.calibration.stats import pass_file
from moesaic.compression.pruning.sparsegpt import SparseGPT, prune_sparsegpt
from moesaic.compression.pruning.wanda import Wanda, prune_wanda

DEEP = Case("llama", {"num_hidden_layers": 4})
TOKENS = make_text().num_tokens
METHODS = [(prune_wanda, Wanda(active=0.5)), (prune_sparsegpt, SparseGPT(active=0.5))]
both = pytest.mark.parametrize(("prune", "config"), METHODS, ids=["wanda", "sparsegpt"])


@pytest.fixture
def stats(tmp_path):
    return measure(dense_model(DEEP), tmp_path / "stats", ("tokens",))


# In tokens: before the first layer gave its outputs, in the second, at the end of the third.
@both
@pytest.mark.parametrize(("stop_after", "missing"), [(20, 4), (TOKENS + 10, 3), (3 * TOKENS, 1)])
def test_goes_on_after_an_interruption(prune, config, stop_after, missing, stats, tmp_path):
    whole, want = prune(dense_model(DEEP), stats, config)
    store = tmp_path / "store"
    with pytest.raises(Killed):
        prune(dense_model(DEEP), stats, config, store=store, progress=Watch(stop_after))
    watch = Watch()
    resumed, results = prune(dense_model(DEEP), stats, config, store=store, progress=watch)
    assert watch.done == missing * TOKENS
    assert results == want
    same_state(resumed, whole)


def test_killed_between_a_layer_and_its_outputs(stats, tmp_path, monkeypatch):
    """The layer is on disk, the states behind it are not: it is not pruned a second time."""
    config = Wanda(active=0.5)
    whole, _ = prune_wanda(dense_model(DEEP), stats, config)
    keep = walk.keep

    def killed(store, num_done, hidden_NSD):
        if num_done == 2:
            raise Killed
        keep(store, num_done, hidden_NSD)

    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(walk, "keep", killed)
        with pytest.raises(Killed):
            prune_wanda(dense_model(DEEP), stats, config, store=store)
    assert sorted(file.name for file in store.iterdir()) == [
        "hidden.safetensors",
        "layer_000.safetensors",
        "layer_001.safetensors",
    ]
    resumed, _ = prune_wanda(dense_model(DEEP), stats, config, store=store)
    same_state(resumed, whole)


def test_damaged_layer_is_named(stats, tmp_path):
    store = tmp_path / "store"
    prune_wanda(dense_model(DEEP), stats, Wanda(active=0.5), store=store)
    file = store / "layer_001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"layer_001.safetensors cannot be read .*delete"):
        prune_wanda(dense_model(DEEP), stats, Wanda(active=0.5), store=store)


@both
def test_what_is_no_network_is_untouched(prune, config, stats):
    before = state(dense_model(DEEP))
    model, _ = prune(dense_model(DEEP), stats, config)
    kept = {name for name in before if ".mlp." not in name}
    assert kept
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)


@both
def test_tokens_of_another_vocabulary(prune, config, stats):
    file = pass_file(stats.directory, "tokens")
    tensors = load_file(file)
    tensors["whole.tokens.ids_NS"][3, 5] = VOCAB
    save_file(tensors, file)
    dense = dense_model(DEEP)
    with pytest.raises(InputError, match=r"has the token 64, the model knows 64; calibrate this"):
        prune(dense, stats, config)
    assert dense.config.model_type == "llama"


def test_too_few_weights_of_a_row(tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path, ("tokens",))
    with pytest.raises(InputError, match=r"active=0.01 keeps none of the 32 weights of a row; rai"):
        prune_wanda(dense_model(LLAMA), stats, Wanda(active=0.01))


@both
def test_inputs_that_are_not_finite(prune, config, stats):
    dense = dense_model(DEEP)
    with torch.no_grad():
        dense.model.layers[1].input_layernorm.weight[3] = torch.inf
    with pytest.raises(RunError, match=r"inputs of the network of layer 1 are not finite after"):
        prune(dense, stats, config)
