"""ExpertWeaver-style conversion: activity, shares by layer, the router's rows and refusals."""

import pytest
import torch
from calibration_cases import DEEP, LLAMA, Killed, make_text
from hypothesis import given
from hypothesis import strategies as st
from model_cases import Case, dense_model, random_ids, read_all, same_state

from moesaic._errors import InputError
from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.conversion.expertweaver import (
    ExpertWeaver,
    activity,
    convert_expertweaver,
    share_parts,
    variation,
)
from moesaic.evaluation.activity import record_use, token_fractions
from moesaic.nn.layer import all_experts_on, moe_layers

TOKENS = CalibrationConfig(tokens=96, batch_blocks=2)
CONFIG = ExpertWeaver(experts=8, active=0.75, segments=6)


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stats") / "of-deep"
    return calibrate(dense_model(DEEP), make_text(), ("inputs",), TOKENS, directory)


@torch.no_grad()
def test_activity_counts_the_largest_neurons_of_each_token():
    ffn = read_all(dense_model(Case("llama", {"mlp_bias": True})))[0]
    h_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    # 48 neurons: the largest tenth are 5 of a token. Seven tokens in segments of 3, 2 and 2.
    got_GF = activity(ffn, h_TD, 0.1, 3)
    gate_TF = h_TD.float() @ ffn.gate_FD.T + ffn.gate_bias_F
    up_TF = h_TD.float() @ ffn.up_FD.T + ffn.up_bias_F
    value_TF = (gate_TF * gate_TF.sigmoid() * up_TF).abs()
    on_TF = value_TF >= value_TF.topk(5).values[:, -1:]
    for row_F, segment in zip(got_GF, (slice(0, 3), slice(3, 5), slice(5, 7)), strict=True):
        torch.testing.assert_close(row_F, on_TF[segment].float().mean(0))


def test_no_more_segments_than_tokens():
    ffn = read_all(dense_model(LLAMA))[0]
    assert activity(ffn, torch.ones(2, 32), 1.0, 64).tolist() == [[1.0] * 48] * 2


def test_variation_by_hand():
    # Means 1/2, 1/2, 0; deviations 0, 1/2, 0.
    activity_GF = torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.0, 0.0]])
    assert variation(activity_GF).tolist() == [0.0, 1.0, float("inf")]


@pytest.mark.parametrize(
    ("mean", "shares"),
    # Parts of two neurons, three active, so at most two shared. The second neuron of a part speaks
    # for it: 2 and 4 in the first layer, 3 and 30 in the second.
    [(0.0, [0, 0]), (0.5, [1, 0]), (1.0, [1, 1]), (1.5, [2, 1]), (2.0, [2, 2]), (9.0, [2, 2])],
)
def test_shares_by_hand(mean, shares):
    layers = [
        torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]),
        torch.tensor([1.0, 3, 20, 30, 40, 50, 60, 70]),
    ]
    assert share_parts(layers, num_parts=4, num_active=3, mean=mean, adapt=1.0) == shares


@pytest.mark.parametrize(
    ("adapt", "shares"),
    # One bound gives 2, 0, 0, 2 of a mean of 1; half of the way are 1.5, 0.5, 0.5, 1.5, and the
    # parts that rounding down leaves go to the first of equals.
    [(0.0, [1, 1, 1, 1]), (0.5, [2, 1, 0, 1]), (1.0, [2, 0, 0, 2])],
)
def test_layers_differ_as_far_as_they_are_told(adapt, shares):
    low, high = torch.arange(8.0), 100 + torch.arange(8.0)
    layers = [low, high, high, low]
    assert share_parts(layers, num_parts=4, num_active=3, mean=1, adapt=adapt) == shares


@given(
    num_layers=st.integers(1, 5),
    num_active=st.integers(1, 6),
    shared=st.floats(0, 0.99),
    adapt=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_shares_meet_the_mean(num_layers, num_active, shared, adapt, seed):
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.rand(12, generator=draw) for _ in range(num_layers)]
    layers[0][:9] = torch.inf
    mean = shared * num_active
    shares = share_parts(layers, num_parts=6, num_active=num_active, mean=mean, adapt=adapt)
    assert all(0 <= share < num_active for share in shares)
    assert sum(shares) == min(round(mean * num_layers), (num_active - 1) * num_layers)


