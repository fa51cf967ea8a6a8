"""MoEfication, arXiv 2110.01786: sums of activations, the fitted router, exactness and refusals."""

import dataclasses

import pytest
import torch
from calibration_cases import LLAMA, Killed, Watch, make_text
from model_cases import WIDTH, Case, dense_model, random_ids, same_state

from moesaic._errors import InputError
from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.conversion.moefication import (
    MoEfication,
    convert_moefication,
    expert_sums,
    fit_router,
    mean_unit_rows,
    usual_experts,
)
from moesaic.nn.experts._base import ExpertsConfig
from moesaic.nn.experts.gated import GatedExperts
from moesaic.nn.experts.plain import PlainExperts
from moesaic.nn.layer import all_experts_on, moe_layers, record_routing
from moesaic.nn.routers._base import TopKConfig
from moesaic.nn.routers.mlp_top_k import MlpTopK

TOKENS = CalibrationConfig(tokens=96, batch_blocks=2)
CONFIG = MoEfication(experts=4, active=0.5, epochs=3)
OPT = Case("opt", {})


def stats_for(config, directory, case=LLAMA):
    return calibrate(dense_model(case), make_text(), config.collectors(), TOKENS, directory)


@pytest.mark.parametrize(
    ("width", "experts"),
    # 1536 / 32 and 11008 / 32 divide; 48 / 32 = 1.5 lies between 1 and 2; 7 is prime; 100 / 32 =
    # 3.125 is nearest to 4, since 3 does not divide.
    [(1536, 48), (11008, 344), (48, 2), (7, 1), (100, 4)],
)
def test_usual_experts(width, experts):
    assert usual_experts(width) == experts


def test_centres_by_hand():
    # Unit rows (1, 0), (0, 1) and (0.6, 0.8), (-0.6, 0.8).
    rows = torch.tensor([[2.0, 0], [0, 5], [3, 4], [-3, 4]])
    torch.testing.assert_close(mean_unit_rows(rows, 2), torch.tensor([[0.5, 0.5], [0, 0.8]]))


