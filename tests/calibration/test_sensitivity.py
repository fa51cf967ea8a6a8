"""The sensitivity of a layer: its formula, what it predicts, and a model left as it was."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from calibration_cases import BLOCK, DEEP, LLAMA, Killed, Watch, ids_of, make_text
from model_cases import DIM, LAYERS, ROWS, converted, dense_model

from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.calibration.sensitivity import layer_sensitivity
from moesaic.calibration.stats import open_stats
from moesaic.models.ffn import decoder_layers, ffn_output

TEXT = make_text()
IDS = ids_of(TEXT)


def logits_with(model, row, changes):
    """Logits when something is added to the network outputs of some layers; and those outputs."""
    outputs = {}

    def hook(index):
        def add(module, args, out):
            outputs[index] = out.detach().flatten(0, -2)
            return out + changes[index].reshape(out.shape) if index in changes else out

        return add

    layers = decoder_layers(model)
    handles = [ffn_output(x, row).register_forward_hook(hook(i)) for i, x in enumerate(layers)]
    logits = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    for handle in handles:
        handle.remove()
    return logits, outputs


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_formula(case):
    model = dense_model(case, torch.float64)
    got = layer_sensitivity(model, IDS, seed=5)
    zeros = {i: torch.zeros(IDS.numel(), DIM, dtype=torch.float64) for i in range(LAYERS)}
    changes = {i: zero.requires_grad_() for i, zero in zeros.items()}
    logits, outputs = logits_with(model, case.row, changes)
    draw = torch.Generator().manual_seed(5)
    probs = logits.detach().float().softmax(-1)
    drawn = torch.cat(
        [torch.multinomial(p, 1, generator=draw) for p in probs.split(IDS.shape[1])]
    ).squeeze(1)
    loss = nnf.cross_entropy(logits.float(), drawn, reduction="sum")
    grads = torch.autograd.grad(loss, list(changes.values()))
    for index, grad in enumerate(grads):
        energy_T = outputs[index].square().sum(1) * grad.square().sum(1)
        assert got[index] == pytest.approx(float(energy_T.mean()) / DIM, rel=1e-4)


@torch.no_grad()
def test_predicts_the_divergence_that_noise_makes():
    """Noise of relative energy e moves the predictions by about e / 2 times the sensitivity."""
    model = dense_model(DEEP, torch.float64)
    predicted = torch.tensor(
        [layer_sensitivity(model, IDS, seed=seed) for seed in range(8)], dtype=torch.float64
    ).mean(0)
    clean, outputs = logits_with(model, DEEP.row, {})
    want = clean.log_softmax(-1)
    draw = torch.Generator().manual_seed(0)
    energy = 1e-4
    for index, y_TD in outputs.items():
        divergences = []
        for _ in range(8):
            noise_TD = torch.randn(y_TD.shape, generator=draw, dtype=torch.float64)
            noise_TD *= energy**0.5 * y_TD.norm(dim=1, keepdim=True) / DIM**0.5
            noisy, _ = logits_with(model, DEEP.row, {index: noise_TD})
            got = noisy.log_softmax(-1)
            divergences.append(float((want.exp() * (want - got)).sum(-1).sum()))
        # A token's output moves the tokens after it too, so their divergences add up.
        measured = sum(divergences) / len(divergences) / IDS.numel()
        assert measured == pytest.approx(energy / 2 * float(predicted[index]), rel=0.25)


def test_model_is_left_as_it_was():
    model = converted(LLAMA)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    layer_sensitivity(model, IDS)
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(Killed):
        layer_sensitivity(model, IDS, progress=Watch(stop_after=20))
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert not any(m._forward_hooks for m in model.modules())


def test_calibration_keeps_it(tmp_path):
    model = dense_model(LLAMA)
    config = CalibrationConfig(tokens=TEXT.num_tokens, seed=2)
    stats = calibrate(model, TEXT, ("sensitivity",), config, tmp_path)
    sample = ids_of(TEXT.take(len(TEXT), seed=2))
    assert list(stats.sensitivity) == layer_sensitivity(model, sample, seed=2)
    assert open_stats(tmp_path) == stats
    assert stats.layer(0) == {}


# In the first block, in the third, and when all is done but for the file.
@pytest.mark.parametrize("blocks", [0, 2, 5])
def test_interrupted_sensitivity_goes_on_with_its_block(blocks, tmp_path):
    model = dense_model(LLAMA)
    config = CalibrationConfig(tokens=TEXT.num_tokens)
    names = ("moments", "sensitivity")
    whole = calibrate(model, TEXT, names, config, tmp_path / "a")
    stop = LAYERS * TEXT.num_tokens + blocks * BLOCK + 5
    with pytest.raises(Killed):
        calibrate(model, TEXT, names, config, tmp_path / "b", Watch(stop))
    watch = Watch()
    again = calibrate(model, TEXT, names, config, tmp_path / "b", watch)
    # The block whose end was told is on disk.
    assert watch.done == watch.total == TEXT.num_tokens - (blocks + 1) * BLOCK
    assert again.sensitivity == whole.sensitivity
    assert not list((tmp_path / "b").glob("*unfinished*"))
