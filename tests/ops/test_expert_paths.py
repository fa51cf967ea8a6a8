"""The fast expert paths against the reference: output and every gradient, by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as nnf
from expert_cases import Case, run

from moesaic.ops import grouped
from moesaic.ops.grouped import experts_grouped
from moesaic.ops.masked import experts_masked
from moesaic.ops.reference import experts_reference
from moesaic.ops.select import apply_experts, spread
from moesaic.ops.weights import ACTIVATIONS, activation

KINDS = [(gated, bias) for gated in (True, False) for bias in (False, True)]
CASES = [
    *(Case(T=T, gated=gated, bias=bias) for T in (0, 1, 63, 257) for gated, bias in KINDS),
    *(
        Case(gated=gated, bias=bias, pattern=pattern)
        for pattern in ("one-idle", "all-on-one", "some-empty", "all-empty")
        for gated, bias in KINDS
    ),
    *(Case(K=6, gated=gated, bias=bias, pattern="all-experts") for gated, bias in KINDS),
    # Rows of whole 16 bytes take the fused product; the odd ones above cannot.
    *(Case(T=T, D=24, F=16, gated=gated, bias=bias) for T in (1, 257) for gated, bias in KINDS),
    Case(D=24, F=16, pattern="one-idle"),
    Case(D=24, F=16, pattern="some-empty", bias=True),
    Case(E=1, K=1),
    Case(D=1, F=1, E=3, K=2),
]
FAST = ["masked", "grouped"]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_backend = pytest.mark.parametrize("backend", FAST)


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (error / size).item() if size else error.item()


@each_case
@each_backend
def test_equals_reference_in_float64(case, backend):
    inputs = case.inputs(torch.float64)
    actual = run(partial(apply_experts, backend=backend), inputs)
    expected = run(experts_reference, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda m, n=name: f"{n}: {m}")


@each_case
@each_backend
def test_equals_reference_in_float32(case, backend):
    inputs = case.inputs(torch.float32)
    actual = run(partial(apply_experts, backend=backend), inputs)
    expected = run(experts_reference, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@each_case
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_bfloat16_is_close_to_the_reference_in_float32(case, backend):
    actual, expected = [], []
    # The error of one token alone is no sample: draw enough of them.
    for seed in range(48 if case.T == 1 else 1):
        inputs = case.inputs(torch.bfloat16, seed)
        # Routers give float32 weights whatever the dtype of the model.
        inputs = inputs._replace(weights_TK=inputs.weights_TK.float())
        actual.append(run(partial(apply_experts, backend=backend), inputs))
        expected.append(run(experts_reference, inputs.to(torch.float32)))
    assert actual[0]["out"].dtype == torch.bfloat16
    assert actual[0]["weights"].dtype == torch.float32
    # Plain: four roundings of 1.6e-3 RMS (up, act, down, sum), within 5e-3. A gated network rounds
    # twice more and silu's slope amplifies the first; an added bias is one more.
    out_bound = 6e-3 if case.gated or case.bias else 5e-3
    for name in expected[0]:
        error = relative_rms(*(torch.cat([x[name] for x in xs]) for xs in (actual, expected)))
        assert error <= (out_bound if name == "out" else 1e-2), name


@pytest.mark.parametrize("path", [experts_reference, experts_grouped])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(path, bias):
    inputs = Case(T=5, D=3, E=4, K=2, F=2, bias=bias, pattern="some-empty").inputs(torch.float64)

    def function(h_TD, weights_TK, up, down, up_bias=None, down_bias=None):
        weights = inputs.weights._replace(up=up, down=down, up_bias=up_bias, down_bias=down_bias)
        return path(h_TD, inputs.ids_TK, weights_TK, weights)

    leaves = [inputs.h_TD, inputs.weights_TK, inputs.weights.up, inputs.weights.down]
    if bias:
        leaves += [inputs.weights.up_bias, inputs.weights.down_bias]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_of_masked(bias):
    case = Case(T=4, D=3, E=3, K=3, F=2, bias=bias)
    inputs = case.inputs(torch.float64)

    def function(h_TD, weights_TE, up, down, up_bias=None, down_bias=None):
        weights = inputs.weights._replace(up=up, down=down, up_bias=up_bias, down_bias=down_bias)
        return experts_masked(h_TD, weights_TE, weights)

    leaves = [inputs.h_TD, inputs.weights_TK, inputs.weights.up, inputs.weights.down]
    if bias:
        leaves += [inputs.weights.up_bias, inputs.weights.down_bias]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_without_gradients_the_output_is_the_same(backend):
    inputs = Case(pattern="some-empty").inputs(torch.float64)
    with torch.no_grad():
        out_TD = apply_experts(*inputs, backend=backend)
    assert not out_TD.requires_grad
    torch.testing.assert_close(out_TD, run(experts_reference, inputs)["out"])


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_pieces_of_a_long_batch_equal_the_whole(monkeypatch, rows, dtype):
    inputs = Case(D=24, F=16, bias=True, pattern="some-empty").inputs(dtype)
    whole = run(experts_grouped, inputs)
    monkeypatch.setattr(grouped, "_MAX_ROWS", rows)
    pieces = run(experts_grouped, inputs)
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows", [7, 32768])
def test_grouped_computes_the_held_slots_and_no_more(monkeypatch, rows):
    inputs = Case(pattern="some-empty").inputs(torch.float32)
    num_rows = []
    multiply = grouped._grouped_mm

    def count(x_NI, w_EOI, ends_E):
        num_rows.append(x_NI.shape[0])
        return multiply(x_NI, w_EOI, ends_E)

    monkeypatch.setattr(grouped, "_grouped_mm", count)
    monkeypatch.setattr(grouped, "_MAX_ROWS", rows)
    experts_grouped(*inputs)
    held = ((inputs.ids_TK >= 0) & (inputs.ids_TK < 6)).sum().item()
    assert 0 < held < inputs.ids_TK.numel()
    # Once for the up product, once for the down product.
    assert sum(num_rows[::2]) == sum(num_rows[1::2]) == held


def test_grouped_takes_the_fused_product_where_rows_are_aligned(monkeypatch):
    calls = []
    fused = nnf.grouped_mm
    monkeypatch.setattr(nnf, "grouped_mm", lambda *a, **k: calls.append(a) or fused(*a, **k))
    experts_grouped(*Case(D=17, F=5).inputs(torch.float32))
    experts_grouped(*Case(D=24, F=16).inputs(torch.float64))
    assert len(calls) == 0
    experts_grouped(*Case(D=24, F=16).inputs(torch.float32))
    assert len(calls) == 2


@each_backend
@pytest.mark.parametrize("h_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_multiplies_in_bfloat16_on_every_path(backend, h_dtype):
    inputs = Case(D=24, F=16, bias=True).inputs(torch.float32)
    inputs = inputs._replace(h_TD=inputs.h_TD.to(h_dtype))

    def autocast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return apply_experts(*args, backend=backend)

    actual = run(autocast, inputs)
    expected = run(experts_reference, inputs.to(torch.float32))
    for name, value in expected.items():
        # 1.5 times the bounds of bfloat16: the weights of the experts are rounded too.
        bound = 7.5e-3 if name == "out" else 1.5e-2
        assert 1e-4 < relative_rms(actual[name], value) <= bound, name


def test_reference_by_hand():
    # One token h = (1, 2), relu, plain, F = 1, E = 2.
    # Expert 0: up (3, 0) gives 3, down (1, -1) gives (3, -3).
    # Expert 1: up (0, -1) gives -2, relu gives 0.
    # Expert 1 with bias 5: relu(-2 + 5) = 3, down (0, 2) gives (0, 6), its bias makes it (1, 5).
    inputs = Case(T=1, D=2, E=2, K=2, F=1, gated=False, bias=True).inputs(torch.float32)
    weights = inputs.weights._replace(
        up=torch.tensor([[[3.0, 0.0]], [[0.0, -1.0]]]),
        down=torch.tensor([[[1.0], [-1.0]], [[0.0], [2.0]]]),
        activation="relu",
        up_bias=torch.tensor([[0.0], [5.0]]),
        down_bias=torch.tensor([[0.0, 0.0], [1.0, -1.0]]),
    )
    h_TD, weights_TK = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 2.0]])
    # Weights 0.5 and 2: (1.5, -1.5) + (2, 10).
    out_TD = experts_reference(h_TD, torch.tensor([[0, 1]]), weights_TK, weights)
    assert out_TD.tolist() == [[3.5, 8.5]]
    # An empty slot counts for nothing, whatever its weight: 2 * (3, -3).
    for empty in (2, -1):
        out_TD = experts_reference(h_TD, torch.tensor([[empty, 0]]), weights_TK, weights)
        assert out_TD.tolist() == [[6.0, -6.0]]


def test_gate_rows_come_before_up_rows():
    # gate = 2, up = 3: relu(2) * 3 = 6; the other way round, relu(3) * 2 is 6 too, so gate = -2.
    inputs = Case(T=1, D=1, E=1, K=1, F=1).inputs(torch.float32)
    weights = inputs.weights._replace(
        up=torch.tensor([[[-2.0], [3.0]]]), down=torch.ones(1, 1, 1), activation="relu"
    )
    one = torch.ones(1, 1)
    for backend in ("reference", *FAST):
        out_TD = apply_experts(one, torch.zeros(1, 1, dtype=torch.int64), one, weights, backend)
        assert out_TD.item() == 0.0  # relu(-2) * 3


def test_spread_drops_empty_slots():
    ids_TK = torch.tensor([[2, 0], [3, 1], [-1, 2]])
    values_TK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert spread(ids_TK, values_TK, 3).tolist() == [[2, 0, 1], [0, 4, 0], [0, 0, 6]]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 33)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))


def test_unknown_activation_names_the_closest():
    with pytest.raises(KeyError, match=r"activation 'slu' is unknown; did you mean .*silu"):
        activation("slu")
