"""CMoE, arXiv 2502.04416: the cut by marks, the router's rows, exactness and refusals."""

import numpy as np
import pytest
import torch
from calibration_cases import LLAMA, Killed, Watch, make_text
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import Case, dense_model, random_ids, read_all, same_state
from scipy.optimize import linear_sum_assignment

from moesaic._errors import InputError
from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.conversion.cmoe import CMoE, convert_cmoe, cut_by_marks, strongest_neurons
from moesaic.nn.layer import all_experts_on, moe_layers, record_routing

TOKENS = CalibrationConfig(tokens=96, batch_blocks=2)
CONFIG = CMoE(experts=4, active=0.5)


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stats") / "of-llama"
    return calibrate(dense_model(LLAMA), make_text(), ("inputs",), TOKENS, directory)


def test_cut_by_hand():
    # Marks of each token. Counts: neuron 0 has 7, 7 has 5; 2, 3 and 4 have 4, 5 and 6 have 3, 1
    # has 2. So 0 and 7 are shared, 2 and 3 the seeds.
    marks_TK = torch.tensor(
        [
            [2, 1, 5, 0],
            [2, 1, 5, 0],
            [2, 5, 0, 7],
            [2, 0, 7, 6],
            [4, 3, 6, 0],
            [4, 3, 6, 7],
            [4, 0, 7, 3],
            [0, 7, 3, 4],
        ]
    )
    # Tokens of 1: 0, 1; of 2: 0-3; of 3 and 4: 4-7; of 5: 0-2; of 6: 3-5. Distance to seeds 2 and
    # 3: neuron 1 has 2 and 6, 4 has 8 and 0, 5 has 1 and 7, 6 has 5 and 3.
    # Means of 1, 2, 5 over tokens 0-3: 1, 1, 2/3, 1/3. Distances: 1, 1, 2/3, so 5 represents.
    # Means of 3, 4, 6 over tokens 3-7: 1/3, 1, 1, 2/3, 2/3. Distances: 1, 1, 2, so 3, the first.
    cut = cut_by_marks(marks_TK, 8, shared_width=2, num_experts=2)
    assert cut.order_F.tolist() == [0, 7, 1, 2, 5, 3, 4, 6]
    assert cut.representative_E.tolist() == [5, 3]


