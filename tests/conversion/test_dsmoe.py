"""The DSMoE conversion: an exact cut, the paper's defaults, budgets, and resuming at a layer."""

import dataclasses

import pytest
import torch
from calibration_cases import LLAMA, Killed, Watch, make_text
from model_cases import LAYERS, ROWS, Case, dense_model, random_ids, same_state

from moesaic._errors import InputError
from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.conversion.dsmoe import PRESETS, DSMoE, convert_dsmoe
from moesaic.conversion.partition._table import PARTITIONS
from moesaic.evaluation.activity import ActivityMeter
from moesaic.models.architectures import architecture_of
from moesaic.models.checkpoint import load, new_manifest, save
from moesaic.models.ffn import decoder_layers, dense_ffn_width, read_ffn
from moesaic.nn.layer import all_experts_on, moe_layers, record_routing
from moesaic.nn.routers.sigmoid_threshold import SigmoidThresholdConfig
from moesaic.training.teacher import is_own_teacher

TOKENS = CalibrationConfig(tokens=96, batch_blocks=2)


def stats_for(config, directory, case=LLAMA):
    model = dense_model(case)
    return calibrate(model, make_text(), config.collectors(), TOKENS, directory)


@torch.no_grad()
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_open_start_is_the_dense_model(case):
    dense, ids = dense_model(case), random_ids()
    want = dense(ids).logits
    before = sum(p.numel() for p in dense.parameters())
    model, _ = convert_dsmoe(dense, None, DSMoE(experts=4, init="open", partition="contiguous"))
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    layers, dim = len(moe_layers(model)), model.config.hidden_size
    grown = sum(p.numel() for p in model.parameters()) - before
    assert grown == layers * 4 * (dim + 1), "gates and their biases, nothing else"


@torch.no_grad()
@pytest.mark.parametrize("partition", list(PARTITIONS))
def test_every_partition_is_exact(partition, tmp_path):
    for ability in PARTITIONS[partition].abilities:
        if ability.startswith("package:"):
            pytest.importorskip(ability.removeprefix("package:"))
    dense, ids = dense_model(LLAMA), random_ids()
    want = dense(ids).logits
    config = DSMoE(experts=4, init="open", partition=partition)
    stats = stats_for(config, tmp_path) if config.collectors() else None
    model, _ = convert_dsmoe(dense, stats, config)
    with all_experts_on(model):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


def test_preset_paper_is_the_card():
    paper = PRESETS["paper"]
    assert (paper.experts, paper.partition, paper.init, paper.sparse_coef) == (
        8,
        "contiguous",
        "random",
        1.0,
    )
    assert paper.router == SigmoidThresholdConfig(
        threshold=0.5, estimator="straight-through", value="gate", normalize="count", bias=False
    )
    assert paper.sparse_of == "gates"
    assert paper.collectors() == ()


def test_random_start_is_reproducible():
    models = [convert_dsmoe(dense_model(LLAMA), None, PRESETS["paper"])[0] for _ in range(2)]
    same_state(*models)


@torch.no_grad()
@pytest.mark.parametrize("allocation", ["sensitivity", "uniform"])
def test_fitted_routers_meet_the_budget(allocation, tmp_path):
    config = DSMoE(experts=4, active=0.5, allocation=allocation, fit_steps=10)
    stats = stats_for(config, tmp_path)
    model, results = convert_dsmoe(dense_model(LLAMA), stats, config)
    asked = results["active_per_layer"]
    assert sum(asked) / len(asked) == pytest.approx(0.5, abs=0.06)
    if allocation == "uniform":
        assert max(asked) - min(asked) < 0.1
    with record_routing(model) as routings:
        model(torch.from_numpy(make_text().ids_NS).long())
    measured = [float(r.active_TE().float().mean()) for r in routings]
    assert sum(measured) / len(measured) == pytest.approx(0.5, abs=0.2)


