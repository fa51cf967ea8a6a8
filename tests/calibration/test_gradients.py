"""Importance from gradients against autograd, and a model left as it was."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from calibration_cases import BLOCK, DEEP, LLAMA, Killed, Watch, ids_of, make_text
from model_cases import DIM, LAYERS, ROWS, WIDTH, Case, converted, dense_model, read_all

from moesaic._errors import InputError, RunError
from moesaic._progress import SILENT
from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.calibration.gradients import Gradients
from moesaic.data.blocks import TokenBlocks
from moesaic.models.channels import NARROWABLE
from moesaic.models.ffn import decoder_layers, ffn_output

TEXT = TokenBlocks(
    ids_NS=make_text().ids_NS,
    domain_N=np.array([0, 2, 0, 2, 2, 0], np.int16),
    document_N=np.arange(6, dtype=np.int32),
    domains=("noise", "silence", "hum"),
)
IDS = ids_of(TEXT)
CASES = [*ROWS, Case("llama", {"mlp_bias": True}), Case("llama", {"tie_word_embeddings": True})]


def block_loss(model, ids_S):
    logits_SV = model(input_ids=ids_S[None]).logits[0]
    return nnf.cross_entropy(logits_SV[:-1], ids_S[1:])


def salience(model):
    """Twins of a model that hold, for every weight, |w g| and w^2 times the mean g^2."""
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(block_loss(model, ids_S), parameters) for ids_S in IDS]
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for place, weight in enumerate(parameters):
            of_blocks = torch.stack([of_block[place] for of_block in grads])
            list(first.parameters())[place].copy_((weight * of_blocks.mean(0)).abs())
            list(second.parameters())[place].copy_(weight.square() * of_blocks.square().mean(0))
    return first, second


def over_neurons(ffn):
    total_F = ffn.up_FD.sum(1) + ffn.down_DF.sum(0)
    for rows in (ffn.gate_FD, ffn.gate_bias_F, ffn.up_bias_F):
        if rows is not None:
            total_F = total_F + (rows.sum(1) if rows.dim() == 2 else rows)
    return total_F


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_importance_of_neurons(case):
    model = dense_model(case)
    got = Gradients(model).measure(TEXT, 0, SILENT)
    first, second = salience(dense_model(case, torch.float64))
    assert len(got.layers) == LAYERS
    for tensors, one, two in zip(got.layers, read_all(first), read_all(second), strict=True):
        for name, ffn in (("weight_importance_F", one), ("weight_second_F", two)):
            want_F = over_neurons(ffn)
            assert tensors[name].shape == (WIDTH,)
            torch.testing.assert_close(tensors[name].double(), want_F, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_importance_of_channels(tied):
    """Every weight of a Llama, by the axis that its name says."""
    case = Case("llama", {"tie_word_embeddings": tied, "mlp_bias": True})
    got = Gradients(dense_model(case)).measure(TEXT, 0, SILENT).whole
    readers = ("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight")
    readers += ("v_proj.weight", "gate_proj.weight", "up_proj.weight")
    writers = ("o_proj.weight", "down_proj.weight", "down_proj.bias", "norm.weight")
    names = ("channel_importance_D", "channel_second_D")
    for name, twin in zip(names, salience(dense_model(case, torch.float64)), strict=True):
        want_D = torch.zeros(DIM, dtype=torch.float64)
        for key, value in twin.named_parameters():
            value = value.detach()
            if key.endswith(readers):
                want_D += value.sum(0)
            elif key.endswith(writers):
                want_D += value if value.dim() == 1 else value.sum(1)
            else:
                assert key.endswith(("gate_proj.bias", "up_proj.bias")), key
        torch.testing.assert_close(got[name].double(), want_D, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_channels_are_measured_where_they_can_be_removed(case):
    whole = Gradients(dense_model(case)).measure(TEXT, 0, SILENT).whole
    assert ("channel_importance_D" in whole) == (case.model_type in NARROWABLE)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_activation_importance_by_domain(case):
    """The gradient of what is added to a neuron's value is that of the value."""
    got = Gradients(dense_model(case)).measure(TEXT, 0, SILENT)
    model = dense_model(case, torch.float64)
    values, added = {}, {}

    def hook(index):
        def add(module, args):
            values[index] = args[0].detach()
            added[index] = torch.zeros_like(args[0]).requires_grad_()
            return (args[0] + added[index],)

        return add

    for index, layer in enumerate(decoder_layers(model)):
        ffn_output(layer, case.row).register_forward_pre_hook(hook(index))
    want = torch.zeros(LAYERS, 3, WIDTH, dtype=torch.float64)
    for ids_S, domain in zip(IDS, TEXT.domain_N, strict=True):
        block_loss(model, ids_S).backward()
        for index in range(LAYERS):
            product = values[index] * added[index].grad
            want[index, domain] += product.abs().flatten(0, -2).sum(0)
    want[:, [0, 2]] /= 3 * BLOCK
    assert got.whole["tokens_C"].tolist() == [3 * BLOCK, 0, 3 * BLOCK]
    for index, tensors in enumerate(got.layers):
        importance_CF = tensors["activation_importance_CF"]
        assert (importance_CF[1] == 0).all(), "a domain without tokens"
        torch.testing.assert_close(importance_CF.double(), want[index], rtol=1e-4, atol=1e-8)


