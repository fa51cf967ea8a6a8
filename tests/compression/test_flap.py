"""FLAP: what goes, what stays, and the bias that stands in for what went."""

import contextlib
from operator import attrgetter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import (
    LAYERS,
    ROWS,
    VOCAB,
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
from moesaic.calibration import CalibrationConfig, CalibrationStats, calibrate
from moesaic.calibration.stats import layer_file
from moesaic.compression._table import COMPRESSIONS
from moesaic.compression.pruning.flap import FLAP, choose_widths, fluctuation, prune_flap
from moesaic.data.blocks import TokenBlocks
from moesaic.models import checkpoint
from moesaic.models.ffn import decoder_layers
from moesaic.nn.layer import moe_layers

LLAMA = Case("llama", {})


def measure(model, directory, collectors=("neurons",)):
    """Calibrate on eight blocks of random tokens."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (8, 16), dtype=np.int32)
    text = TokenBlocks(
        ids_NS=ids,
        domain_N=np.zeros(8, np.int16),
        document_N=np.arange(8, dtype=np.int32),
        domains=("noise",),
    )
    return calibrate(model, text, collectors, CalibrationConfig(tokens=ids.size), directory)


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_score_by_hand():
    variance_F = torch.tensor([4.0, 1.0, 0.0, 9.0])
    # Squared lengths of the columns: 1, 4, 25 and 1.
    down_DF = torch.tensor([[1.0, 0.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]])
    assert fluctuation(variance_F, down_DF).tolist() == [4.0, 4.0, 0.0, 9.0]


# Standardised: -0.58, -0.58, -0.58, 1.73 and -1.34, -0.45, 0.45, 1.34.
BY_HAND = [torch.tensor([0.0, 0.0, 0.0, 8.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])]


@pytest.mark.parametrize(
    ("structure", "multiple", "active", "expected"),
    [
        # The best four of both: 1.73, 1.34, 0.45 and -0.45.
        ("adaptive", 1, 0.5, [1, 3]),
        ("adaptive", 1, 0.375, [1, 2]),
        ("adaptive", 1, 1.0, [4, 4]),
        # One neuron of a layer always stays.
        ("adaptive", 1, 0.25, [1, 1]),
        # Steps of two: -0.58 twice in the first layer against -0.45 and -1.34 in the second.
        ("adaptive", 2, 0.75, [4, 2]),
        # Steps of three, then of what is left: 3 + 3 is nearer to six than 3 + 4.
        ("adaptive", 3, 0.75, [3, 3]),
        ("uniform", 1, 0.5, [2, 2]),
        ("uniform", 2, 0.7, [2, 2]),
        ("uniform", 3, 0.9, [4, 4]),
        ("uniform", 9, 0.5, [4, 4]),
    ],
)
def test_widths_by_hand(structure, multiple, active, expected):
    config = FLAP(active=active, structure=structure, multiple=multiple)
    assert choose_widths(BY_HAND, config) == expected


def test_scale_of_a_layer_changes_no_width():
    config = FLAP(active=0.5, multiple=1)
    assert choose_widths([1e6 * BY_HAND[0], 1e-6 * BY_HAND[1]], config) == [1, 3]


def test_layer_of_equal_scores_is_average():
    # Its standardised scores are all zero: it keeps what the other layer has nothing better for.
    config = FLAP(active=0.5, multiple=1)
    assert choose_widths([torch.ones(4), BY_HAND[1]], config) == [2, 2]


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    active=st.floats(0.01, 1.0),
    multiple=st.integers(1, 20),
    structure=st.sampled_from(["adaptive", "uniform"]),
    seed=st.integers(0, 99),
)
def test_widths_meet_the_fraction(widths, active, multiple, structure, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.rand(w, generator=draw).pow(4) for w in widths]
    chosen = choose_widths(scores, FLAP(active=active, structure=structure, multiple=multiple))
    for kept, width in zip(chosen, widths, strict=True):
        assert 1 <= kept <= width
        assert kept % multiple == 0 or kept == width
    if structure == "uniform":
        for kept, width in zip(chosen, widths, strict=True):
            assert kept == min(multiple, width) or abs(kept - active * width) <= multiple
    else:
        least = sum(min(multiple, width) for width in widths)
        assert sum(chosen) == least or abs(sum(chosen) - active * sum(widths)) <= multiple


@pytest.mark.parametrize("structure", ["adaptive", "uniform"])
@pytest.mark.parametrize("case", [*ROWS, Case("llama", {"mlp_bias": True})], ids=str)
def test_pruned_is_the_dense_model_with_means_for_what_went(case, structure, tmp_path):
    """Cutting equals holding each removed neuron of the dense model at its mean."""
    dense = dense_model(case, torch.float64)
    stats = measure(dense, tmp_path)
    pruned, results = prune_flap(
        dense_model(case, torch.float64), stats, FLAP(active=0.5, structure=structure, multiple=4)
    )
    for index, (layer, ffn) in enumerate(zip(decoder_layers(dense), read_all(dense), strict=True)):
        measured = stats.layer(index)
        score_F = measured["neurons.variance_F"] * ffn.down_DF.float().square().sum(0)
        gone = score_F.argsort(descending=True)[results["widths"][index] :]
        mean = measured["neurons.mean_F"][gone].double()

        def hold(module, args, gone=gone, mean=mean):
            a = args[0].clone()
            a[..., gone] = mean
            return (a,)

        attrgetter(case.row.down)(layer).register_forward_pre_hook(hold)
    want = logits(dense)
    torch.testing.assert_close(logits(pruned), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert results["active"] == sum(results["widths"]) / (LAYERS * WIDTH)
    assert abs(results["active"] - 0.5) <= 4 / WIDTH
    assert [moe.config.shared_width for moe in moe_layers(pruned)] == results["widths"]


@pytest.mark.parametrize("case", [Case("gpt2", {}), Case("opt", {}), LLAMA], ids=str)
def test_without_compensation_what_went_is_zero(case, tmp_path):
    dense = dense_model(case)
    stats = measure(dense, tmp_path)
    ffns = read_all(dense_model(case))
    pruned, _ = prune_flap(dense, stats, FLAP(active=0.5, compensate=False))
    for moe, ffn in zip(moe_layers(pruned), ffns, strict=True):
        if ffn.down_bias_D is None:
            assert moe.output_bias is None
        else:
            assert torch.equal(moe.output_bias, ffn.down_bias_D)


@pytest.mark.parametrize("structure", ["adaptive", "uniform"])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_everything_active_is_the_dense_model(case, structure, tmp_path):
    dense = dense_model(case, torch.float64)
    stats = measure(dense, tmp_path)
    want = logits(dense)
    pruned, results = prune_flap(dense, stats, FLAP(active=1.0, structure=structure, multiple=7))
    torch.testing.assert_close(logits(pruned), want)
    assert results == {"active": 1.0, "widths": [WIDTH] * LAYERS}


@pytest.mark.parametrize("case", [Case("llama", {"mlp_bias": True}), Case("opt", {})], ids=str)
def test_constant_neurons_go_at_no_loss(case, tmp_path):
    dense = dense_model(case, torch.float64)
    constant = [3, 17, 40]
    with torch.no_grad():
        for ffn in read_all(dense):
            ffn.up_FD[constant] = 0.0
            ffn.up_bias_F[constant] = 0.8
            if ffn.gate_FD is not None:
                ffn.gate_FD[constant] = 0.0
                ffn.gate_bias_F[constant] = 0.8
    stats = measure(dense, tmp_path)
    want = logits(dense)
    twin = dense_model(case, torch.float64)
    twin.load_state_dict(dense.state_dict())
    config = FLAP(active=1 - 3 / WIDTH, structure="uniform", multiple=1)
    pruned, results = prune_flap(dense, stats, config)
    assert results["widths"] == [WIDTH - 3] * LAYERS
    torch.testing.assert_close(logits(pruned), want, rtol=0, atol=1e-6 * float(want.abs().max()))
    alone, _ = prune_flap(
        twin, stats, FLAP(active=config.active, structure="uniform", multiple=1, compensate=False)
    )
    assert (logits(alone) - want).abs().max() > 1e-2


def test_what_stays_keeps_its_order(tmp_path):
    dense = dense_model(LLAMA)
    rows = [ffn.up_FD.clone() for ffn in read_all(dense)]
    pruned, _ = prune_flap(dense, measure(dense, tmp_path), FLAP(active=0.5))
    for moe, up_FD in zip(moe_layers(pruned), rows, strict=True):
        kept_KD = moe.shared.gate_up_proj[0].chunk(2)[1]
        places = [int((up_FD == row).all(1).nonzero()) for row in kept_KD]
        assert places == sorted(places)


@pytest.mark.parametrize("case", [Case("gpt2", {}), LLAMA], ids=str)
def test_saves_and_loads(case, tmp_path):
    dense = dense_model(case)
    stats = measure(dense, tmp_path / "stats")
    manifest = checkpoint.new_manifest("tiny", dense)
    config = FLAP(active=0.6)
    pruned, results = prune_flap(dense, stats, config)
    manifest = checkpoint.add_step(manifest, "flap", to_plain(config), results)
    checkpoint.save(pruned, tmp_path / "model", manifest)
    loaded = checkpoint.load(tmp_path / "model")
    same_state(loaded, pruned)
    assert torch.equal(logits(loaded), logits(pruned))
    assert loaded.config.moesaic["dense_width"] == WIDTH
    assert pruned.num_parameters() < dense_model(case).num_parameters()


def test_half_precision(tmp_path):
    dense = dense_model(LLAMA, torch.bfloat16)
    stats = measure(dense, tmp_path)
    pruned, _ = prune_flap(dense, stats, FLAP(active=0.5))
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    exact, _ = prune_flap(dense_model(LLAMA, torch.bfloat16).float(), stats, FLAP(active=0.5))
    for got, want in zip(moe_layers(pruned), moe_layers(exact), strict=True):
        torch.testing.assert_close(got.output_bias, want.output_bias.bfloat16())


def test_resumes_after_the_last_scored_layer(tmp_path, monkeypatch):
    stats = measure(dense_model(LLAMA), tmp_path / "stats")
    whole, want = prune_flap(dense_model(LLAMA), stats, FLAP(active=0.5))
    read = []
    load = CalibrationStats.layer

    def first(self, index):
        if index == 1:
            raise KeyboardInterrupt
        return load(self, index)

    store = tmp_path / "store"
    monkeypatch.setattr(CalibrationStats, "layer", first)
    dense = dense_model(LLAMA)
    before = state(dense)
    with contextlib.suppress(KeyboardInterrupt):
        prune_flap(dense, stats, FLAP(active=0.5), store=store)
    assert dense.config.model_type == "llama"
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    monkeypatch.setattr(CalibrationStats, "layer", lambda s, i: read.append(i) or load(s, i))
    resumed, results = prune_flap(dense, stats, FLAP(active=0.5), store=store)
    assert read == [1]
    assert results == want
    same_state(resumed, whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0; 0.7 keeps 70%"),
        ({"active": 1.5}, r"active must be in \(0, 1\], got 1.5"),
        ({"multiple": 0}, r"multiple must be at least 1, got 0; 8 is usual"),
    ],
    ids=str,
)
def test_settings_out_of_bounds(options, message):
    with pytest.raises(InputError, match=message):
        FLAP(**options)


def test_unknown_structure():
    with pytest.raises(UnknownNameError, match=r"'unifrom' is unknown; did you mean uniform"):
        build_config(FLAP, {"structure": "unifrom"}, where="flap")


def test_too_few_neurons_for_every_layer(tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path)
    with pytest.raises(
        InputError,
        match=r"active=0.05 leaves fewer than multiple=8 neurons in each of 2 layers; raise it to "
        r"0.167 or lower multiple",
    ):
        prune_flap(dense_model(LLAMA), stats, FLAP(active=0.05))


def test_needs_its_collector(tmp_path):
    dense = dense_model(LLAMA)
    with pytest.raises(InputError, match=r"flap needs calibration of neurons"):
        prune_flap(dense, None, FLAP())
    stats = measure(dense, tmp_path, ("moments",))
    with pytest.raises(InputError, match=r"flap needs the collector 'neurons'.*has moments"):
        prune_flap(dense, stats, FLAP())


def test_converted_model_is_refused(tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path)
    pruned, _ = prune_flap(dense_model(LLAMA), stats, FLAP())
    with pytest.raises(InputError, match=r"converted already; give its dense parent"):
        prune_flap(pruned, stats, FLAP())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 3}, r"measured on 2 layers, the model has 3; calibrate this model"),
        ({"intermediate_size": 32}, r"measured on 48 neurons, layer 0 has 32; calibrate"),
    ],
    ids=str,
)
def test_statistics_of_another_model(options, message, tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path)
    other = dense_model(Case("llama", options))
    with pytest.raises(InputError, match=message):
        prune_flap(other, stats, FLAP())
    assert other.config.model_type == "llama"


def test_statistics_that_are_not_finite(tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path)
    file = layer_file(tmp_path, 1)
    tensors = load_file(file)
    tensors["neurons.variance_F"][5] = torch.inf
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"statistics of layer 1 in .* are not finite; calibrate"):
        prune_flap(dense_model(LLAMA), stats, FLAP())


@pytest.mark.parametrize(
    "name", [name for name, row in COMPRESSIONS.items() if "mixture" not in row.abilities]
)
def test_method_has_the_familys_form(name, tmp_path):
    config = COMPRESSIONS.load_config(name)()
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path, config.collectors())
    model, results = COMPRESSIONS.load(name)(dense, stats, config)
    assert model is dense
    assert not model.training
    assert results["active"] < 1
    assert to_plain(results) == results