@torch.no_grad()
@pytest.mark.parametrize("case", [LLAMA, Case("opt", {})], ids=str)
def test_a_bypass_counts_into_the_budget_and_brings_the_model_nearer(case, tmp_path):
    options = {"allocation": "uniform", "bypass": 4, "refit": False, "kept": 1.0}
    config = DSMoE(experts=4, active=0.6, fit_steps=10, **options)
    stats = stats_for(config, tmp_path, case)
    ids_NS = stats.whole()["tokens.ids_NS"].long()
    dense = dense_model(case)(ids_NS).logits
    model, results = convert_dsmoe(dense_model(case), stats, config)
    assert sum(results["active_per_layer"]) / LAYERS == pytest.approx(0.6, abs=1e-3)
    meter = ActivityMeter(model, dense_ffn_width(model.config))
    with meter.reading("text", ids_NS.numel()):
        near = model(ids_NS).logits
    # Met on the text that it was settled on, which each layer saw as the layers before left it.
    assert meter.result().mean() == pytest.approx(0.6, abs=0.02)
    for layer in moe_layers(model):
        layer.bypass.reset_parameters()
    far = model(ids_NS).logits
    assert (near - dense).norm() < 0.95 * (far - dense).norm()
    with all_experts_on(model):
        torch.testing.assert_close(model(ids_NS).logits, dense, atol=1e-4, rtol=1e-4)


SHARED = pytest.mark.parametrize(
    "case", [LLAMA, Case("llama", {"mlp_bias": True}), Case("opt", {})], ids=str
)


