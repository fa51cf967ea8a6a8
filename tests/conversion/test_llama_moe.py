"""LLaMA-MoE: its cut, its budget, its two factors, its shared part, and its losses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calibration_cases import LLAMA, make_text
from conversion_cases import stats_for
from model_cases import LAYERS, WIDTH, dense_model, random_ids, read_all

from moesaic._errors import InputError
from moesaic.calibration.collectors import COLLECTORS
from moesaic.conversion.llama_moe import PRESETS, LLaMAMoE, convert_llama_moe
from moesaic.conversion.partition._table import PARTITIONS
from moesaic.models.checkpoint import load, new_manifest, save
from moesaic.nn.layer import all_experts_on, moe_layers, record_routing


def convert(directory=None, **options):
    config = LLaMAMoE(**{"experts": 4, "scale": "blocks", **options})
    return convert_llama_moe(dense_model(LLAMA), stats_for(config, directory), config)


class Importances:
    """Statistics of the tiny model whose importances by domain are given."""

    directory = "given"

    def __init__(self, num_domains=3):
        draw = torch.Generator().manual_seed(0)
        self.values = [torch.rand(num_domains, WIDTH, generator=draw) for _ in range(LAYERS)]

    def require(self, *names, by, num_layers):
        assert names == ("gradients",)

    def layer(self, index):
        return {"gradients.activation_importance_CF": self.values[index]}


def test_preset_paper_is_the_card():
    paper = PRESETS["paper"]
    assert (paper.experts, paper.top_k(), paper.shared) == (8, 2, 0)
    assert (paper.partition, paper.gate, paper.scale) == ("random", "mlp", "blocks")
    assert paper.balance_coef == 0.01
    assert paper.collectors() == ()
    wide = PRESETS["paper-4-of-16"]
    assert (wide.experts, wide.top_k()) == (16, 4)


def test_factor_is_experts_over_chosen():
    model, results = convert(active=0.25)
    assert results == {"router": "random, untrained", "top_k": 1, "scale_per_layer": [4.0, 4.0]}
    with record_routing(model) as routings, torch.no_grad():
        model(random_ids())
    for routing in routings:
        torch.testing.assert_close(routing.weights_TK.sum(1), torch.full((22,), 4.0))


@torch.no_grad()
def test_calibrated_factor_makes_outputs_as_long_as_the_dense_ones(tmp_path):
    model, results = convert(tmp_path / "stats", active=0.5, scale="calibrated")
    assert results["scale_per_layer"] != [2.0, 2.0]
    stats = stats_for(LLaMAMoE(), tmp_path / "stats")
    for i, layer in enumerate(moe_layers(model)):
        h_TD = stats.layer(i)["inputs.h_TD"].float()
        ours = layer(h_TD).norm(dim=1).mean()
        with all_experts_on(layer):
            dense = layer(h_TD).norm(dim=1).mean()
        torch.testing.assert_close(ours, dense)


@torch.no_grad()
def test_calibrated_factor_is_saved(tmp_path):
    model, results = convert(tmp_path / "stats", active=0.5, scale="calibrated")
    save(model, tmp_path / "model", new_manifest("dense", model))
    again = load(tmp_path / "model")
    scales = [layer.router.scale for layer in moe_layers(again)]
    assert [round(scale, 5) for scale in scales] == results["scale_per_layer"]
    assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
    assert [layer.config for layer in moe_layers(again)] == [
        layer.config for layer in moe_layers(model)
    ]


@torch.no_grad()
@pytest.mark.parametrize("partition", list(PARTITIONS))
def test_every_partition_is_an_exact_cut(partition, tmp_path):
    for ability in PARTITIONS[partition].abilities:
        if ability.startswith("package:"):
            pytest.importorskip(ability.removeprefix("package:"))
    if partition == "importance-by-domain":
        config = LLaMAMoE(experts=4, partition=partition, scale="blocks")
        model, _ = convert_llama_moe(dense_model(LLAMA), Importances(), config)
    else:
        model, _ = convert(tmp_path, partition=partition)
    with all_experts_on(model):
        logits = model(random_ids()).logits
    torch.testing.assert_close(logits, dense_model(LLAMA)(random_ids()).logits, atol=1e-5, rtol=0)
    assert model.config.moesaic["exact"]


@torch.no_grad()
@pytest.mark.parametrize("partition", ["random", "weights"])
def test_shared_blocks_are_always_on(partition):
    model, results = convert(partition=partition, shared=1, active=0.5)
    assert results["top_k"] == 1
    # Three routed blocks, one chosen.
    assert results["scale_per_layer"] == [3.0, 3.0]
    for layer in moe_layers(model):
        assert (layer.config.num_experts, layer.config.shared_width) == (3, WIDTH // 4)
    with all_experts_on(model):
        logits = model(random_ids()).logits
    torch.testing.assert_close(logits, dense_model(LLAMA)(random_ids()).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_residual_part_holds_what_most_domains_want():
    stats = Importances()
    # Of 12 neurons a block, these 12 matter most to every domain.
    wanted = torch.arange(3, 27, 2)
    for value_CF in stats.values:
        value_CF[:, wanted] += 5.0
    config = LLaMAMoE(experts=4, shared=1, partition="importance-by-domain", scale="blocks")
    assert config.collectors() == ("gradients",)
    model, _ = convert_llama_moe(dense_model(LLAMA), stats, config)
    for layer, ffn in zip(moe_layers(model), read_all(dense_model(LLAMA)), strict=True):
        shared = layer.shared.down_proj[0]
        columns = {tuple(column.tolist()) for column in shared.T}
        assert columns == {tuple(column.tolist()) for column in ffn.down_DF[:, wanted].T}
    with all_experts_on(model):
        logits = model(random_ids()).logits
    torch.testing.assert_close(logits, dense_model(LLAMA)(random_ids()).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_overlapping_experts_say_that_they_are_not_the_dense_model():
    config = LLaMAMoE(
        experts=4,
        shared=1,
        scale="blocks",
        partition="importance-by-domain",
        partition_options={"sharing": "inner"},
    )
    model, _ = convert_llama_moe(dense_model(LLAMA), Importances(), config)
    assert model.config.moesaic["exact"] is False
    assert model(random_ids()).logits.isfinite().all()


def test_wrong_number_of_domains_is_refused():
    config = LLaMAMoE(
        experts=4,
        scale="blocks",
        partition="importance-by-domain",
        partition_options={"sharing": "inner"},
    )
    with pytest.raises(InputError, match=r"4 experts need as many domains, the text has 3"):
        convert_llama_moe(dense_model(LLAMA), Importances(), config)


def test_losses_are_those_of_the_paper():
    model, _ = convert(balance_coef=0.02)
    assert model.config.moesaic["losses"] == {
        "importance": {"coef": 0.02},
        "load": {"coef": 0.02},
    }
    torch.manual_seed(0)
    out = model.train()(random_ids(), labels=random_ids())
    assert out.aux_loss > 0
    out.loss.backward()
    for layer in moe_layers(model):
        # Chosen weights, importance and load teach the gate; load teaches the noise too.
        assert layer.router.weight.grad.any(1).all()
        assert layer.router.noise.grad.any()


def test_evaluation_has_no_noise():
    model, _ = convert()
    first, second = (model(random_ids()).logits for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(random_ids()).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_routers_and_blocks_depend_on_the_seed_and_the_layer():
    first, second = (moe_layers(convert(seed=seed)[0]) for seed in (0, 1))
    weights = [layer.router.weight for layer in (*first, *second)]
    downs = [layer.experts.down_proj for layer in (*first, *second)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(downs[0], downs[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0; 0.75 keeps 75%"),
        ({"active": 1.5}, r"active must be in \(0, 1\], got 1.5"),
        ({"active": 0.3}, r"number of 8 experts, got 0.3; .* work: 0.25 and 0.375"),
        ({"active": 0.05}, r"the nearest that work: 0.125$"),
        ({"active": 0.25, "shared": 2}, r"at least 3, got 0.25; .* work: 0.375$"),
        ({"experts": 0}, r"experts must be at least 1 and shared .* got experts=0 and shared=0"),
        ({"shared": 8}, r"got experts=8 and shared=8; leave some to the router"),
        ({"shared": -1}, r"got experts=8 and shared=-1"),
        ({"partition": "randm"}, r"partition 'randm' is unknown; did you mean random"),
        ({"partition_options": {"a": 1}}, r"partition random option 'a' is unknown"),
        ({"balance_coef": -0.1}, r"balance_coef must be at least 0, got -0.1; 0.01 is the paper's"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
    ],
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(InputError, match=message):
        LLaMAMoE(**options)


def test_what_does_not_divide_the_network_is_refused_before_it_is_touched():
    dense = dense_model(LLAMA)
    with pytest.raises(InputError, match=r"experts=5 does not divide the FFN width 48"):
        convert_llama_moe(dense, None, LLaMAMoE(experts=5, active=0.4))
    assert not moe_layers(dense)


def test_collectors_follow_the_settings():
    config = LLaMAMoE(partition="coactivation")
    assert config.collectors() == ("inputs", "neurons")
    assert dataclasses.replace(config, scale="blocks").collectors() == ("neurons",)
    assert "adjacency" in COLLECTORS


def test_text_is_read_once_for_all(tmp_path):
    # What `moesaic.convert` does: no statistics given, text given.
    import moesaic as mo

    config = mo.LLaMAMoE(experts=4)
    model = mo.convert(
        dense_model(LLAMA),
        config,
        text=make_text(),
        calibration=mo.CalibrationConfig(tokens=96, batch_blocks=2),
    )
    assert model.config.moesaic["layers"][0]["router"] == "noisy-top-k"
