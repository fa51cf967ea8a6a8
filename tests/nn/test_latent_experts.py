"""Mixture of Latent Experts, arXiv 2503.23100: factors, errors, weights, sharing."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import make_layer, tokens

from moesaic._errors import InputError
from moesaic.compression.factorization.latent_experts import (
    LatentExperts,
    factorise,
    latent_experts,
)
from moesaic.nn.experts._base import ExpertsConfig
from moesaic.nn.experts.gated import GatedExperts
from moesaic.nn.experts.latent import LatentExpertsConfig, LatentGatedExperts
from moesaic.nn.experts.plain import PlainExperts
from moesaic.nn.routing import Routing

E, F, D = 6, 5, 17


def ordinary(bias=False, kind=GatedExperts):
    experts = kind(D, E, F, ExpertsConfig(bias=bias, down_bias=bias)).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[-1])
    return experts


def latent(seed=0, **options):
    experts = LatentGatedExperts(D, E, F, LatentExpertsConfig(**options)).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / 3)
    return experts


def routing(ids):
    ids_TK = torch.tensor(ids)
    weights_TK = torch.linspace(0.5, 1.5, ids_TK.numel()).reshape(ids_TK.shape).double()
    return Routing(ids_TK, weights_TK * (ids_TK < E), torch.zeros(len(ids), E), E)


def brought(**options):
    return latent_experts(ordinary(), LatentExperts(**options))


def test_an_expert_by_hand():
    experts, h_TD = latent(group_size=3), tokens(4, D, dtype=torch.float64)
    routed = routing([[0, 4], [5, E], [3, 1], [E, E]])
    expected = torch.zeros(4, D, dtype=torch.float64)
    for t, expert, place in ((0, 0, 0), (0, 4, 1), (1, 5, 0), (2, 3, 0), (2, 1, 1)):
        z_gate, z_up = experts.gate_up_common[expert // 3] @ h_TD[t]
        gate = experts.gate_up_private[expert, 0] @ z_gate
        up = experts.gate_up_private[expert, 1] @ z_up
        out = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
        expected[t] += out * routed.weights_TK[t, place]
    torch.testing.assert_close(experts(h_TD, routed), expected)


@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_experts_that_have_the_form_are_recovered(group_size, bias):
    made = latent(group_size=group_size, bias=bias, down_bias=bias)
    plain = ordinary(bias)
    with torch.no_grad():
        plain.gate_up_proj.copy_(made.weights().up)
        plain.down_proj.copy_(made.down_proj)
    found, errors = latent_experts(plain, LatentExperts(group_size=group_size))
    assert errors["error"] < 1e-8
    h_TD, routed = (
        tokens(9, D, dtype=torch.float64),
        routing([[t % E, (t + 2) % E] for t in range(9)]),
    )
    torch.testing.assert_close(found(h_TD, routed), plain(h_TD, routed))


@settings(max_examples=20, deadline=None)
@given(
    group_size=st.sampled_from([1, 2, 3, 6]),
    latent_width=st.integers(1, D),
    rank=st.integers(1, F),
    seed=st.integers(0, 2**31),
)
def test_errors_are_the_singular_values_left_out(group_size, latent_width, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    matrices = torch.randn(E, F, D, generator=draw, dtype=torch.float64)
    found = factorise(matrices, group_size, latent_width)
    stacks = matrices.reshape(E // group_size, group_size * F, D)
    left_out = torch.linalg.svdvals(stacks)[:, latent_width:].square().sum()
    assert found.error == pytest.approx(float(left_out), rel=1e-5, abs=1e-9)
    assert found.rank_error == 0.0
    # The two phases at once: neither error hides the other.
    both = factorise(matrices, group_size, latent_width, rank)
    lost = torch.linalg.svdvals(matrices)[:, rank:].square().sum()
    assert both.rank_error == pytest.approx(float(lost), rel=1e-5, abs=1e-9)
    product = both.private @ both.common.repeat_interleave(group_size, 0)
    assert both.error == pytest.approx(float((product - matrices).square().sum()), abs=1e-9)
    eye = torch.eye(latent_width, dtype=torch.float64).expand(len(both.common), -1, -1)
    torch.testing.assert_close(both.common @ both.common.transpose(1, 2), eye)


def test_wider_spaces_fit_better_and_larger_groups_worse():
    matrices = torch.randn(E, F, D, generator=torch.Generator().manual_seed(1)).double()
    errors = torch.tensor(
        [[factorise(matrices, n, m).error for m in range(1, D + 1)] for n in (1, 2, 3, 6)]
    )
    assert (errors.diff(dim=1) <= 1e-9).all()
    # Groups of one lie within those of two or three, and these within those of six.
    for smaller, larger in ((0, 1), (0, 2), (1, 3), (2, 3)):
        assert (errors[smaller] <= errors[larger] + 1e-9).all()
    assert errors[0, F - 1] < 1e-9 < errors[3, F - 1]


@pytest.mark.parametrize(("group_size", "latent_width"), [(1, 5), (2, 5), (3, 4), (6, 17)])
def test_weights_are_counted(group_size, latent_width):
    experts = LatentGatedExperts(
        D, E, F, LatentExpertsConfig(group_size=group_size, latent_width=latent_width)
    )
    count = sum(parameter.numel() for parameter in experts.parameters())
    groups = E // group_size
    of_group = 2 * (latent_width * D + group_size * F * latent_width)
    assert count == of_group * groups + E * F * D
    assert count == experts.num_experts * experts.own_weights() + experts.common_weights()


def test_no_saving_is_said(caplog):
    def warned(latent_width):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            LatentGatedExperts(D, E, F, LatentExpertsConfig(latent_width=latent_width))
        return "no fewer weights" in caplog.text

    # Groups of two: 2 F D / (D + 2 F) = 6.3.
    assert not warned(6)
    assert warned(7)


def test_a_projection_is_computed_once_for_a_token_and_group(monkeypatch):
    rows = []
    einsum = torch.einsum

    def counted(equation, *operands):
        if equation == "td,amd->atm":
            rows.append(len(operands[0]))
        return einsum(equation, *operands)

    monkeypatch.setattr(torch, "einsum", counted)
    # Groups of its experts by token: {0}, {0, 2}, {0, 1, 2}, none.
    latent()(tokens(4, D, dtype=torch.float64), routing([[0, 1, E], [1, 4, 5], [0, 2, 4], [E] * 3]))
    assert rows == [3, 1, 2]


def test_every_factor_learns():
    experts = latent()
    experts(
        tokens(4, D, dtype=torch.float64), routing([[0, 1], [2, 3], [4, 5], [0, E]])
    ).sum().backward()
    assert all(parameter.grad.any() for parameter in experts.parameters())


def test_in_a_layer_what_is_always_on_is_ordinary():
    moe = make_layer(
        "topk-softmax",
        experts="latent-gated",
        experts_options={"group_size": 3, "latent_width": 4},
        shared_width=3,
    )
    assert isinstance(moe.experts, LatentGatedExperts)
    assert moe.experts.gate_up_common.shape == (2, 2, 4, 17)
    assert type(moe.shared) is GatedExperts
    h_TD = tokens(9, dtype=torch.float64)
    moe.experts.backend = "reference"
    expected = moe(h_TD)
    moe.experts.backend = "auto"
    torch.testing.assert_close(moe(h_TD), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LatentExpertsConfig(group_size=0), r"group_size must be at least 1, got 0"),
        (lambda: LatentExpertsConfig(latent_width=-1), r"latent_width must be at least 0, got -1"),
        (lambda: latent(group_size=4), r"group_size must divide num_experts=6, got 4; choose a"),
        (lambda: brought(latent_width=18), r"latent_width must be in \[1, dim=17\], got 18; lower"),
        (lambda: brought(rank=6), r"rank must be in \[0, 5\], got 6; 0 cuts nothing"),
        (lambda: brought(group_size=4), r"group_size must divide num_experts=6, got 4; choose a"),
        (lambda: LatentExperts(group_size=0), r"group_size must be at least 1, got 0; 2 is usual"),
        (lambda: LatentExperts(latent_width=-1), r"latent_width must be at least 0, got -1; 0 is"),
        (lambda: LatentExperts(rank=-1), r"rank must be at least 0, got -1; 0 cuts nothing"),
        (
            lambda: latent_experts(ordinary(kind=PlainExperts), LatentExperts()),
            r"are made of gated ones, got PlainExperts; convert with gated experts",
        ),
        (
            lambda: latent_experts(latent(), LatentExperts()),
            r"LatentGatedExperts are latent already; give the model that they were made of",
        ),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(InputError, match=message):
        make()
