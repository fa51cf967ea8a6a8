"""Native experts whose gates and neurons have thresholds, against the reference."""

from __future__ import annotations

import pytest
import torch

from moesaic._errors import InputError
from moesaic.ops.cpu import library
from moesaic.ops.cpu.packed import PackedExperts, has_dot
from moesaic.ops.reference import experts_reference
from moesaic.ops.weights import ExpertWeights, Thresholds

E, K = 5, 3
pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
HAS_DOT = not library.why_not() and has_dot()
# Widths and sizes that fill registers and steps, and some that do not.
sizes = pytest.mark.parametrize(
    ("dim", "width"), [(64, 16), (576, 16), (40, 24), (7, 3)], ids=lambda n: str(n)
)
kinds = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
counts = pytest.mark.parametrize("num_tokens", [0, 1, 2, 13, 63])


def make(dim, width, *, gated=True, bias=True, activation="silu", dtype=torch.float32):
    draw = torch.Generator().manual_seed(dim + width)
    rows = 2 * width if gated else width

    def normal(*shape):
        return (torch.randn(*shape, generator=draw) * dim**-0.5).to(dtype)

    neuron_EF, gate_EF = torch.rand(2, E, width, generator=draw) * 0.3
    return ExpertWeights(
        up=normal(E, rows, dim) * 2,
        down=normal(E, dim, width) * 4,
        activation=activation,
        gated=gated,
        up_bias=normal(E, rows) if bias else None,
        down_bias=normal(E, dim) if bias else None,
        thresholds=Thresholds(torch.tensor(0.0), neuron_EF, gate_EF if gated else None),
    )


def slots(num_tokens, dim, dtype=torch.float32):
    draw = torch.Generator().manual_seed(num_tokens)
    h_TD = torch.randn(num_tokens, dim, generator=draw).to(dtype)
    ids_TK = torch.rand(num_tokens, E, generator=draw).argsort(1)[:, :K]
    # Some slots hold no expert.
    ids_TK = ids_TK.where(torch.rand(num_tokens, K, generator=draw) < 0.8, E)
    return h_TD, ids_TK, torch.rand(num_tokens, K, generator=draw)


def reference(weights, h_TD, ids_TK, weights_TK):
    return experts_reference(h_TD, ids_TK, weights_TK, weights)


@sizes
@kinds
@counts
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_result_is_that_of_the_reference(dim, width, gated, num_tokens, bias):
    weights, call = make(dim, width, gated=gated, bias=bias), slots(num_tokens, dim)
    want_TD = reference(weights, *call)
    torch.testing.assert_close(PackedExperts(weights)(*call), want_TD, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "quick_gelu"])
def test_every_activation(activation):
    weights, call = make(64, 16, activation=activation), slots(13, 64)
    want_TD = reference(weights, *call)
    torch.testing.assert_close(PackedExperts(weights)(*call), want_TD, rtol=2e-5, atol=2e-5)


@sizes
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "int8"])
def test_a_token_alone_is_a_token_among_others_to_the_last_bit(dim, width, weight_format):
    weights = make(dim, width)
    packed, (h_TD, ids_TK, weights_TK) = PackedExperts(weights, weight_format), slots(29, dim)
    together_TD = packed(h_TD, ids_TK, weights_TK)
    for t in range(29):
        alone = packed(h_TD[t : t + 1], ids_TK[t : t + 1], weights_TK[t : t + 1])
        assert torch.equal(alone[0], together_TD[t])


@counts
def test_bfloat16_weights_are_only_stored_so(num_tokens):
    weights, call = make(64, 16), slots(num_tokens, 64)
    rounded = weights._replace(
        up=weights.up.bfloat16().float(), down=weights.down.bfloat16().float()
    )
    packed = PackedExperts(weights, "bfloat16")
    torch.testing.assert_close(packed(*call), reference(rounded, *call), rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(not HAS_DOT, reason="no AVX512-BF16")
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_a_model_in_bfloat16_rounds_what_torch_rounds(num_tokens):
    weights = make(64, 16, dtype=torch.bfloat16, bias=False)
    h_TD, ids_TK, weights_TK = slots(num_tokens, 64, torch.bfloat16)
    exact = weights._replace(up=weights.up.float(), down=weights.down.float())
    want_TD = reference(exact, h_TD.float(), ids_TK, weights_TK)
    out_TD = PackedExperts(weights, "bfloat16-dot")(h_TD, ids_TK, weights_TK)
    assert out_TD.dtype == torch.bfloat16
    assert (out_TD.float() - want_TD).norm() < 0.01 * want_TD.norm()


@pytest.mark.parametrize("num_tokens", [1, 13])
def test_int8_is_near(num_tokens):
    weights, call = make(64, 16), slots(num_tokens, 64)
    want_TD = reference(weights, *call)
    out_TD = PackedExperts(weights, "int8")(*call)
    assert (out_TD - want_TD).norm() < 0.05 * want_TD.norm()


@pytest.mark.parametrize("num_tokens", [1, 13])
def test_infinite_thresholds_leave_the_bias_alone(num_tokens):
    weights, (h_TD, ids_TK, weights_TK) = make(64, 16), slots(num_tokens, 64)
    limits = weights.thresholds
    never = limits._replace(gate_EF=torch.full_like(limits.gate_EF, torch.inf))
    out_TD = PackedExperts(weights._replace(thresholds=never))(h_TD, ids_TK, weights_TK)
    weights_TE = torch.zeros(num_tokens, E + 1).scatter_add(1, ids_TK, weights_TK)[:, :E]
    torch.testing.assert_close(out_TD, weights_TE @ weights.down_bias)


def test_a_copy_is_none_once_a_threshold_changes():
    weights = make(64, 16)
    packed = PackedExperts(weights)
    assert packed.is_copy_of(weights)
    weights.thresholds.neuron_EF.add_(1.0)
    assert not packed.is_copy_of(weights)


def test_thresholds_of_inputs_are_refused():
    weights = make(64, 16)
    cut = weights._replace(thresholds=weights.thresholds._replace(input=torch.tensor(0.1)))
    with pytest.raises(
        InputError, match=r"an input threshold of 0.1 has no native code; convert with"
    ):
        PackedExperts(cut)