@torch.no_grad()
@pytest.mark.parametrize("target", ["magnitude", "square"])
def test_sums_are_those_of_each_neuron(target):
    experts = GatedExperts(5, 3, 2, ExpertsConfig())
    torch.nn.init.normal_(experts.gate_up_proj, generator=torch.Generator().manual_seed(0))
    h_TD = torch.randn(600, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    got_TE = expert_sums(h_TD, experts, target)
    power = 1 if target == "magnitude" else 2
    for e in range(3):
        gate_TM, up_TM = (h_TD.float() @ experts.gate_up_proj[e].T).chunk(2, dim=1)
        value_TM = gate_TM * gate_TM.sigmoid() * up_TM
        torch.testing.assert_close(got_TE[:, e], value_TM.abs().pow(power).sum(1))


@torch.no_grad()
def test_the_magnitude_of_relu_is_what_the_paper_sums():
    experts = PlainExperts(5, 3, 2, ExpertsConfig(activation="relu"))
    torch.nn.init.normal_(experts.up_proj, generator=torch.Generator().manual_seed(0))
    h_TD = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    expected_TE = torch.einsum("td,emd->tem", h_TD, experts.up_proj).relu().sum(2)
    torch.testing.assert_close(expert_sums(h_TD, experts, "magnitude"), expected_TE)


def planted(num_tokens=600):
    """Inputs near one of six directions, each of which one expert is strong for."""
    draw = torch.Generator().manual_seed(0)
    centre_ED = torch.linalg.qr(torch.randn(16, 6, generator=draw))[0].T
    topic_T = torch.randint(6, (num_tokens,), generator=draw)
    h_TD = centre_ED[topic_T] + 0.1 * torch.randn(num_tokens, 16, generator=draw)
    target_TE = torch.nn.functional.one_hot(topic_T, 6).float() + 0.05
    router = MlpTopK(16, 6, TopKConfig(top_k=1))
    with torch.no_grad():
        router.weight.copy_(0.02 * torch.randn(6, 16, generator=draw))
    return router, h_TD, target_TE


def test_the_fit_finds_what_was_planted():
    router, h_TD, target_TE = planted()
    kept = fit_router(router, h_TD, target_TE, epochs=20, seed=0)
    # One expert holds 1.05 of 1.30 where it is the right one.
    assert kept == pytest.approx(1.05 / 1.30, abs=0.01)
    assert (router(h_TD).ids_TK.squeeze(1) == target_TE.argmax(1)).float().mean() > 0.98


def test_the_best_epoch_is_kept():
    kept = []
    for epochs in (1, 2, 4, 8):
        router, h_TD, target_TE = planted(80)
        kept.append(fit_router(router, h_TD, target_TE, epochs=epochs, seed=0))
    # With one seed the longer fit sees all that the shorter saw.
    assert kept == sorted(kept)


def test_the_fit_depends_on_the_seed_alone():
    fits = []
    for seed in (0, 0, 1):
        router, h_TD, target_TE = planted(80)
        fit_router(router, h_TD, target_TE, epochs=2, seed=seed)
        fits.append(router.weight.detach().clone())
    assert torch.equal(fits[0], fits[1])
    assert not torch.equal(fits[0], fits[2])


def test_targets_of_zero_and_one_token_fit():
    router = MlpTopK(4, 2, TopKConfig(top_k=1))
    assert fit_router(router, torch.ones(1, 4), torch.zeros(1, 2), epochs=2, seed=0) == 0.0
    assert router.weight.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("case", [LLAMA, OPT], ids=str)
@pytest.mark.parametrize("router", ["mlp", "similarity"])
@pytest.mark.parametrize("partition", ["weights", "coactivation"])
def test_cut_is_exact_and_every_token_uses_k(case, router, partition, tmp_path):
    dense, ids = dense_model(case), random_ids()
    want = dense(ids).logits
    config = dataclasses.replace(CONFIG, router=router, partition=partition)
    stats = stats_for(config, tmp_path, case) if config.collectors() else None
    model, results = convert_moefication(dense, stats, config)
    with record_routing(model) as routings:
        model(ids)
    for routing in routings:
        assert (routing.active_T() == 2).all()
        assert torch.equal(routing.weights_TK, torch.ones(ids.numel(), 2))
    with all_experts_on(model):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    if router == "mlp":
        assert all(0 < error < 2 for error in results["error_per_layer"])
        assert all(0.4 < kept < 1 for kept in results["kept_per_layer"])
    else:
        assert results == {}


@torch.no_grad()
def test_untrained_centres_are_the_mean_unit_gate_rows():
    config = dataclasses.replace(CONFIG, router="similarity", partition="weights")
    assert config.collectors() == ()
    model, _ = convert_moefication(dense_model(LLAMA), None, config)
    for layer in moe_layers(model):
        gate_EMD = layer.experts.gate_up_proj.chunk(2, dim=1)[0]
        unit_EMD = gate_EMD / gate_EMD.norm(dim=2, keepdim=True)
        torch.testing.assert_close(layer.router.weight, unit_EMD.mean(1))


@torch.no_grad()
def test_all_active_is_the_dense_model(tmp_path):
    dense, ids = dense_model(LLAMA), random_ids()
    want = dense(ids).logits
    config = dataclasses.replace(CONFIG, experts=None, active=1.0)
    model, results = convert_moefication(dense, stats_for(config, tmp_path), config)
    assert moe_layers(model)[0].config.num_experts == usual_experts(WIDTH) == 2
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert results["kept_per_layer"] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_an_interrupted_conversion_goes_on(tmp_path):
    stats = stats_for(CONFIG, tmp_path / "stats")
    whole, results = convert_moefication(dense_model(LLAMA), stats, CONFIG)
    store = tmp_path / "store"
    with pytest.raises(Killed):
        convert_moefication(dense_model(LLAMA), stats, CONFIG, store=store, progress=Watch(0))
    assert [path.name for path in store.iterdir()] == ["layer_000.safetensors"]
    again, same = convert_moefication(dense_model(LLAMA), stats, CONFIG, store=store)
    same_state(whole, again)
    assert same == results


def test_collectors_are_what_the_settings_need():
    assert MoEfication(partition="weights").collectors() == ("inputs",)
    assert MoEfication(partition="coactivation").collectors() == ("inputs", "neurons")
    both = MoEfication(partition="coactivation", router="similarity")
    assert both.collectors() == ("neurons",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4, "active": 0.6}, r"whole number of 4 experts, got 0.6; the nearest .* 0.5"),
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0"),
        ({"active": 1.5}, r"active must be in \(0, 1\], got 1.5"),
        ({"experts": 0}, r"experts must be at least 1, got 0"),
        ({"epochs": 0}, r"epochs must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        ({"partition": "wieghts"}, "did you mean weights"),
        ({"partition_options": {"scal": 1}}, "did you mean scale"),
    ],
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(InputError, match=message):
        MoEfication(**options)


def test_what_does_not_fit_the_model_is_refused_before_it_is_touched():
    dense = dense_model(LLAMA)
    with pytest.raises(
        InputError, match=r"experts=5 does not divide the FFN width 48; the nearest"
    ):
        convert_moefication(dense, None, MoEfication(experts=5, active=0.8))
    # The usual number for 48 neurons is 2.
    with pytest.raises(InputError, match=r"whole number of 2 experts, got 0.75; the nearest"):
        convert_moefication(dense, None, MoEfication())
    with pytest.raises(InputError, match="moefication with these settings needs calibration of"):
        convert_moefication(dense, None, CONFIG)
    assert not moe_layers(dense)
