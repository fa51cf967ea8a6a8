"""Each collector against the formula it stands for, and the memory it says it holds."""

import pytest
import torch
from calibration_cases import LLAMA
from model_cases import DIM, EXPERTS, WIDTH, Case, converted, dense_model, read_all
from torch import Tensor

from moesaic._errors import InputError, RunError
from moesaic.calibration.collectors import COLLECTORS, block_outputs
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers

T = 63
CASES = [
    LLAMA,
    Case("llama", {"mlp_bias": True}),
    Case("phi3", {}),
    Case("gpt2", {}),
    Case("opt", {}),
]


def inputs(num_tokens=T, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, DIM, generator=draw).to(dtype)


def collect(name, ffn, h_TD, chunk=T):
    collector = COLLECTORS[name](ffn)
    with torch.no_grad():
        for piece in h_TD.split(chunk):
            collector.update(piece)
        return collector.result()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_neurons(case):
    ffn = read_all(dense_model(case))[0]
    h_TD = inputs()
    got = collect("neurons", ffn, h_TD, chunk=10)
    exact = read_all(dense_model(case, torch.float64))[0]
    a_TF = exact.neurons(h_TD.double())
    norm_F = exact.down_DF.square().sum(0).sqrt()
    want = {
        "coactivation_FF": a_TF.abs().T @ a_TF.abs() / T,
        "activity_F": a_TF.abs().mean(0),
        "energy_F": (a_TF * norm_F).square().mean(0),
        "mean_F": a_TF.mean(0),
        "variance_F": a_TF.var(0, correction=0),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-4, atol=1e-6, msg=name)


