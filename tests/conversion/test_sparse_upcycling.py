"""Sparse upcycling: copies that start as the dense model, whole or pruned."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from calibration_cases import LLAMA, make_text
from conversion_cases import stats_for
from model_cases import LAYERS, ROWS, WIDTH, Case, dense_model, random_ids, read_all, same_state

from moesaic._errors import InputError
from moesaic.compression.pruning.flap import FLAP, prune_flap
from moesaic.conversion.sparse_upcycling import SparseUpcycling, convert_sparse_upcycling
from moesaic.evaluation.activity import record_use, token_fractions
from moesaic.nn.layer import moe_layers
from moesaic.training import TrainConfig, train


def convert(directory=None, case=LLAMA, **options):
    config = SparseUpcycling(**{"copies": 3, **options})
    return convert_sparse_upcycling(dense_model(case), stats_for(config, directory, case), config)


@torch.no_grad()
@pytest.mark.parametrize("case", [*ROWS, Case("llama", {"mlp_bias": True})], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_that_sum_to_one_leave_the_dense_model(case, top_k):
    model, results = convert(case=case, top_k=top_k, active=float(top_k))
    assert set(results["copy_widths"]) == {WIDTH}
    want = dense_model(case)(random_ids()).logits
    torch.testing.assert_close(model(random_ids()).logits, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_that_the_network_is_scaled_down():
    model, _ = convert(renormalize=False)
    ffns = read_all(dense_model(LLAMA))
    h_TD = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for layer, ffn in zip(moe_layers(model), ffns, strict=True):
        routing = layer.router(h_TD)
        assert (routing.weights_TK.sum(1) < 0.99).all()
        dense_TD = ffn.neurons(h_TD) @ ffn.down_DF.T
        torch.testing.assert_close(layer(h_TD), routing.weights_TK.sum(1, keepdim=True) * dense_TD)


def test_every_copy_is_the_network_and_every_router_its_own():
    model, _ = convert()
    layers = moe_layers(model)
    for layer, ffn in zip(layers, read_all(dense_model(LLAMA)), strict=True):
        for copy in range(3):
            assert torch.equal(layer.experts.down_proj[copy], ffn.down_DF)
            rows = torch.cat([ffn.gate_FD, ffn.up_FD])
            assert torch.equal(layer.experts.gate_up_proj[copy], rows)
    assert not torch.equal(layers[0].router.weight, layers[1].router.weight)
    assert model.config.moesaic["exact"] is False
    assert model.config.moesaic["losses"] == {"load-balance": {"coef": 0.01}}


@torch.no_grad()
def test_active_counts_whole_copies():
    model, _ = convert(top_k=2, active=2.0)
    with record_use(model) as uses:
        model(random_ids())
    assert set(token_fractions(model, uses, WIDTH).tolist()) == {2.0}


@torch.no_grad()
@pytest.mark.parametrize("case", [LLAMA, Case("opt", {}), Case("gpt2", {})], ids=str)
def test_pruned_copies_are_those_of_flap(case, tmp_path):
    # Half of the dense work in two copies: each is a quarter of the network, pruned by FLAP.
    model, results = convert(tmp_path / "a", case, top_k=2, active=0.5)
    assert results["copy_widths"] == [WIDTH // 4] * LAYERS
    flap = FLAP(active=0.25, structure="uniform", multiple=1)
    pruned, _ = prune_flap(dense_model(case), stats_for(flap, tmp_path / "b", case), flap)
    want = pruned(random_ids()).logits
    torch.testing.assert_close(model(random_ids()).logits, want, atol=1e-5, rtol=1e-5)


def test_whole_copies_need_no_text():
    assert SparseUpcycling().collectors() == ()
    assert SparseUpcycling(active=1.5).collectors() == ("neurons",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, top_k=2\], got 0.0; at top_k copies are whole"),
        ({"active": 3.0}, r"active must be in \(0, top_k=2\], got 3.0"),
        ({"top_k": 9}, r"top_k must be in \[1, copies=8\], got 9"),
        ({"copies": 0}, r"top_k must be in \[1, copies=0\], got 2"),
        ({"balance_coef": -1.0}, r"balance_coef and seed must be at least 0, got -1.0 and 0"),
        ({"amount": 0.0}, r"amount must be in \(0, 1\), got 0.0; 0.1 is usual"),
        ({"router": "dense-to-sparse"}, r"top_k must be 1 with router dense-to-sparse, got 2"),
        ({"seed": -1}, r"must be at least 0, got 0.01 and -1"),
    ],
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(InputError, match=message):
        SparseUpcycling(**options)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        # 0.7 * 48 / 2 = 16.8 neurons: 16 give 2/3 and 17 give 0.708333.
        (0.7, r"active=0.7 leaves copies of 16.8 of 48 neurons; .* is 0.666667 or 0.708333"),
        (0.01, r"copies of 0.24 of 48 neurons; the nearest that works is 0.0416667$"),
    ],
)
def test_no_whole_number_of_neurons_is_refused_before_the_model_is_touched(active, message):
    dense = dense_model(LLAMA)
    with pytest.raises(InputError, match=message):
        convert_sparse_upcycling(dense, None, SparseUpcycling(active=active))
    assert not moe_layers(dense)


def test_copies_cannot_teach_themselves(tmp_path):
    model, _ = convert()
    settings = {"tokens": 64, "batch_blocks": 2, "active": 0.0}
    with pytest.raises(
        InputError, match=r"cannot be its own teacher.*set distill and match to 0 and language"
    ):
        train(model, make_text(), TrainConfig(**settings), tmp_path)
    config = TrainConfig(**settings, distill=0.0, language=1.0, trains="everything")
    trained, results = train(model, make_text(), config, tmp_path)
    assert results["steps"] == 2
    # Copies grow apart: the router sends them different tokens.
    down_EDF = moe_layers(trained)[0].experts.down_proj
    assert not torch.equal(down_EDF[0], down_EDF[1])


@pytest.mark.parametrize("top_k", [1, 3])
def test_alike_copies_of_any_gate_that_sums_to_one_are_the_dense_model(top_k):
    model, _ = convert(top_k=top_k, active=float(top_k))
    spread, _ = convert(top_k=top_k, active=float(top_k), diversify="noise", amount=0.01)
    with torch.no_grad():
        want = dense_model(LLAMA)(random_ids()).logits
        torch.testing.assert_close(model(random_ids()).logits, want, atol=1e-5, rtol=1e-5)
        gap = (spread(random_ids()).logits - want).abs().max()
    assert 1e-5 < gap < 0.5


def test_masks_take_their_share_and_differ():
    model, _ = convert(top_k=1, active=1.0, diversify="mask", amount=0.3)
    plain, _ = convert(top_k=1, active=1.0)
    seen = []
    for layer, before in zip(moe_layers(model), moe_layers(plain), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            masked, whole = getattr(layer.experts, name), getattr(before.experts, name)
            gone = masked == 0
            assert torch.equal(masked[~gone], whole[~gone])
            seen += list(gone)
    share = torch.cat([gone.flatten() for gone in seen]).double().mean().item()
    assert share == pytest.approx(0.3, abs=0.01)
    assert all(not torch.equal(a, b) for a, b in pairwise(seen) if a.shape == b.shape)
    again, _ = convert(top_k=1, active=1.0, diversify="mask", amount=0.3)
    same_state(model, again)


def test_what_was_masked_trains_on_from_zero(tmp_path):
    model, _ = convert(
        top_k=1,
        active=1.0,
        diversify="mask",
        router="dense-to-sparse",
        router_options={"soft_steps": 2},
    )
    gone = [layer.experts.down_proj == 0 for layer in moe_layers(model)]
    config = TrainConfig(
        tokens=64, batch_blocks=2, active=0.0, distill=0.0, language=1.0, trains="everything"
    )
    trained, _ = train(model, make_text(), config, tmp_path)
    for layer, zero in zip(moe_layers(trained), gone, strict=True):
        assert layer.router.clock.step() == 2
        assert layer.experts.down_proj[zero].count_nonzero() > 0.9 * zero.sum()
