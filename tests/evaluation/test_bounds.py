"""Bounds: exactly so much is kept, the best of it, and nothing is left behind."""

import itertools

import numpy as np
import pytest
import torch
from evaluation_cases import DIM, LAYERS, WIDTH, convert, dense_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moesaic._errors import InputError
from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.conversion._table import CONVERSIONS
from moesaic.conversion.dsmoe import DSMoE
from moesaic.evaluation import block_bound, evaluate_perplexity, neuron_bound
from moesaic.evaluation.bounds import _common
from moesaic.evaluation.bounds._table import BOUNDS
from moesaic.evaluation.bounds.block_bound import BlockBound, select_blocks
from moesaic.evaluation.bounds.neuron_bound import NeuronBound
from moesaic.models.architectures import ARCHITECTURES, architecture_of
from moesaic.models.ffn import decoder_layers, read_ffn
from moesaic.nn.bypass import Bypass
from moesaic.nn.layer import moe_layers, record_routing
from moesaic.nn.routing import Routing
from moesaic.ops.weights import activation

GATED = [name for name, row in ARCHITECTURES.items() if row.gated]


def ids_of(blocks):
    return torch.from_numpy(blocks.ids_NS).long()


def logits(model, blocks):
    with torch.no_grad():
        return model(input_ids=ids_of(blocks)).logits


def neurons_seen(model, blocks, context):
    """Inputs of every network and of its down product, as the products get them."""
    row = architecture_of(model.config.model_type)
    seen = {"h": [], "a": []}

    def keep(key):
        return lambda module, args: seen[key].append(args[0].flatten(0, -2))

    with context:
        handles = []
        for layer in decoder_layers(model):
            network, down = (layer.get_submodule(path) for path in (row.ffn, row.down))
            handles.append(network.register_forward_pre_hook(keep("h")))
            handles.append(down.register_forward_pre_hook(keep("a")))
        logits(model, blocks)
        for handle in handles:
            handle.remove()
    return seen["h"], seen["a"]


@pytest.mark.parametrize(
    ("model_type", "by"),
    [*((name, "contribution") for name in ARCHITECTURES), *((name, "gate") for name in GATED)],
)
def test_the_best_neurons_of_each_token_are_kept(model_type, by, blocks):
    model = dense_model(model_type)
    row = architecture_of(model_type)
    act = getattr(model.config, row.activation)
    h, a = neurons_seen(model, blocks, neuron_bound(model, 0.3, by=by))
    for layer, h_TD, a_TF in zip(decoder_layers(model), h, a, strict=True):
        ffn = read_ffn(layer, row, act)
        whole_TF = ffn.neurons(h_TD)
        if by == "gate":
            score_TF = activation(act)(h_TD @ ffn.gate_FD.T).abs()
        else:
            score_TF = whole_TF.abs() * ffn.down_DF.norm(dim=0)
        # round(0.3 * 24) = 7 of 24.
        order_TF = score_TF.argsort(dim=1, descending=True, stable=True)
        want_TF = whole_TF.clone().scatter_(1, order_TF[:, 7:], 0.0)
        different_T = ~torch.isclose(a_TF, want_TF, atol=1e-5).all(1)
        # Of neurons that score alike, either may stay: a rectifier's zeros do.
        ties_T = score_TF.sort(1).values[:, -8:-6].diff(dim=1).squeeze(1) < 1e-6
        assert not (different_T & ~ties_T).any()
        assert ((a_TF != 0).sum(1) <= 7).all()


@pytest.mark.parametrize("active", [0.3, 0.5, 1.0])
def test_neuron_bound_tells_its_fraction(active, blocks):
    model = dense_model()
    with neuron_bound(model, active) as fraction:
        assert fraction == round(active * WIDTH) / WIDTH
        bounded = logits(model, blocks)
    whole = logits(model, blocks)
    if active == 1.0:
        torch.testing.assert_close(bounded, whole)
    else:
        assert (bounded - whole).abs().max() > 1e-3


def test_more_neurons_are_nearer_to_dense(blocks):
    model = dense_model()
    whole = logits(model, blocks)
    errors = []
    for active in (0.25, 0.5, 0.75, 0.95):
        with neuron_bound(model, active):
            errors.append(float((logits(model, blocks) - whole).norm()))
    assert errors == sorted(errors, reverse=True)


def off_error(gram_EE, off):
    return sum(gram_EE[i][j] for i in off for j in off)


def test_blocks_by_hand():
    # Outputs 3, -2.9, 1 and 0.5 in one dimension: without the first two only 0.1 is missing.
    out = np.array([3.0, -2.9, 1.0, 0.5])
    gram_TEE = torch.from_numpy(np.outer(out, out))[None]
    # One off: the 0.5. Two off: 0.5 and 1 together lose 2.25, where 3 - 2.9 would lose 0.01:
    # backward selection has switched 0.5 off by then and cannot see that.
    assert select_blocks(gram_TEE, 3).tolist() == [[True, True, True, False]]
    assert select_blocks(gram_TEE, 2).tolist() == [[True, True, False, False]]
    # Three off: with 0.5 and 1 gone, -2.9 brings the sum to -1.4, nearer than 3 to 4.5.
    assert select_blocks(gram_TEE, 1).tolist() == [[True, False, False, False]]
    assert select_blocks(gram_TEE, 4).all()


