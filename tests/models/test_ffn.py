"""Every row of the table reads the network its model computes, and cutting it changes nothing."""

import copy
from operator import attrgetter

import pytest
import torch
from model_cases import (
    CASES,
    DIM,
    EXPERTS,
    LAYERS,
    ROWS,
    Case,
    cut,
    dense_model,
    random_ids,
    read_all,
)

from moesaic import all_experts_on
from moesaic.models.ffn import decoder_layers, ffn_module
from moesaic.nn.layer import moe_layers


def network_io(model, case):
    """Input and output of every network of a dense model, by hooks and not by the table's paths."""
    seen = []

    def keep(module, args, out):
        seen.append((args[0].reshape(-1, DIM), out.reshape(-1, out.shape[-1])))

    names = {"opt": ("fc1", "fc2"), "gpt2": ("mlp", "mlp")}
    first, last = names.get(case.model_type, ("mlp", "mlp"))
    for layer in attrgetter(case.row.layers)(model):
        attrgetter(first)(layer).register_forward_hook(keep)
        if last != first:
            attrgetter(last)(layer).register_forward_hook(keep)
    with torch.no_grad():
        model(random_ids())
    if first == last:
        return seen
    return [(a[0], b[1]) for a, b in zip(seen[::2], seen[1::2], strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_read_network_is_the_models(case):
    model = dense_model(case, torch.float64)
    ffns = read_all(model)
    seen = network_io(model, case)
    assert len(ffns) == len(seen) == LAYERS
    for ffn, (h_TD, out_TD) in zip(ffns, seen, strict=True):
        got_TD = ffn.neurons(h_TD) @ ffn.down_DF.T
        if ffn.down_bias_D is not None:
            got_TD = got_TD + ffn.down_bias_D
        assert out_TD.abs().max() > 0.1
        torch.testing.assert_close(got_TD, out_TD)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_reading_copies_nothing(case):
    model = dense_model(case)
    ffn = read_all(model)[0]
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {
        ffn.up_FD.untyped_storage().data_ptr(),
        ffn.down_DF.untyped_storage().data_ptr(),
    } <= held


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_ffn_module_takes_the_networks_input(case):
    model = dense_model(case)
    for layer in decoder_layers(model):
        assert ffn_module(layer, case.row) in list(layer.modules())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_experts_on_is_the_dense_model(case, dtype, tolerance):
    dense = dense_model(case, dtype)
    before = sum(p.numel() for p in dense.parameters())
    ids = random_ids()
    with torch.no_grad():
        want = dense(ids).logits
        model = cut(dense)
        with all_experts_on(model):
            got = model(ids).logits
        routed = model(ids).logits
    assert (got - want).abs().max() < tolerance * want.abs().max()
    assert (routed - want).abs().max() > 0.1
    after = sum(p.numel() for p in model.parameters())
    assert after - before == LAYERS * DIM * EXPERTS


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_shared_part_and_experts_together_are_the_network(case):
    dense = dense_model(case, torch.float64)
    ids = random_ids()
    with torch.no_grad():
        want = dense(ids).logits
        model = cut(dense, shared_width=16)
        assert all(layer.shared is not None for layer in moe_layers(model))
        with all_experts_on(model):
            torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_cut_follows_the_order_of_neurons(case):
    model = cut(dense_model(case, torch.float64))
    ffn = read_all(dense_model(case, torch.float64))[0]
    moe = moe_layers(model)[0]
    width = moe.config.width
    h_TD = torch.randn(5, DIM, dtype=torch.float64)
    for expert in range(EXPERTS):
        piece = ffn.keep(torch.arange(expert * width, (expert + 1) * width))
        alone = copy.deepcopy(moe)
        with torch.no_grad():
            for other in set(range(EXPERTS)) - {expert}:
                alone.experts.down_proj[other] = 0.0
            alone.all_on = True
            if alone.output_bias is not None:
                alone.output_bias.zero_()
            torch.testing.assert_close(alone(h_TD), piece.neurons(h_TD) @ piece.down_DF.T)


@pytest.mark.parametrize("option", ["gelu", "relu"])
def test_activation_comes_from_the_config(option):
    case = Case("llama", {"hidden_act": option})
    dense = dense_model(case, torch.float64)
    with torch.no_grad():
        want = dense(random_ids()).logits
        model = cut(dense)
        with all_experts_on(model):
            torch.testing.assert_close(model(random_ids()).logits, want)


def test_phi3_halves_are_gate_then_up():
    case = Case("phi3", {})
    model = dense_model(case)
    fused = decoder_layers(model)[0].mlp.gate_up_proj.weight
    ffn = read_all(model)[0]
    assert torch.equal(torch.cat([ffn.gate_FD, ffn.up_FD]), fused)


def test_gpt2_keeps_its_dropout():
    case = Case("gpt2", {"resid_pdrop": 0.5})
    dense = dense_model(case)
    h_TD = torch.randn(1, 7, DIM)
    block = decoder_layers(dense)[0].mlp
    block.train()
    torch.manual_seed(5)
    want = block(h_TD).detach()
    model = cut(dense)
    block = decoder_layers(model)[0].mlp
    block.train()
    torch.manual_seed(5)
    with all_experts_on(model):
        got = block(h_TD)
    assert (want == 0).float().mean() > 0.2
    torch.testing.assert_close(got, want)