@settings(max_examples=25, deadline=None)
@given(
    num_experts=st.integers(1, 4),
    width=st.integers(1, 5),
    shared=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_cut_is_the_reference(num_experts, width, shared, seed):
    num_neurons = width * (num_experts + shared)
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, num_neurons + 1))
    # Some neurons are far likelier than others, as in a network.
    keys = rng.random((30, num_neurons)) * rng.random(num_neurons) ** 3
    marks_TK = torch.from_numpy(np.argsort(-keys, axis=1)[:, :count].copy())
    cut = cut_by_marks(marks_TK, num_neurons, shared_width=shared * width, num_experts=num_experts)
    # The paper's matrices, written out.
    marker_TF = torch.zeros(30, num_neurons).scatter(1, marks_TK, 1.0).numpy()
    rate_F = marker_TF.mean(0)
    ranked_F = np.argsort(-rate_F, kind="stable")
    assert sorted(cut.order_F.tolist()) == list(range(num_neurons))
    always, routed = cut.order_F[: shared * width], cut.order_F[shared * width :]
    assert set(always.tolist()) == set(ranked_F[: shared * width].tolist())
    seeds = ranked_F[shared * width :][:num_experts]
    rest = np.sort(ranked_F[shared * width :])
    cost = np.abs(marker_TF[:, rest, None] - marker_TF[:, None, seeds]).sum(0)
    repeated = np.repeat(cost, width, axis=1)
    rows, columns = linear_sum_assignment(repeated)
    place = {neuron: i for i, neuron in enumerate(rest.tolist())}
    got = sum(cost[place[neuron], i // width] for i, neuron in enumerate(routed.tolist()))
    assert got == pytest.approx(repeated[rows, columns].sum())
    for expert, members in enumerate(routed.reshape(num_experts, width).numpy()):
        mean_T1 = marker_TF[:, members].mean(1, keepdims=True)
        distance_M = np.abs(marker_TF[:, members] - mean_T1).sum(0)
        representative = int(cut.representative_E[expert])
        assert representative in members
        chosen = distance_M[members.tolist().index(representative)]
        assert chosen == pytest.approx(distance_M.min(), abs=1e-5)


@torch.no_grad()
def test_marks_are_the_largest_normalised_neurons():
    ffn = read_all(dense_model(LLAMA))[0]
    h_TD = torch.randn(1100, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    marks_TK = strongest_neurons(ffn, h_TD, 5)
    h, gate, up = (x.float() / x.float().norm(dim=1, keepdim=True) for x in (h_TD, *ffn[:2]))
    value_TF = torch.nn.functional.silu(h @ gate.T) * (h @ up.T)
    assert torch.equal(marks_TK, value_TF.abs().topk(5).indices)


@torch.no_grad()
@pytest.mark.parametrize("case", [LLAMA, Case("gemma2", {}), Case("phi3", {})], ids=str)
def test_all_active_is_the_dense_model_without_training(case, tmp_path):
    dense, ids = dense_model(case), random_ids()
    want = dense(ids).logits
    stats = calibrate(dense, make_text(), ("inputs",), TOKENS, tmp_path)
    model, results = convert_cmoe(dense, stats, CMoE(experts=4, active=1.0))
    layer = moe_layers(model)[0]
    assert (layer.config.num_experts, layer.router.config.top_k) == (2, 2)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert max(results["error_per_layer"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "shared", "routed", "top_k"),
    [
        (CMoE(experts=4, active=0.5), 1, 3, 1),
        (CMoE(experts=4, active=0.75), 1, 3, 2),
        (CMoE(experts=4, active=0.75, shared=2), 2, 2, 1),
        (CMoE(experts=8, active=0.5, shared=0), 0, 8, 4),
    ],
)
def test_cut_is_complete_and_every_token_uses_what_was_asked(config, shared, routed, top_k, stats):
    dense, ids = dense_model(LLAMA), random_ids()
    want = dense(ids).logits
    model, results = convert_cmoe(dense, stats, config)
    width = 48 // config.experts
    for layer in moe_layers(model):
        assert layer.config.num_experts == routed
        assert layer.config.shared_width == shared * width
    with record_routing(model) as routings:
        model(ids)
    for routing in routings:
        assert (routing.active_T() == top_k).all()
        assert torch.equal(routing.weights_TK, torch.ones(ids.numel(), top_k))
    with all_experts_on(model):
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert all(0 < error < 2 for error in results["error_per_layer"])


@torch.no_grad()
def test_a_router_row_is_a_neuron_of_its_expert_at_unit_length(stats):
    model, _ = convert_cmoe(dense_model(LLAMA), stats, CONFIG)
    for layer in moe_layers(model):
        gate, up = layer.experts.gate_up_proj.chunk(2, dim=1)
        unit = torch.nn.functional.normalize
        for expert in range(3):
            is_gate = torch.isclose(unit(gate[expert], dim=1), layer.router.gate[expert])
            is_up = torch.isclose(unit(up[expert], dim=1), layer.router.weight[expert])
            assert (is_gate.all(1) & is_up.all(1)).sum() == 1
        assert not layer.router.scale.any()
        assert not layer.router.balance.any()


def test_an_interrupted_conversion_goes_on(stats, tmp_path):
    whole, results = convert_cmoe(dense_model(LLAMA), stats, CONFIG)
    with pytest.raises(Killed):
        convert_cmoe(dense_model(LLAMA), stats, CONFIG, store=tmp_path, progress=Watch(0))
    assert [path.name for path in tmp_path.iterdir()] == ["layer_000.safetensors"]
    again, same = convert_cmoe(dense_model(LLAMA), stats, CONFIG, store=tmp_path)
    same_state(whole, again)
    assert same == results


def test_paper_preset_is_s2a2e16():
    paper = CMoE.presets()["paper"]
    assert (paper.experts, paper.num_shared, paper.top_k, paper.marks) == (16, 2, 2, 10)
    # S1A2E8, the paper's at three eighths, is what the default proportion gives.
    eighths = CMoE(experts=8, active=3 / 8)
    assert (eighths.num_shared, eighths.top_k) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.7}, r"active must be a whole number of 16 experts, got 0.7; the nearest"),
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0"),
        ({"experts": 0}, r"experts must be at least 1, got 0"),
        ({"marks": 0}, r"marks must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        (
            {"shared": 12},
            r"shared must be in \[0, 12\), below the 12 of 16 experts that active=0.75",
        ),
        ({"bias_step": -0.1}, r"bias_step must be at least 0, got -0.1"),
    ],
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(InputError, match=message):
        CMoE(**options)


def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(stats):
    dense = dense_model(LLAMA)
    with pytest.raises(
        InputError, match=r"experts=5 does not divide the FFN width 48; the nearest"
    ):
        convert_cmoe(dense, stats, CMoE(experts=5, active=0.8))
    with pytest.raises(InputError, match=r"marks must be at most the FFN width 48, got 49"):
        convert_cmoe(dense, stats, CMoE(experts=4, marks=49))
    with pytest.raises(InputError, match="cmoe with these settings needs calibration of inputs"):
        convert_cmoe(dense, None, CONFIG)
    assert not moe_layers(dense)
    with pytest.raises(InputError, match="cmoe needs a gated network, this one is plain"):
        convert_cmoe(dense_model(Case("opt", {})), stats, CONFIG)