@settings(max_examples=40, deadline=None)
@given(num_experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_selection_is_greedy_and_exact_for_one(num_experts, seed):
    draw = torch.Generator().manual_seed(seed)
    o_TED = torch.randn(5, num_experts, 3, generator=draw, dtype=torch.float64)
    gram_TEE = o_TED @ o_TED.transpose(1, 2)
    for gram_EE, token in zip(gram_TEE.tolist(), range(5), strict=True):
        off = []
        for kept in range(num_experts - 1, 0, -1):
            rest = [i for i in range(num_experts) if i not in off]
            off.append(min(rest, key=lambda i: off_error(gram_EE, [*off, i])))
            on_E = select_blocks(gram_TEE, kept)[token]
            assert sorted(off) == (~on_E).nonzero().flatten().tolist()
            if kept == num_experts - 1:
                best = min(off_error(gram_EE, [i]) for i in range(num_experts))
                assert off_error(gram_EE, off) == best


@pytest.mark.parametrize("by", ["gram", "norm"])
@pytest.mark.parametrize("shared", [0, 8])
def test_the_best_blocks_of_each_token_are_used(by, shared, blocks):
    model = convert(dense_model(), experts=8, shared=shared)
    inputs = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
        for layer in moe_layers(model)
    ]
    with block_bound(model, 0.4, by=by) as fraction, record_routing(model) as routings:
        logits(model, blocks)
    for handle in handles:
        handle.remove()
    assert fraction == 3 / 8
    assert len(routings) == LAYERS
    for layer, h_TD, routing in zip(moe_layers(model), inputs, routings, strict=True):
        weights = layer.experts.weights()
        z_TEM = torch.einsum("td,emd->tem", h_TD, weights.up)
        o_TED = torch.einsum("tef,edf->ted", weights.activate(z_TEM), weights.down)
        on_TE = routing.active_TE()
        assert (on_TE.sum(1) == 3).all()
        assert torch.equal(routing.weights_TE(), on_TE.float())
        if by == "norm":
            best_TK = o_TED.norm(dim=2).topk(3, dim=1).indices.sort(1).values
        else:
            on_again_TE = select_blocks(o_TED @ o_TED.transpose(1, 2), 3)
            best_TK = on_again_TE.nonzero()[:, 1].reshape(-1, 3)
        assert torch.equal(routing.ids_TK.sort(1).values, best_TK)


def test_activity_of_the_block_bound_is_measured(blocks):
    model = convert(dense_model(), experts=6)
    with block_bound(model, 0.5) as fraction:
        measured = evaluate_perplexity(model, blocks).activation
    assert measured.mean_per_layer() == [0.5] * LAYERS == [fraction] * LAYERS


def test_block_bound_loses_less_than_any_other_single_block_would():
    model = convert(dense_model(), experts=4)
    layer = moe_layers(model)[0]
    h_TD = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want_TD = layer.experts.dense(h_TD)
        with block_bound(model, 0.75):
            error_T = (layer(h_TD) - want_TD).norm(dim=1)
        for off in range(4):
            weights_TE = torch.ones(40, 4)
            weights_TE[:, off] = 0.0
            other = Routing(torch.arange(4).expand(40, 4), weights_TE, weights_TE, 4)
            other_T = (layer.experts(h_TD, other) - want_TD).norm(dim=1)
            assert (error_T <= other_T + 1e-5).all()


def test_everything_kept_is_the_dense_model(blocks):
    whole = logits(dense_model(), blocks)
    model = convert(dense_model(), experts=4, value="gate", normalize="count")
    for by in ("gram", "norm"):
        with block_bound(model, 1.0, by=by) as fraction:
            torch.testing.assert_close(logits(model, blocks), whole, rtol=1e-4, atol=1e-4)
        assert fraction == 1.0


def test_a_bypass_is_no_part_of_the_bound_on_blocks(blocks):
    whole = logits(dense_model(), blocks)
    model = convert(dense_model(), experts=4, value="gate", normalize="count")
    bypasses = []
    for layer in moe_layers(model):
        layer.bypass = Bypass(DIM, 2)
        nn.init.normal_(layer.bypass.up_proj.weight)
        bypasses.append(layer.bypass)
    with block_bound(model, 1.0):
        torch.testing.assert_close(logits(model, blocks), whole, rtol=1e-4, atol=1e-4)
    assert not any(bypass._forward_hooks for bypass in bypasses)
    assert not torch.allclose(logits(model, blocks), whole, atol=1e-3)


