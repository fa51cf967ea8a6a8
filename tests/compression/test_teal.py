"""TEAL: thresholds that give the sparsity asked for, and the allocation between two tensors."""

import contextlib

import pytest
import torch
from compression_cases import make_text, measure
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    DIM,
    LAYERS,
    ROWS,
    WIDTH,
    Case,
    dense_model,
    random_ids,
    read_all,
    same_state,
)
from safetensors.torch import load_file, save_file

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError, UnknownNameError
from moesaic.calibration import CalibrationStats
from moesaic.calibration.stats import layer_file
from moesaic.compression.sparsity.teal import (
    TEAL,
    Magnitudes,
    allocate_greedily,
    sparsify_teal,
    weight_shares,
)
from moesaic.evaluation import evaluate_perplexity
from moesaic.models import checkpoint
from moesaic.models.ffn import FFN
from moesaic.nn.layer import moe_layers
from moesaic.ops.weights import keep_large

LLAMA = Case("llama", {})
PLAIN = Case("opt", {"activation_function": "gelu"})


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits


def sparse(case, tmp_path, config, dtype=torch.float32):
    dense = dense_model(case, dtype)
    return sparsify_teal(dense, measure(dense, tmp_path, ("inputs",)), config)


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        # Magnitudes 1, 1, 2, 3 and 4: of five, 0.4 is both ones, 0.6 the two as well.
        (0.0, 0.0),
        (0.4, 0.4),
        (0.6, 0.6),
        # One of the two ones: neither 0 nor 2 is nearer, so both go.
        (0.2, 0.4),
        (0.7, 0.8),
        (1.0, 1.0),
    ],
)
def test_threshold_by_hand(sparsity, expected):
    x = torch.tensor([-1.0, 2.0, 1.0, 4.0, -3.0])
    threshold, measured = Magnitudes([x[:2], x[2:].reshape(3, 1)]).threshold(sparsity)
    assert measured == expected
    assert float((keep_large(x, threshold) == 0).float().mean()) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=60),
    sparsity=st.floats(0.0, 1.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_threshold_is_the_nearest_there_is(values, sparsity, dtype):
    # Counting rounds to bfloat16, and a threshold lies between two of its values.
    x = torch.tensor(values).to(dtype)
    size = x.abs().bfloat16()
    threshold, measured = Magnitudes([x]).threshold(sparsity)
    assert float((size.float() <= threshold).double().mean()) == pytest.approx(measured)
    reachable = [float((size <= c).double().mean()) for c in (0.0, *size.unique().tolist())]
    nearest = min(abs(part - sparsity) for part in reachable)
    assert abs(measured - sparsity) <= nearest + 1 / len(values)
    if sparsity == 0:
        assert threshold == 0.0


def test_a_continuous_variable_is_met_within_a_third_of_a_point():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    magnitudes = Magnitudes(x.split(30_000))
    for sparsity in (0.1, 0.25, 0.5, 0.75, 0.9):
        threshold, measured = magnitudes.threshold(sparsity)
        assert abs(measured - sparsity) < 0.0033
        assert float((x.abs() <= threshold).double().mean()) == pytest.approx(measured, abs=1e-4)


def test_values_that_are_not_finite_are_seen():
    assert Magnitudes([torch.tensor([1.0, 3e38])]).finite
    assert not Magnitudes([torch.tensor([1.0, torch.inf])]).finite
    assert not Magnitudes([torch.tensor([torch.nan])]).finite


def test_shares_of_weights():
    assert weight_shares(gated=True) == pytest.approx((2 / 3, 1 / 3))
    assert weight_shares(gated=False) == (0.5, 0.5)


def greedy_by_hand(ffn, h_TD, active, step):
    """The paper's loop written out on sorted values; gives sparsities of inputs and of neurons."""
    share = weight_shares(gated=ffn.gate_FD is not None)

    def cut(x, sparsity):
        rank = round(sparsity * x.numel())
        return x if rank == 0 else x * (x.abs() > x.abs().flatten().sort().values[rank - 1])

    def error(s):
        a_TF = cut(ffn.neurons(cut(h_TD, s[0])), s[1])
        return float(((a_TF - ffn.neurons(h_TD)) @ ffn.down_DF.T).norm(dim=1).mean())

    s = [0.0, 0.0]
    left = 1 - active
    while left > 1e-9:
        turn = min(step, left)
        trials = []
        for i in (0, 1):
            raised = list(s)
            raised[i] = min(1.0, s[i] + turn / share[i])
            if s[i] < 1.0:
                trials.append((error(raised), raised))
        s = min(trials)[1]
        left = 1 - active - s[0] * share[0] - s[1] * share[1]
    return s


@pytest.mark.parametrize("case", [LLAMA, PLAIN], ids=str)
@pytest.mark.parametrize("active", [1.0, 0.8, 0.47, 0.1])
def test_greedy_is_the_papers_loop(case, active):
    ffn = read_all(dense_model(case))[0]
    h_TD = torch.randn(96, DIM, generator=torch.Generator().manual_seed(0))
    # Values of bfloat16, which counting does not round.
    h_TD = h_TD.bfloat16().float()
    first, second = allocate_greedily(ffn, h_TD, active, 0.05)
    assert [first, second] == pytest.approx(greedy_by_hand(ffn, h_TD, active, 0.05))
    share = weight_shares(gated=ffn.gate_FD is not None)
    assert share[0] * first + share[1] * second == pytest.approx(1 - active)


def test_greedy_takes_what_costs_nothing():
    # Half of the inputs are tiny, all neurons are large: the budget goes to the inputs.
    draw = torch.Generator().manual_seed(0)
    up_FD, down_DF = torch.rand(8, 16, generator=draw), torch.randn(16, 8, generator=draw)
    ffn = FFN(None, up_FD, down_DF, None, torch.full((8,), 20.0), None, "relu")
    h_TD = torch.rand(64, 16, generator=draw) + 0.5
    h_TD[:, ::2] *= 1e-4
    assert allocate_greedily(ffn, h_TD, 0.75, 0.05) == pytest.approx((0.5, 0.0))
    # Half of the neurons are tiny, all inputs are large: it goes to the neurons.
    up_FD[::2] = 0.0
    ffn = ffn._replace(up_bias_F=torch.tensor([1e-4, 3.0] * 4))
    h_TD = torch.rand(64, 16, generator=draw) + 0.5
    assert allocate_greedily(ffn, h_TD, 0.75, 0.05) == pytest.approx((0.0, 0.5))


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
@pytest.mark.parametrize("case", [*ROWS, Case("llama", {"mlp_bias": True})], ids=str)
def test_output_is_the_dense_model_with_small_values_gone(case, allocation, tmp_path):
    """Each layer alone equals the dense network on cut inputs and neurons."""
    dense = dense_model(case, torch.float64)
    ffns = read_all(dense_model(case, torch.float64))
    stats = measure(dense, tmp_path, ("inputs",))
    model, results = sparsify_teal(dense, stats, TEAL(active=0.6, allocation=allocation))
    for index, (moe, ffn) in enumerate(zip(moe_layers(model), ffns, strict=True)):
        h_TD = stats.layer(index)["inputs.h_TD"].double()
        first, second = moe.shared.input_threshold, moe.shared.neuron_threshold
        x_TD = h_TD * (h_TD.abs() > first)
        a_TF = ffn.neurons(x_TD)
        a_TF = a_TF * (a_TF.abs() > second)
        want_TD = a_TF @ ffn.down_DF.T
        if ffn.down_bias_D is not None:
            want_TD = want_TD + ffn.down_bias_D
        torch.testing.assert_close(moe(h_TD), want_TD)
        gone = [float((x == 0).double().mean()) for x in (x_TD, a_TF)]
        assert results["input_sparsity"][index] == pytest.approx(gone[0], abs=1e-4)
        assert results["neuron_sparsity"][index] == pytest.approx(gone[1], abs=2e-3)
        share = weight_shares(gated=case.row.gated)
        used = 1 - share[0] * gone[0] - share[1] * gone[1]
        # The neurons of a rectifier are zero by themselves.
        assert used <= 0.61
        assert float(moe.shared.used_TE(h_TD).mean()) == pytest.approx(used)
        if allocation == "uniform" and case.model_type != "opt":
            assert gone == pytest.approx([0.4, 0.4], abs=5e-3)


@pytest.mark.parametrize("case", [LLAMA, PLAIN], ids=str)
@pytest.mark.parametrize("active", [0.8, 0.5])
def test_sparsity_holds_on_text_it_was_not_set_on(case, active, tmp_path):
    """Check 4 of the method's card: within a point of the target."""
    dense = dense_model(case)
    stats = measure(dense, tmp_path, ("inputs",), make_text(num_blocks=128))
    model, results = sparsify_teal(dense, stats, TEAL(active=active, allocation="uniform"))
    assert results["active"] == pytest.approx(active, abs=2e-3)
    heldout = evaluate_perplexity(model, make_text(num_blocks=128, seed=1)).activation
    assert heldout.mean() == pytest.approx(active, abs=0.01)


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_everything_active_is_the_dense_model(case, allocation, tmp_path):
    dense = dense_model(case, torch.float64)
    stats = measure(dense, tmp_path, ("inputs",))
    want = logits(dense)
    model, results = sparsify_teal(dense, stats, TEAL(active=1.0, allocation=allocation))
    torch.testing.assert_close(logits(model), want)
    assert all(float(moe.shared.input_threshold) == 0.0 for moe in moe_layers(model))
    assert all(not moe.shared.neuron_threshold.any() for moe in moe_layers(model))
    if case.model_type != "opt":
        assert results["active"] == 1.0


def test_less_active_is_further_from_dense(tmp_path):
    want = logits(dense_model(LLAMA))
    errors = []
    for active in (0.9, 0.7, 0.5, 0.3):
        model, _ = sparse(LLAMA, tmp_path / str(active), TEAL(active=active))
        errors.append(float((logits(model) - want).norm()))
    assert errors == sorted(errors)
    assert errors[0] > 0


@pytest.mark.parametrize("case", [Case("gpt2", {}), LLAMA], ids=str)
def test_saves_and_loads_with_its_thresholds(case, tmp_path):
    dense = dense_model(case)
    manifest = checkpoint.new_manifest("tiny", dense)
    config = TEAL(active=0.6)
    stats = measure(dense, tmp_path / "stats", ("inputs",))
    model, results = sparsify_teal(dense, stats, config)
    manifest = checkpoint.add_step(manifest, "compress teal", to_plain(config), results)
    checkpoint.save(model, tmp_path / "model", manifest)
    loaded = checkpoint.load(tmp_path / "model")
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert all(float(moe.shared.input_threshold) > 0 for moe in moe_layers(loaded))
    assert loaded.config.moesaic["dense_width"] == WIDTH


def test_half_precision(tmp_path):
    model, results = sparse(LLAMA, tmp_path, TEAL(active=0.5), torch.bfloat16)
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    heldout = evaluate_perplexity(model, make_text(num_blocks=32, seed=1)).activation
    assert heldout.mean() == pytest.approx(results["active"], abs=0.02)


def test_resumes_after_the_last_finished_layer(tmp_path, monkeypatch):
    stats = measure(dense_model(LLAMA), tmp_path / "stats", ("inputs",))
    whole, want = sparsify_teal(dense_model(LLAMA), stats, TEAL())
    read = []
    load = CalibrationStats.layer

    def first(self, index):
        if index == 1:
            raise KeyboardInterrupt
        return load(self, index)

    store = tmp_path / "store"
    monkeypatch.setattr(CalibrationStats, "layer", first)
    dense = dense_model(LLAMA)
    with contextlib.suppress(KeyboardInterrupt):
        sparsify_teal(dense, stats, TEAL(), store=store)
    assert dense.config.model_type == "llama"
    same_state(dense, dense_model(LLAMA))
    monkeypatch.setattr(CalibrationStats, "layer", lambda s, i: read.append(i) or load(s, i))
    resumed, results = sparsify_teal(dense, stats, TEAL(), store=store)
    assert read == [1]
    assert results == want
    same_state(resumed, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0; 0.7 keeps 70%"),
        ({"active": 1.5}, r"active must be in \(0, 1\], got 1.5"),
        ({"step": 0.0}, r"step must be in \(0, 1\], got 0.0; 0.05 is the paper's"),
    ],
    ids=str,
)
def test_settings_out_of_bounds(options, message):
    with pytest.raises(InputError, match=message):
        TEAL(**options)


