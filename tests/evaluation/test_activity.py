"""The active fraction: of routed, pruned and thresholded networks, measured while text is read."""

import dataclasses

import pytest
import torch
from evaluation_cases import DIM, LAYERS, WIDTH, Letters, convert, dense_model

from moesaic._errors import InputError
from moesaic.evaluation import QualityConfig, evaluate_perplexity, model_cost
from moesaic.evaluation.activity import record_use, token_fractions
from moesaic.evaluation.samples import coloured_tokens
from moesaic.models.ffn import decoder_layers
from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import MoELayer, moe_layers, record_routing

FFN = 3 * DIM * WIDTH


def zeroed(model, every):
    """Set every so-many-th weight of the always-on parts to zero, as static pruning does."""
    with torch.no_grad():
        for layer in moe_layers(model):
            weights = layer.shared.weights()
            for matrix in (weights.up, weights.down):
                matrix.flatten()[::every] = 0.0
    return model


def thresholded(model, inputs, neurons):
    """Put thresholds on the always-on parts."""
    for decoder, old in zip(decoder_layers(model), moe_layers(model), strict=True):
        config = dataclasses.replace(old.config, experts=f"thresholded-{old.config.experts}")
        layer = MoELayer(DIM, config)
        layer.load_state_dict(old.state_dict(), strict=False)
        for part in (layer.shared, layer.experts):
            if part is not None:
                part.set_thresholds(inputs, neurons)
        decoder.mlp = layer.eval()
    return model


@pytest.mark.parametrize("shared", [0, 8])
def test_whole_experts_are_counted_exactly(blocks, shared):
    model = convert(dense_model(), shared=shared)
    with torch.no_grad(), record_routing(model) as routings:
        model(input_ids=torch.from_numpy(blocks.ids_NS).long())
    width = (WIDTH - shared) // 4
    activation = evaluate_perplexity(model, blocks).activation
    # To the last bit: this is what records hold.
    assert activation.mean_per_layer() == [
        (shared + int(r.counts_E().sum()) / blocks.ids_NS.size * width) / WIDTH for r in routings
    ]


def test_neurons_are_counted_exactly(blocks):
    model = convert(dense_model(), experts=0, shared=18)
    activation = evaluate_perplexity(model, blocks).activation
    assert activation.mean_per_layer() == [18 / 24] * LAYERS
    assert activation.mean() == 0.75


@pytest.mark.parametrize("every", [2, 3])
def test_zero_weights_are_not_active(blocks, every):
    dense = model_cost(dense_model())
    model = zeroed(convert(dense_model(), experts=0, shared=WIDTH), every)
    activation = evaluate_perplexity(model, blocks).activation
    assert activation.mean() == pytest.approx(1 - 1 / every)
    assert activation.to_plain()["mean_per_layer"] == activation.mean_per_layer()
    assert set(activation.to_plain()["per_domain"]) == {"docs", "code"}
    # Every token uses the same weights, so text is not needed.
    cost = model_cost(model)
    assert cost == model_cost(model, activation.mean_per_layer())
    assert cost.total_parameters == dense.total_parameters
    assert cost.active_parameters == dense.active_parameters - LAYERS * FFN // every
    assert cost.flops_per_token == dense.flops_per_token - 2 * LAYERS * FFN // every


def test_zeros_of_an_always_on_part_beside_experts(blocks):
    whole = convert(dense_model(), shared=8)
    before = evaluate_perplexity(whole, blocks).activation
    # The first layer alone is read the same way by both.
    after = evaluate_perplexity(zeroed(whole, 2), blocks).activation
    gap = before.mean_per_layer()[0] - after.mean_per_layer()[0]
    assert gap == pytest.approx(0.5 * 8 / WIDTH)
    with pytest.raises(InputError, match=r"active_per_layer\[0\] must be in \[0.1667, 0.8333\]"):
        model_cost(whole, [0.9] * LAYERS)