@torch.no_grad()
@SHARED
@pytest.mark.parametrize("options", [{"init": "open"}, {"init": "open", "compensate": True}, {}])
def test_shared_blocks_are_those_that_add_most(case, options, tmp_path):
    config = DSMoE(experts=8, shared=3, active=0.7, fit_steps=5, refit=False, **options)
    stats = stats_for(config, tmp_path, case)
    ids_NS = stats.whole()["tokens.ids_NS"].long() if not options else random_ids()
    dense = dense_model(case)
    want = dense(ids_NS).logits
    row = architecture_of(dense.config.model_type)
    ffns = [
        read_ffn(layer, row, getattr(dense.config, row.activation))
        for layer in decoder_layers(dense)
    ]
    downs = [(ffn, ffn.down_DF.clone(), ffn.up_FD.clone()) for ffn in ffns]
    neurons = [
        ffn.neurons(stats.layer(i)["inputs.h_TD"].float()).clone() for i, ffn in enumerate(ffns)
    ]
    model, _ = convert_dsmoe(dense, stats, config)
    with all_experts_on(model):
        torch.testing.assert_close(model(ids_NS).logits, want, atol=1e-4, rtol=1e-4)
    for moe, a_TF, (_, down_DF, up_FD) in zip(moe_layers(model), neurons, downs, strict=True):
        assert (moe.config.num_experts, moe.config.shared_width) == (5, up_FD.shape[0] * 3 // 8)
        rows = [
            part.weights().up[:, -part.width :].flatten(0, 1) for part in (moe.shared, moe.experts)
        ]
        order_F = torch.stack([(up_FD == row).all(1).nonzero()[0, 0] for row in torch.cat(rows)])
        y_T = (a_TF @ down_DF.T).square().sum(1)
        scale_T = (y_T.clamp(min=y_T.median()) * y_T.median()).rsqrt()
        energy_E = torch.stack(
            [
                ((a_TF[:, block] @ down_DF[:, block].T).square().sum(1) * scale_T).sum()
                for block in order_F.view(8, -1)
            ]
        )
        assert energy_E[:3].min() > energy_E[3:].max()


@torch.no_grad()
@SHARED
@pytest.mark.parametrize("kept", [1.0, None])
def test_shared_blocks_count_into_the_budget(case, kept, tmp_path):
    config = DSMoE(
        experts=8, shared=2, active=0.6, fit_steps=5, allocation="uniform", kept=kept, inputs=kept
    )
    stats = stats_for(config, tmp_path, case)
    model, results = convert_dsmoe(dense_model(case), stats, config)
    assert sum(results["active_per_layer"]) / LAYERS == pytest.approx(0.6, abs=1e-3)
    ids_NS = stats.whole()["tokens.ids_NS"].long()
    meter = ActivityMeter(model, dense_ffn_width(model.config))
    with meter.reading("text", ids_NS.numel()):
        model(ids_NS)
    assert meter.result().mean() == pytest.approx(0.6, abs=0.03)


def test_shared_blocks_that_leave_no_room_are_refused(tmp_path):
    config = DSMoE(experts=16, shared=8, active=0.53, bypass=0, fit_steps=3)
    stats = stats_for(config, tmp_path)
    with pytest.raises(InputError, match=r"shared=8 of 16 blocks leaves less than 0.1 of the oth"):
        convert_dsmoe(dense_model(LLAMA), stats, config)


@torch.no_grad()
def test_a_refit_brings_the_model_nearer_and_is_no_longer_its_parent(tmp_path):
    config = DSMoE(experts=4, active=0.6, fit_steps=10, allocation="uniform", bypass=0, seed=3)
    stats = stats_for(config, tmp_path)
    ids_NS = stats.whole()["tokens.ids_NS"].long()
    dense = dense_model(LLAMA)(ids_NS).logits
    away = {}
    for refit in (False, True):
        settings = dataclasses.replace(config, refit=refit)
        model, results = convert_dsmoe(dense_model(LLAMA), stats, settings)
        away[refit] = (model(ids_NS).logits - dense).norm(), sum(results["error_per_layer"])
        assert model.config.moesaic["exact"] is not refit
        assert is_own_teacher(model) is not refit
        with all_experts_on(model):
            same = torch.allclose(model(ids_NS).logits, dense, atol=1e-4, rtol=1e-4)
        assert same is not refit
    assert away[True][0] < 0.97 * away[False][0]
    assert away[True][1] < away[False][1]


@torch.no_grad()
@pytest.mark.parametrize(
    "case", [LLAMA, Case("llama", {"mlp_bias": True}), Case("opt", {})], ids=str
)
def test_thresholds_count_into_the_budget_and_bring_the_model_nearer(case, tmp_path):
    config = DSMoE(experts=4, active=0.5, fit_steps=10, allocation="uniform", bypass=0)
    stats = stats_for(config, tmp_path, case)
    ids_NS = stats.whole()["tokens.ids_NS"].long()
    dense = dense_model(case)(ids_NS).logits
    away = {}
    for kept in (1.0, None):
        settings = dataclasses.replace(config, kept=kept, inputs=kept)
        model, results = convert_dsmoe(dense_model(case), stats, settings)
        meter = ActivityMeter(model, dense_ffn_width(model.config))
        with meter.reading("text", ids_NS.numel()):
            away[kept] = (model(ids_NS).logits - dense).norm()
        assert sum(results["active_per_layer"]) / LAYERS == pytest.approx(0.5, abs=1e-3)
        # Met on the text that it was settled on, which each layer saw as the layers before left it.
        assert meter.result().mean() == pytest.approx(0.5, abs=0.02)
    assert away[None] < 0.9 * away[1.0]
    options = model.config.moesaic["layers"][0]["experts_options"]
    gated = case.model_type != "opt"
    assert options == pytest.approx(
        {**settings.kept_parts(gated=gated), **({} if gated else {"gates": 1.0})}
    )
    assert moe_layers(model)[0].experts.expected_share() == pytest.approx(0.6)
    assert model.config.moesaic["exact"] is False
    save(model, tmp_path / "saved", new_manifest("tiny", model))
    again = load(tmp_path / "saved")
    torch.testing.assert_close(again(ids_NS).logits, model(ids_NS).logits)


def test_thresholds_of_inputs_count_too(tmp_path):
    config = DSMoE(experts=4, active=0.5, fit_steps=10, inputs=0.8, kept=0.7, allocation="uniform")
    stats = stats_for(config, tmp_path)
    model, _ = convert_dsmoe(dense_model(LLAMA), stats, config)
    ids_NS = stats.whole()["tokens.ids_NS"].long()
    meter = ActivityMeter(model, dense_ffn_width(model.config))
    with meter.reading("text", ids_NS.numel()), torch.no_grad():
        model(ids_NS)
    assert meter.result().mean() == pytest.approx(0.5, abs=0.02)
    assert moe_layers(model)[0].experts.expected_share() == pytest.approx(0.7)


@pytest.mark.parametrize("kept", [0.6, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("inputs", [0.6, 1.0, None])
def test_kept_parts_add_up(kept, inputs):
    config = DSMoE(kept=kept, inputs=inputs)
    parts = config.kept_parts(gated=True)
    assert 0 < parts["neurons"] <= parts["gates"] <= 1
    assert parts["inputs"] == (min(1.0, 1.2 * kept) if inputs is None else inputs)
    total = (parts["inputs"] * (1 + parts["gates"]) + parts["neurons"]) / 3
    assert total == pytest.approx(min(kept, (2 * parts["inputs"] + 1) / 3))


@pytest.mark.parametrize("inputs", [None, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("active", [0.1, 0.25, 0.5, 0.75, 0.97])
def test_what_is_left_to_the_budget_leaves_something_of_every_part(active, inputs):
    for gated in (True, False):
        parts = DSMoE(active=active, kept=None, inputs=inputs).kept_parts(gated=gated)
        assert all(0 < part <= 1 for part in parts.values())


@pytest.mark.parametrize("active", [0.1, 0.25, 0.5, 0.75, 0.97])
def test_what_is_left_to_the_budget_can_meet_it(active):
    config = DSMoE(active=active, kept=None, inputs=None)
    for gated, matrices in ((True, 3), (False, 2)):
        parts = config.kept_parts(gated=gated)
        assert all(0 < part <= 1 for part in parts.values())
        used = parts["inputs"] * (1 + parts["gates"] if gated else 1) + parts["neurons"]
        assert active < used / matrices <= 1


def test_a_bypass_that_leaves_no_room_is_refused(tmp_path):
    config = DSMoE(experts=4, active=0.3, bypass=30, fit_steps=3)
    stats = stats_for(config, tmp_path)
    with pytest.raises(InputError, match=r"bypass must be at most \d+ for layers of .*, got 30"):
        convert_dsmoe(dense_model(LLAMA), stats, config)
    with pytest.raises(InputError, match="bypass must be at least 0, and 0 unless init is 'gram'"):
        DSMoE(bypass=4, init="open")


@torch.no_grad()
@pytest.mark.parametrize(
    "case", [LLAMA, Case("llama", {"mlp_bias": True}), Case("opt", {})], ids=str
)
def test_compensation_keeps_the_dense_model_and_leaves_the_mean_of_what_is_off(case, tmp_path):
    dense, ids = dense_model(case), random_ids()
    want = dense(ids).logits
    config = DSMoE(experts=4, init="open", compensate=True)
    stats = stats_for(config, tmp_path, case)
    row = architecture_of(dense.config.model_type)
    act = getattr(dense.config, row.activation)
    down = [read_ffn(layer, row, act) for layer in decoder_layers(dense)]
    means = [
        ffn.down_DF.clone() @ stats.layer(i)["neurons.mean_F"]
        + (0.0 if ffn.down_bias_D is None else ffn.down_bias_D)
        for i, ffn in enumerate(down)
    ]
    model, _ = convert_dsmoe(dense, stats, config)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    with all_experts_on(model):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    for layer, mean_D in zip(moe_layers(model), means, strict=True):
        layer.router.bias.fill_(-12.0)
        out_TD = layer(torch.randn(3, model.config.hidden_size))
        torch.testing.assert_close(out_TD, mean_D.expand(3, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"compensate": True}, {"kept": None}], ids=str)
def test_an_interrupted_conversion_goes_on(options, tmp_path):
    config = DSMoE(experts=4, active=0.5, fit_steps=5, **options)
    stats = stats_for(config, tmp_path / "stats")
    whole, results = convert_dsmoe(dense_model(LLAMA), stats, config)
    with pytest.raises(Killed):
        convert_dsmoe(
            dense_model(LLAMA), stats, config, store=tmp_path / "store", progress=Watch(0)
        )
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert list(done) == ["layer_000.safetensors"]
    again, same = convert_dsmoe(dense_model(LLAMA), stats, config, store=tmp_path / "store")
    first = tmp_path / "store" / "layer_000.safetensors"
    assert first.stat().st_mtime_ns == done[first.name]
    same_state(whole, again)
    assert same == results


def test_bfloat16_stays_bfloat16(tmp_path):
    model, _ = convert_dsmoe(dense_model(LLAMA, torch.bfloat16), None, PRESETS["paper"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(random_ids()).logits).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0"),
        ({"active": 1.2}, r"active must be in \(0, 1\], got 1.2"),
        ({"active": 0.05}, r"init 'gram' needs active of at least 0.1, got 0.05; raise it or use"),
        ({"partition": "coactivaton"}, "did you mean coactivation"),
        ({"init": "open", "router": SigmoidThresholdConfig()}, "needs router.bias"),
        ({"partition_options": {"scal": 1}}, "did you mean scale"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"shared": 32, "active": 0.5}, r"shared must be in \[0, experts \* active = 32\), got 32"),
        (
            {"kept": 0.59},
            r"inputs must be in \(0, 1\] and kept in \[0.2 \+ 0.4 \* inputs, 1\], got 1.0 and 0.59",
        ),
        ({"kept": 0.0}, r"kept in \[0.2 \+ 0.4 \* inputs, 1\], got 1.0 and 0.0; 1 keeps all"),
        ({"kept": 0.7, "active": 1.0}, "kept and inputs must be 1 where active is 1, which leaves"),
        ({"inputs": 0.0}, r"inputs must be in \(0, 1\] and .* got 0.0 and 1.0"),
        ({"kept": 0.7, "init": "open"}, "kept and inputs must be 1 unless init is 'gram' and comp"),
        (
            {"router": SigmoidThresholdConfig(threshold=0.0, value="one", bias=True)},
            "needs a router.threshold above 0",
        ),
    ],
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(InputError, match=message):
        DSMoE(**options)


def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(tmp_path):
    dense = dense_model(LLAMA)
    with pytest.raises(InputError, match=r"experts=7 does not divide .* the nearest"):
        convert_dsmoe(dense, None, DSMoE(experts=7, init="open", partition="contiguous"))
    with pytest.raises(InputError, match="needs calibration of inputs, neurons, sensitivity"):
        convert_dsmoe(dense, None, DSMoE(experts=4))
    stats = calibrate(dense, make_text(), ("neurons",), TOKENS, tmp_path)
    with pytest.raises(InputError, match="needs the collector 'inputs'"):
        convert_dsmoe(dense, stats, DSMoE(experts=4))
    assert not moe_layers(dense)
    model, _ = convert_dsmoe(dense, None, PRESETS["paper"])
    with pytest.raises(InputError, match="converted already"):
        convert_dsmoe(model, None, PRESETS["paper"])


@torch.no_grad()
@pytest.mark.parametrize("case", [LLAMA, Case("gpt2", {}), Case("opt", {})], ids=str)
def test_papers_gates_have_no_bias(case):
    dense = dense_model(case)
    before = sum(p.numel() for p in dense.parameters())
    model, results = convert_dsmoe(dense, None, PRESETS["paper"])
    assert (
        sum(p.numel() for p in model.parameters()) - before == LAYERS * model.config.hidden_size * 8
    )
    assert results == {}


@torch.no_grad()
@pytest.mark.parametrize("partition", ["random", "coactivation"])
@pytest.mark.parametrize("case", [Case("llama", {"mlp_bias": True}), Case("opt", {})], ids=str)
def test_reordering_takes_the_biases_along(case, partition, tmp_path):
    dense, ids = dense_model(case), random_ids()
    want = dense(ids).logits
    config = DSMoE(experts=4, init="random", partition=partition)
    stats = stats_for(config, tmp_path, case) if config.collectors() else None
    model, _ = convert_dsmoe(dense, stats, config)
    with all_experts_on(model):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fitted_routers_meet_the_budget_in_half_precision(dtype, tmp_path):
    text = make_text(40)
    config = DSMoE(experts=8, active=0.5, fit_steps=20)
    dense = dense_model(LLAMA, dtype)
    tokens = CalibrationConfig(tokens=text.num_tokens)
    stats = calibrate(dense, text, config.collectors(), tokens, tmp_path)
    model, results = convert_dsmoe(dense, stats, config)
    assert {p.dtype for p in model.parameters()} == {dtype}
    meter = ActivityMeter(model, dense_ffn_width(model.config))
    with meter.reading("text", text.num_tokens), torch.no_grad():
        model(torch.from_numpy(text.ids_NS).long())
    measured = meter.result().mean_per_layer()
    assert measured == pytest.approx(results["active_per_layer"], abs=0.05)


def test_error_is_told_at_the_fraction_of_the_layer(tmp_path):
    config = DSMoE(experts=8, active=0.5, fit_steps=10)
    stats = stats_for(config, tmp_path)
    # All that matters is the first layer: it gets most of the budget, and its error falls.
    stats = dataclasses.replace(stats, sensitivity=(1e6, 1.0))
    _, even = convert_dsmoe(
        dense_model(LLAMA), stats, dataclasses.replace(config, allocation="uniform")
    )
    _, shared = convert_dsmoe(dense_model(LLAMA), stats, config)
    assert shared["active_per_layer"][0] > 0.8
    assert shared["error_per_layer"][0] < 0.5 * even["error_per_layer"][0]
    assert shared["error_per_layer"][1] > even["error_per_layer"][1]


@torch.no_grad()
def test_everything_active_needs_no_text():
    config = DSMoE(experts=4, active=1.0, partition="contiguous")
    assert config.collectors() == ()
    dense, ids = dense_model(LLAMA), random_ids()
    want = dense(ids).logits
    model, _ = convert_dsmoe(dense, None, config)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


def test_statistics_of_another_model_are_refused(tmp_path):
    config = DSMoE(experts=4, active=0.5)
    stats = stats_for(config, tmp_path)
    deeper = dense_model(Case("llama", {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"measured on 2 layers, the model has 3; calibrate this"):
        convert_dsmoe(deeper, stats, config)
    assert not moe_layers(deeper)


def test_random_routers_depend_on_the_seed_alone():
    models = [
        convert_dsmoe(dense_model(LLAMA), None, dataclasses.replace(PRESETS["paper"], seed=seed))[0]
        for seed in (0, 1)
    ]
    routers = [[layer.router.weight.detach() for layer in moe_layers(model)] for model in models]
    flat = [weight for weights in routers for weight in weights]
    assert all(abs(float(weight.std()) - 0.02) < 0.004 for weight in flat)
    for index, weight in enumerate(routers[0]):
        others = [w for i, w in enumerate(routers[0]) if i != index]
        assert not any(torch.equal(weight, other) for other in others)
    assert not torch.equal(routers[0][0], routers[1][0])