def test_unknown_allocation():
    with pytest.raises(UnknownNameError, match=r"'gredy' is unknown; did you mean greedy"):
        build_config(TEAL, {"allocation": "gredy"}, where="teal")


def test_needs_its_collector(tmp_path):
    dense = dense_model(LLAMA)
    with pytest.raises(InputError, match=r"teal needs calibration of inputs"):
        sparsify_teal(dense, None, TEAL())
    stats = measure(dense, tmp_path, ("moments",))
    with pytest.raises(InputError, match=r"teal needs the collector 'inputs'.*has moments"):
        sparsify_teal(dense, stats, TEAL())


def test_converted_model_is_refused(tmp_path):
    model, _ = sparse(LLAMA, tmp_path, TEAL())
    stats = measure(dense_model(LLAMA), tmp_path / "again", ("inputs",))
    with pytest.raises(InputError, match=r"converted already; give its dense parent"):
        sparsify_teal(model, stats, TEAL())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 3}, r"measured on 2 layers, the model has 3; calibrate this model"),
        ({"hidden_size": 16}, r"measured on inputs of 32 values, layer 0 has 16; calibrate this"),
    ],
    ids=str,
)
def test_statistics_of_another_model(options, message, tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path, ("inputs",))
    other = dense_model(Case("llama", options))
    with pytest.raises(InputError, match=message):
        sparsify_teal(other, stats, TEAL())
    assert other.config.model_type == "llama"


def test_statistics_that_are_not_finite(tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path, ("inputs",))
    file = layer_file(tmp_path, LAYERS - 1)
    tensors = load_file(file)
    tensors["inputs.h_TD"][5, 3] = torch.inf
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"statistics of layer 1 in .* are not finite; calibrate"):
        sparsify_teal(dense_model(LLAMA), stats, TEAL())