@pytest.mark.parametrize("by", ["gram", "norm", "contribution", "gate"])
def test_chunks_change_nothing(by, blocks, monkeypatch):
    routed = by in ("gram", "norm")
    model = convert(dense_model(), experts=6) if routed else dense_model()
    bound = block_bound if routed else neuron_bound
    with bound(model, 0.5, by=by):
        whole = logits(model, blocks)
    sizes = []
    real = _common.chunks

    def chunks(num_tokens, floats):
        pieces = list(real(num_tokens, floats))
        sizes.append(max(len(range(num_tokens)[piece]) * floats for piece in pieces))
        return pieces

    monkeypatch.setattr(_common, "_MAX_FLOATS", 1000)
    monkeypatch.setattr(_common, "chunks", chunks)
    with bound(model, 0.5, by=by):
        torch.testing.assert_close(logits(model, blocks), whole)
    assert len(sizes) == LAYERS
    assert max(sizes) <= 1000


@pytest.mark.parametrize("kind", ["neurons", "blocks"])
def test_nothing_is_left_behind_also_after_an_error(kind, blocks):
    model = convert(dense_model()) if kind == "blocks" else dense_model()
    bound = block_bound if kind == "blocks" else neuron_bound
    before = logits(model, blocks)
    with pytest.raises(RuntimeError, match="stop"), bound(model, 0.5):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, blocks), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, blocks):
    model = dense_model().to(dtype)
    with neuron_bound(model, 0.5, by="gate"):
        assert logits(model, blocks).dtype == dtype
    model = convert(dense_model()).to(dtype)
    with block_bound(model, 0.5):
        assert logits(model, blocks).dtype == dtype


def test_what_cannot_be_bounded_is_refused():
    dense, routed = dense_model(), convert(dense_model())
    cases = itertools.chain(
        [
            (neuron_bound, dense, active, {}, rf"keep at least 1 of 24 neurons, got {active}; the")
            for active in (0.0, 0.01, 1.5)
        ],
        [
            (block_bound, routed, 0.1, {}, r"keep at least 1 of 4 blocks, got 0.1; the least is"),
            (neuron_bound, routed, 0.5, {}, r"needs a dense model, got a converted one; give its"),
            (block_bound, dense, 0.5, {}, r"needs a converted model with routers, got one without"),
            (neuron_bound, dense, 0.5, {"by": "gram"}, r"by must be one of contribution, gate"),
            (block_bound, routed, 0.5, {"by": "gate"}, r"by must be one of gram, norm, got 'gate'"),
            (neuron_bound, dense_model("opt"), 0.5, {"by": "gate"}, r"opt has no gates to choose"),
        ],
    )
    for bound, model, active, options, message in cases:
        with pytest.raises(InputError, match=message), bound(model, active, **options):
            pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_applied_neuron_bound_is_the_bound(blocks):
    model = dense_model()
    with neuron_bound(model, 0.3, by="gate"):
        want = logits(model, blocks)
    bounded, results = BOUNDS.load("neuron-bound")(model, None, NeuronBound(active=0.3, by="gate"))
    assert torch.equal(logits(bounded, blocks), want)
    assert results == {"active": 7 / 24}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        # 3 of 6 blocks.
        ({"convert": "dsmoe", "options": {"experts": 6, "init": "open"}}, 3),
        # 4 of 8 blocks are active; CMoE shares 2 of these always, so 2 of the other 6 are chosen.
        ({"convert": "cmoe", "options": {"experts": 8}, "by": "norm"}, 2),
    ],
    ids=["dsmoe", "cmoe"],
)
def test_an_applied_block_bound_meets_its_budget(options, kept, blocks, tmp_path):
    config = BlockBound(active=0.5, **options)
    text = CalibrationConfig(tokens=blocks.ids_NS.size)
    stats = calibrate(dense_model(), blocks, config.collectors(), text, tmp_path)
    model, results = BOUNDS.load("block-bound")(dense_model(), stats, config)
    assert results == {"active": 0.5, "blocks_per_layer": [kept] * LAYERS}
    bounded = evaluate_perplexity(model, blocks)
    assert bounded.activation.mean_per_layer() == [0.5] * LAYERS
    # The choice is the bound's and not the router's.
    plain, _ = CONVERSIONS.load(config.convert)(dense_model(), stats, config.conversion())
    chosen = kept / moe_layers(plain)[0].experts.num_experts
    with block_bound(plain, chosen, by=config.by):
        want = evaluate_perplexity(plain, blocks)
    assert np.array_equal(bounded.losses.nll_N, want.losses.nll_N)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0"),
        ({"active": 0.3, "options": {"experts": 4}}, r"whole number of 4 experts.* 0.25 and 0.5"),
        ({"convert": "sparse-upcycling"}, r"add up to the dense network \(cmoe, .*\), got 'sparse"),
        ({"convert": "dsmo"}, "conversion 'dsmo' is unknown; did you mean dsmoe"),
        ({"options": {"expert": 4}}, "convert dsmoe option 'expert' is unknown; did you mean"),
        ({"options": {"active": 0.5}}, "options.active of the bound on blocks stands beside"),
    ],
    ids=str,
)
def test_settings_that_no_block_bound_meets_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        BlockBound(**options)


def test_blocks_of_the_bound_stay_as_they_are_cut():
    """Moved ones would not add up to the dense network."""
    assert DSMoE().refit
    assert not BlockBound(convert="dsmoe").conversion().refit