def test_thresholds_are_measured_token_by_token(blocks):
    dense = model_cost(dense_model())
    model = thresholded(convert(dense_model(), experts=0, shared=WIDTH), 0.6, 0.3)
    ids = torch.from_numpy(blocks.ids_NS).long()
    seen = []
    handles = [
        layer.shared.register_forward_hook(
            lambda m, args, out: seen.append(m.used_TE(args[0])[:, 0])
        )
        for layer in moe_layers(model)
    ]
    with torch.no_grad(), record_use(model) as uses:
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    activation = evaluate_perplexity(model, blocks).activation
    assert activation.mean_per_layer() == pytest.approx([float(used_T.mean()) for used_T in seen])
    assert 0.2 < activation.mean() < 0.8
    assert len(seen[0].unique()) > 10
    fractions_T = token_fractions(model, uses, WIDTH)
    torch.testing.assert_close(fractions_T, (seen[0] + seen[1]) / LAYERS)
    tokens = coloured_tokens(model, Letters(), blocks.ids_NS[0])
    expected = fractions_T[: blocks.block].tolist()
    assert [t["active"] for t in tokens] == pytest.approx(expected)
    cost = model_cost(model, activation.mean_per_layer())
    off = LAYERS * FFN * (1 - activation.mean())
    assert cost.active_parameters == pytest.approx(dense.active_parameters - off, abs=1)
    assert cost.flops_per_token == pytest.approx(dense.flops_per_token - 2 * off, abs=2)
    with pytest.raises(InputError, match=r"use different weights needs active_per_layer, measured"):
        model_cost(model)


def test_thresholds_of_experts_count_where_they_are_on(blocks):
    model = thresholded(convert(dense_model()), 0.6, 0.3)
    ids = torch.from_numpy(blocks.ids_NS).long()
    worth = []

    def keep(module, args, out):
        h_TD, routing = args[:2]
        worth.append((module.used_TE(h_TD) * routing.active_TE()).sum(1))

    handles = [layer.experts.register_forward_hook(keep) for layer in moe_layers(model)]
    with torch.no_grad(), record_use(model) as uses:
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    activation = evaluate_perplexity(model, blocks).activation
    expected = [float(worth_T.mean()) / 4 for worth_T in worth]
    assert activation.mean_per_layer() == pytest.approx(expected)
    on = [float(use.routings[0].active_T().double().mean()) / 4 for use in uses]
    assert all(0.2 * b < a < 0.8 * b for a, b in zip(expected, on, strict=True))
    torch.testing.assert_close(
        token_fractions(model, uses, WIDTH), (worth[0] + worth[1]) / 4 / LAYERS
    )
    cost = model_cost(model, activation.mean_per_layer())
    assert cost.active_ffn_fraction == pytest.approx(activation.mean())


def test_zero_weights_of_experts_are_not_active(blocks):
    model = convert(dense_model())
    before = evaluate_perplexity(model, blocks).activation
    with torch.no_grad():
        # Of three equal matrices one; the first layer's routing does not see it.
        moe_layers(model)[0].experts.down_proj.zero_()
    after = evaluate_perplexity(model, blocks).activation
    assert after.mean_per_layer()[0] == pytest.approx(before.mean_per_layer()[0] * 2 / 3)


def test_thresholds_of_zero_are_the_dense_network(blocks):
    model = thresholded(convert(dense_model(), experts=0, shared=WIDTH), 0.0, 0.0)
    activation = evaluate_perplexity(model, blocks).activation
    assert activation.mean_per_layer() == [1.0] * LAYERS
    dense = model_cost(dense_model())
    assert model_cost(model, activation.mean_per_layer()) == dense


def test_a_thresholded_part_beside_experts_bounds_nothing_below(blocks):
    model = thresholded(convert(dense_model(), shared=8), 0.6, 0.3)
    activation = evaluate_perplexity(model, blocks).activation
    cost = model_cost(model, activation.mean_per_layer())
    assert cost.active_ffn_fraction == activation.mean()
    with pytest.raises(InputError, match=r"active_per_layer\[0\] must be in \[0, 1\], got 1.1"):
        model_cost(model, [1.1] * LAYERS)


def test_zeros_are_counted_once_an_evaluation(blocks, monkeypatch):
    model = zeroed(convert(dense_model(), experts=0, shared=WIDTH), 2)
    counted = []
    real = Experts.used_share
    monkeypatch.setattr(Experts, "used_share", lambda self: counted.append(self) or real(self))
    activation = evaluate_perplexity(model, blocks, QualityConfig(batch_blocks=1)).activation
    assert activation.mean() == pytest.approx(0.5)
    assert counted == [layer.shared for layer in moe_layers(model)]
    # Not remembered: another evaluation counts anew.
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.shared.down_proj.zero_()
    # Of three equal matrices one is gone, of the others half.
    assert evaluate_perplexity(model, blocks).activation.mean() == pytest.approx(1 / 3)


def test_no_hook_is_left(blocks):
    model = convert(dense_model(), shared=8)
    with pytest.raises(RuntimeError, match="stop"), record_use(model):
        raise RuntimeError("stop")
    evaluate_perplexity(model, blocks)
    assert not any(module._forward_hooks for module in model.modules())