def test_neurons_by_hand():
    """One token (1, 2); two neurons relu(h0) and relu(-h1); columns of length 5 and 1."""
    ffn = read_all(dense_model(LLAMA))[0]._replace(
        gate_FD=None,
        up_FD=torch.tensor([[1.0, 0.0], [0.0, -1.0]]),
        down_DF=torch.tensor([[3.0, 1.0], [4.0, 0.0]]),
        activation="relu",
    )
    got = collect("neurons", ffn, torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    # Values: (1, 0) and (3, 4).
    assert got["mean_F"].tolist() == [2.0, 2.0]
    assert got["variance_F"].tolist() == [1.0, 4.0]
    assert got["activity_F"].tolist() == [2.0, 2.0]
    assert got["energy_F"].tolist() == [125.0, 8.0]
    assert got["coactivation_FF"].tolist() == [[5.0, 6.0], [6.0, 8.0]]


def test_adjacency_by_hand():
    """Values |h|: groups of 8 tokens; what a group holds of a pair counts at most once."""
    ffn = read_all(dense_model(LLAMA))[0]._replace(
        gate_FD=None, up_FD=torch.eye(2), down_DF=torch.eye(2), activation="relu"
    )
    h_TD = torch.zeros(18, 2)
    # First group: 0.25 * 0.5 = 0.125 for the pair; squares 0.0625 + 4, which counts 1, and 0.25.
    h_TD[0] = torch.tensor([0.25, 0.5])
    h_TD[7] = torch.tensor([2.0, -1.0])
    # Second: 0.5 twice, which is 0.5; the last two tokens are a group: 3 * 4, which counts 1.
    h_TD[8] = h_TD[9] = torch.tensor([0.5, 0.5])
    h_TD[17] = torch.tensor([3.0, 4.0])
    got = collect("adjacency", ffn, h_TD)["adjacency_FF"]
    assert got.tolist() == [[1 + 0.5 + 1, 0.125 + 0.5 + 1], [0.125 + 0.5 + 1, 0.25 + 0.5 + 1]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjacency(case):
    ffn = read_all(dense_model(case))[0]
    a_TF = ffn.neurons(inputs()).abs()
    want = sum((g_TF.T @ g_TF).clamp(max=1.0) for g_TF in a_TF.split(8))
    torch.testing.assert_close(collect("adjacency", ffn, inputs(), 10)["adjacency_FF"], want)


def test_variance_is_never_negative():
    ffn = read_all(dense_model(LLAMA))[0]
    h_TD = inputs(1).expand(1000, DIM) * 30
    assert (collect("neurons", ffn, h_TD, chunk=100)["variance_F"] >= 0).all()


def test_inputs_are_kept_in_order():
    h_TD = inputs()
    got = collect("inputs", read_all(dense_model(LLAMA))[0], h_TD, chunk=10)
    assert torch.equal(got["h_TD"], h_TD.bfloat16())


def test_inputs_do_not_alias_the_buffer_of_the_walk():
    h_TD = inputs(dtype=torch.bfloat16)
    before = h_TD.clone()
    got = collect("inputs", read_all(dense_model(LLAMA))[0], h_TD)
    h_TD.zero_()
    assert torch.equal(got["h_TD"], before)


def test_moments():
    h_TD = inputs()
    got = collect("moments", read_all(dense_model(LLAMA))[0], h_TD, chunk=10)
    exact = h_TD.double()
    torch.testing.assert_close(got["mean_D"].double(), exact.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["second_DD"].double(), exact.T @ exact / T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_outputs_sum_to_the_network(case):
    moe = moe_layers(converted(case, torch.float64))[0]
    ffn = read_all(dense_model(case, torch.float64))[0]
    h_TD = inputs(dtype=torch.float64)
    with torch.no_grad():
        o_TED = block_outputs(h_TD, moe.experts.weights())
    assert o_TED.shape == (T, EXPERTS, DIM)
    want_TD = ffn.neurons(h_TD) @ ffn.down_DF.T
    torch.testing.assert_close(o_TED.sum(1), want_TD.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grams(case):
    moe = moe_layers(converted(case))[0]
    ffn = read_all(dense_model(case, torch.float64))[0]
    h_TD = inputs()
    got = collect("grams", moe, h_TD, chunk=10)["gram_EE"]
    a_TEF = ffn.neurons(h_TD.double()).unflatten(1, (EXPERTS, -1))
    o_TED = torch.einsum("tef,def->ted", a_TEF, ffn.down_DF.unflatten(1, (EXPERTS, -1)))
    want = torch.einsum("ted,tfd->ef", o_TED, o_TED) / T
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_routes():
    moe = moe_layers(converted(LLAMA))[0].eval()
    h_TD = inputs()
    got = collect("routes", moe, h_TD, chunk=10)
    with torch.no_grad():
        want = moe.router(h_TD)
    assert torch.equal(got["ids_TK"].long(), want.ids_TK)
    assert torch.equal(got["weights_TK"], want.weights_TK.bfloat16())


def test_expert_without_tokens_is_an_error():
    moe = moe_layers(converted(LLAMA, router_options={"bias": True}))[0].eval()
    with torch.no_grad():
        moe.router.bias[1:3] = -100.0
    with pytest.raises(
        RunError, match=r"experts \[1, 2\] saw none of 63 tokens; calibrate on more"
    ):
        collect("routes", moe, inputs())


@pytest.mark.parametrize("name", list(COLLECTORS))
def test_chunks_change_nothing(name):
    dense = name not in ("grams", "routes")
    source = read_all(dense_model(LLAMA))[0] if dense else moe_layers(converted(LLAMA))[0].eval()
    whole = collect(name, source, inputs())
    for chunk in (1, 20, 62):
        pieces = collect(name, source, inputs(), chunk)
        for key, value in whole.items():
            torch.testing.assert_close(pieces[key], value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["adjacency", "neurons", "grams", "routes"])
def test_wrong_kind_of_layer(name):
    plain = LayerConfig(num_experts=0, shared_width=WIDTH)
    source = MoELayer(DIM, plain)
    with pytest.raises(InputError, match=rf"collector '{name}' needs .*; (give|convert) the"):
        COLLECTORS[name](source)


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        # T is 7 groups and 7 tokens that are held.
        ("adjacency", 4 * WIDTH * (2 * WIDTH + 7)),
        ("inputs", 2 * T * DIM),
        ("moments", 4 * DIM * (DIM + 1)),
        ("neurons", 4 * WIDTH * (WIDTH + 4)),
        ("grams", 4 * EXPERTS * EXPERTS),
        ("routes", 4 * T * EXPERTS),
    ],
)
def test_memory_is_what_the_collector_says(name, num_bytes):
    dense = name not in ("grams", "routes")
    source = read_all(dense_model(LLAMA))[0] if dense else moe_layers(converted(LLAMA))[0].eval()
    collector = COLLECTORS[name](source)
    with torch.no_grad():
        for piece in inputs().split(10):
            collector.update(piece)
    held = 0
    for key, value in vars(collector).items():
        # The model itself is not the collector's.
        if key in ("ffn", "weights") and not isinstance(value, list):
            continue
        pieces = value if isinstance(value, list) else [value]
        held += sum(x.untyped_storage().nbytes() for x in pieces if isinstance(x, Tensor))
    assert held == num_bytes
