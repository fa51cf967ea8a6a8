"""SparseGPT against plain inverses, magnitude pruning and the counts it promises."""

import pytest
import torch
from compression_cases import LLAMA, logits, measure
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import Case, dense_model
from sequence_cases import prune_by_hand

from moesaic._errors import InputError, RunError
from moesaic.compression.pruning.sparsegpt import SparseGPT, cut_columns, prune_sparsegpt
from moesaic.compression.pruning.wanda import cut_rows


def problem(rows, columns, seed=0, tokens=400):
    """A matrix and correlated inputs, [R, C] and [T, C]."""
    draw = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, columns, generator=draw)
    mix_CC = torch.randn(columns, columns, generator=draw) / columns**0.5
    scale_C = torch.rand(columns, generator=draw) * 3 + 0.1
    x_TC = torch.randn(tokens, columns, generator=draw) @ (mix_CC + torch.eye(columns)) * scale_C
    return weight_RC, x_TC


def hessian(x_TC):
    return 2 / len(x_TC) * x_TC.T @ x_TC


def by_plain_inverses(weight_RC, hessian_CC, config):
    """The method without its factorisation: an inverse for every set of columns that is left."""
    w_RC, h_CC = weight_RC.double().clone(), hessian_CC.double()
    dead_C = h_CC.diagonal() == 0
    w_RC[:, dead_C] = 0
    h_CC = h_CC + config.damping * h_CC.diagonal().mean() * torch.eye(len(h_CC)).double()
    left = [torch.linalg.inv(h_CC[i:, i:]) for i in range(len(h_CC))]
    spread_C = torch.stack([inverse[0, 0] for inverse in left])
    for start in range(0, len(h_CC), config.block):
        end = min(start + config.block, len(h_CC))
        score = (w_RC[:, start:end].square() / spread_C[start:end]).flatten()
        num_cut = score.numel() - round(config.active * score.numel())
        gone = torch.zeros(score.numel(), dtype=torch.bool)
        gone[score.argsort()[:num_cut]] = True
        gone_RB = gone.view(len(w_RC), -1)
        for i in range(start, end):
            lost_R = torch.where(gone_RB[:, i - start], w_RC[:, i], 0.0)
            # All that comes later moves; what is gone becomes zero in passing.
            w_RC[:, i:] -= lost_R[:, None] / spread_C[i] * left[i][0]
            w_RC[gone_RB[:, i - start], i] = 0.0
    return w_RC


@pytest.mark.parametrize(("rows", "columns", "block"), [(7, 12, 5), (9, 30, 128), (1, 16, 1)])
@pytest.mark.parametrize("active", [0.375, 0.7])
def test_equals_plain_inverses(rows, columns, block, active):
    weight_RC, x_TC = problem(rows, columns)
    config = SparseGPT(active=active, block=block)
    got = cut_columns(weight_RC, hessian(x_TC), config)
    want = by_plain_inverses(weight_RC, hessian(x_TC), config)
    assert torch.equal(got == 0, want == 0)
    torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 70),
    block=st.sampled_from([16, 128]),
    active=st.floats(0.01, 0.999),
    seed=st.integers(0, 99),
)
def test_every_block_has_its_zeros(rows, columns, block, active, seed):
    """The card's check: exact sparsity per block of columns."""
    weight_RC, x_TC = problem(rows, columns, seed)
    got = cut_columns(weight_RC, hessian(x_TC), SparseGPT(active=active, block=block))
    for piece in got.split(block, dim=1):
        assert int(piece.count_nonzero()) == round(active * piece.numel())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("active", [0.3, 0.5, 0.8])
def test_error_is_below_magnitude_and_wanda(seed, active):
    """The card's check, on correlated inputs: the output error is the least of the three."""
    weight_RC, x_TC = problem(40, 150, seed)
    exact = x_TC @ weight_RC.T

    def error(pruned_RC):
        return float((x_TC @ pruned_RC.T - exact).square().mean())

    got = error(cut_columns(weight_RC, hessian(x_TC), SparseGPT(active=active)))
    num_kept = round(active * weight_RC.numel())
    least = weight_RC.abs().flatten().topk(num_kept).values[-1]
    assert got < error(torch.where(weight_RC.abs() >= least, weight_RC, 0.0))
    assert got < error(cut_rows(weight_RC, x_TC.norm(dim=0), active))


def test_plain_hessian_reduces_it_to_magnitude_without_update():
    """The card's check."""
    weight_RC, _ = problem(10, 150)
    got = cut_columns(weight_RC, torch.eye(150), SparseGPT(active=0.4))
    for piece, given_RB in zip(got.split(128, dim=1), weight_RC.split(128, dim=1), strict=True):
        num_kept = round(0.4 * piece.numel())
        least = given_RB.abs().flatten().topk(num_kept).values[-1]
        assert torch.equal(piece, torch.where(given_RB.abs() >= least, given_RB, 0.0))


def test_dead_inputs_are_cut_first():
    weight_RC, x_TC = problem(6, 20)
    x_TC[:, [3, 11]] = 0.0
    # Of 120 weights 12 read nothing: at 0.6 they are among those that go, at 0.95 more than them.
    for active, num_kept in ((0.6, 72), (0.95, 108)):
        got = cut_columns(weight_RC, hessian(x_TC), SparseGPT(active=active))
        assert (got[:, [3, 11]] == 0).all()
        assert int(got.count_nonzero()) == num_kept
        assert got.isfinite().all()
    # At full width nothing is cut: an input that slept through the calibration may wake up.
    assert torch.equal(cut_columns(weight_RC, hessian(x_TC), SparseGPT(active=1.0)), weight_RC)


def test_half_precision_is_computed_in_full():
    weight_RC, x_TC = problem(8, 40)
    weight_RC = weight_RC.bfloat16()
    config = SparseGPT(active=0.5)
    got = cut_columns(weight_RC, hessian(x_TC), config)
    want = cut_columns(weight_RC.float(), hessian(x_TC), config)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())


def test_hessian_without_inverse():
    with pytest.raises(
        RunError, match=r"Hessian of a layer has no inverse with damping=0.01; raise it, or cal"
    ):
        cut_columns(torch.ones(2, 3), torch.diag(torch.tensor([1.0, -9.0, 1.0])), SparseGPT())


@pytest.mark.parametrize(
    "case",
    [LLAMA, Case("llama", {"mlp_bias": True}), *(Case(n, {}) for n in ("gpt2", "opt", "phi3"))],
    ids=str,
)
def test_layers_are_pruned_in_sequence(case, tmp_path):
    config = SparseGPT(active=0.5, block=16)
    dense = dense_model(case)
    stats = measure(dense, tmp_path, config.collectors())
    model, results = prune_sparsegpt(dense, stats, config)
    reference = prune_by_hand(case, lambda w, x: cut_columns(w, hessian(x), config))
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-3, atol=1e-3)
    assert results["active"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0"),
        ({"block": 0}, r"block must be at least 1 and damping above 0, got 0 and 0.01; 128 and"),
        ({"damping": 0.0}, r"block must be at least 1 and damping above 0, got 128 and 0.0"),
    ],
    ids=str,
)
def test_settings_out_of_bounds(options, message):
    with pytest.raises(InputError, match=message):
        SparseGPT(**options)