@torch.no_grad()
def test_layers_share_what_is_universal_and_meet_the_budget(stats):
    dense, ids = dense_model(DEEP), random_ids()
    want = dense(ids).logits
    activities = [
        activity(ffn, stats.layer(i)["inputs.h_TD"], CONFIG.marked, CONFIG.segments)
        for i, ffn in enumerate(read_all(dense))
    ]
    gates = [ffn.gate_FD.clone() for ffn in read_all(dense)]
    model, results = convert_expertweaver(dense, stats, CONFIG)
    layers = moe_layers(model)
    # Six of eight parts are active, half of them shared: 3 of 8 in the mean of 4 layers.
    shares = [layer.config.shared_width // 6 for layer in layers]
    assert sum(shares) == 12
    assert results["shared_per_layer"] == [share / 8 for share in shares]
    assert all(0 < error < 2 for error in results["error_per_layer"])
    with record_use(model) as uses:
        model(ids)
    fractions_T = token_fractions(model, uses, 48)
    torch.testing.assert_close(fractions_T, torch.full_like(fractions_T, 0.75))
    for layer, share, activity_GF, gate_FD in zip(layers, shares, activities, gates, strict=True):
        assert layer.router.config.top_k == 6 - share
        # The shared neurons vary least.
        order_F = variation(activity_GF).argsort(stable=True)[: 6 * share].sort().values
        if share:
            torch.testing.assert_close(layer.shared.gate_up_proj[0].chunk(2)[0], gate_FD[order_F])
        mean_ED = layer.experts.gate_up_proj.chunk(2, dim=1)[0].mean(1)
        torch.testing.assert_close(layer.router.weight, mean_ED)
    with all_experts_on(model):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_active_is_the_dense_model(stats):
    dense, ids = dense_model(DEEP), random_ids()
    want = dense(ids).logits
    model, _ = convert_expertweaver(dense, stats, ExpertWeaver(experts=4, active=1.0, segments=6))
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


class CutAfterOne:
    """Ends a conversion after its first layer, whatever came before."""

    def __init__(self):
        self.name = ""

    def stage(self, name, total, unit):
        self.name = name
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def advance(self, n=1.0):
        if self.name == "convert":
            raise Killed


def test_an_interrupted_conversion_goes_on(stats, tmp_path):
    whole, results = convert_expertweaver(dense_model(DEEP), stats, CONFIG)
    with pytest.raises(Killed):
        convert_expertweaver(
            dense_model(DEEP), stats, CONFIG, store=tmp_path, progress=CutAfterOne()
        )
    assert [path.name for path in tmp_path.iterdir()] == ["layer_000.safetensors"]
    again, same = convert_expertweaver(dense_model(DEEP), stats, CONFIG, store=tmp_path)
    same_state(whole, again)
    assert whole.config.moesaic == again.config.moesaic
    assert same == results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.7}, r"active must be a whole number of 16 experts, got 0.7; the nearest"),
        ({"active": float("nan")}, r"active must be in \(0, 1\], got nan"),
        ({"shared": 1.0}, r"shared must be in \[0, 1\), got 1.0"),
        ({"adapt": -0.1}, r"adapt must be in \[0, 1\], got -0.1"),
        ({"marked": 0.0}, r"marked must be in \(0, 1\], got 0.0"),
        ({"segments": 1}, r"segments must be at least 2, got 1"),
        ({"experts": 0}, r"experts must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
    ],
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(InputError, match=message):
        ExpertWeaver(**options)


def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(stats):
    dense = dense_model(DEEP)
    with pytest.raises(
        InputError, match=r"experts=5 does not divide the FFN width 48; the nearest"
    ):
        convert_expertweaver(dense, stats, ExpertWeaver(experts=5, active=0.8))
    with pytest.raises(InputError, match="expertweaver with these settings needs calibration of"):
        convert_expertweaver(dense, None, CONFIG)
    with pytest.raises(InputError, match=r"measured on 4 layers, the model has 2; calibrate this"):
        convert_expertweaver(dense_model(LLAMA), stats, CONFIG)
    assert not moe_layers(dense)
    with pytest.raises(InputError, match="expertweaver needs a gated network, this one is plain"):
        convert_expertweaver(dense_model(Case("opt", {})), None, CONFIG)