def test_first_blocks_are_read(monkeypatch):
    monkeypatch.setattr(Gradients, "num_blocks", 2)
    watch = Watch()
    got = Gradients(dense_model(LLAMA)).measure(TEXT, 0, watch)
    assert got.whole["tokens_C"].tolist() == [BLOCK, 0, BLOCK]
    assert watch.done == watch.total == 2 * BLOCK


@pytest.mark.parametrize("stop_after", [float("inf"), 20], ids=["whole", "killed"])
@pytest.mark.parametrize("case", [LLAMA, Case("gpt2", {})], ids=str)
def test_model_is_left_as_it_was(case, stop_after):
    model = dense_model(case)
    frozen, kept = list(model.parameters())[:2]
    frozen.requires_grad_(False)
    gradient = kept.grad = torch.ones_like(kept)
    before = copy.deepcopy(model.state_dict())
    try:
        Gradients(model).measure(TEXT, 0, Watch(stop_after))
    except Killed:
        assert stop_after == 20
    assert not frozen.requires_grad
    assert kept.grad is gradient
    assert (gradient == 1).all()
    others = [p for p in model.parameters() if p is not frozen and p is not kept]
    assert all(p.requires_grad and p.grad is None for p in others)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_precision_is_summed_in_full():
    got = Gradients(dense_model(LLAMA, torch.bfloat16)).measure(TEXT, 0, SILENT)
    want = Gradients(dense_model(LLAMA, torch.bfloat16).float()).measure(TEXT, 0, SILENT)
    for half, full in zip(got.layers, want.layers, strict=True):
        for name, value in full.items():
            assert half[name].dtype == torch.float32
            assert (half[name] - value).norm() < 0.05 * value.norm(), name


def test_converted_model_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"collector 'gradients' needs a dense network, got a converted layer; giv"
    ):
        calibrate(converted(LLAMA), TEXT, ("gradients",), CalibrationConfig(tokens=96), tmp_path)


def test_network_that_does_not_run(monkeypatch):
    model = dense_model(LLAMA)
    monkeypatch.setattr(
        decoder_layers(model)[1], "forward", lambda hidden_states, **_: hidden_states
    )
    with pytest.raises(RunError, match=r"network of layer 1 saw no token, .*correct its row"):
        Gradients(model).measure(TEXT, 0, SILENT)


def test_calibration_keeps_it(tmp_path):
    """Beside what a walk measures, in the same statistics of each layer."""
    model = dense_model(DEEP)
    config = CalibrationConfig(tokens=TEXT.num_tokens, seed=3)
    stats = calibrate(model, TEXT, ("gradients", "neurons"), config, tmp_path)
    sample = TEXT.take(len(TEXT), seed=3)
    want = Gradients(model).measure(sample, 3, SILENT)
    for index, tensors in enumerate(want.layers):
        got = stats.layer(index)
        assert "neurons.mean_F" in got
        for name, value in tensors.items():
            assert torch.equal(got[f"gradients.{name}"], value)
    whole = stats.whole()
    assert whole.keys() == {f"gradients.{name}" for name in want.whole}
    for name, value in want.whole.items():
        assert torch.equal(whole[f"gradients.{name}"], value)


@pytest.mark.parametrize("blocks", [0, 2, 5])
@pytest.mark.parametrize("case", [LLAMA, Case("gpt2", {})], ids=str)
def test_interrupted_gradients_go_on_with_their_block(case, blocks, tmp_path):
    model = dense_model(case)
    config = CalibrationConfig(tokens=TEXT.num_tokens)
    whole = calibrate(model, TEXT, ("gradients",), config, tmp_path / "a")
    with pytest.raises(Killed):
        calibrate(model, TEXT, ("gradients",), config, tmp_path / "b", Watch(blocks * BLOCK + 5))
    watch = Watch()
    again = calibrate(model, TEXT, ("gradients",), config, tmp_path / "b", watch)
    assert watch.done == watch.total == TEXT.num_tokens - (blocks + 1) * BLOCK
    for want, got in [
        (whole.whole(), again.whole()),
        *((whole.layer(i), again.layer(i)) for i in range(LAYERS)),
    ]:
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], value) for name, value in want.items())
    assert not list((tmp_path / "b").glob("*unfinished*"))
