"""Wanda: its score, its zeros, and what it is when all inputs are of one size."""

import pytest
import torch
from compression_cases import LLAMA, logits, measure
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import Case, dense_model
from sequence_cases import prune_by_hand

from moesaic._errors import InputError
from moesaic.compression.pruning.wanda import Wanda, cut_rows, prune_wanda
from moesaic.nn.layer import moe_layers


def test_score_by_hand():
    weight_RC = torch.tensor([[4.0, -1.0, 2.0, 3.0], [0.5, 6.0, -5.0, 1.0]])
    norm_C = torch.tensor([1.0, 8.0, 3.0, 1.0])
    # Scores: 4, 8, 6, 3 and 0.5, 48, 15, 1.
    want = [[0.0, -1.0, 2.0, 0.0], [0.0, 6.0, -5.0, 0.0]]
    assert cut_rows(weight_RC, norm_C, 0.5).tolist() == want
    assert cut_rows(weight_RC, norm_C, 0.75)[0].tolist() == [4.0, -1.0, 2.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    active=st.floats(0.01, 1.0),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 99),
)
def test_every_row_has_the_same_zeros(rows, columns, active, levels, seed):
    """The card's check, ties included; what stays is as it was and scores at least as high."""
    draw = torch.Generator().manual_seed(seed)
    weight_RC = torch.randint(1, levels + 1, (rows, columns), generator=draw).float()
    norm_C = torch.randint(1, 4, (columns,), generator=draw).float()
    cut_RC = cut_rows(weight_RC, norm_C, active)
    num_kept = round(active * columns)
    kept_RC = cut_RC != 0
    assert kept_RC.sum(1).tolist() == [num_kept] * rows
    assert torch.equal(cut_RC[kept_RC], weight_RC[kept_RC])
    score_RC = weight_RC * norm_C
    for score_C, kept_C in zip(score_RC, kept_RC, strict=True):
        if 0 < num_kept < columns:
            assert score_C[kept_C].min() >= score_C[~kept_C].max()


def test_equal_inputs_reduce_it_to_magnitude():
    """The card's check."""
    draw = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(20, 33, generator=draw)
    got = cut_rows(weight_RC, torch.full((33,), 7.3), 0.4)
    least = weight_RC.abs().topk(13, dim=1).values[:, -1:]
    assert torch.equal(got, torch.where(weight_RC.abs() >= least, weight_RC, 0.0))


def by_the_paper(active):
    def cut(weight_RC, x_TC):
        score_RC = weight_RC.float().abs() * x_TC.norm(dim=0)
        num_kept = round(active * weight_RC.shape[1])
        least = score_RC.topk(num_kept, dim=1).values[:, -1:]
        return torch.where(score_RC >= least, weight_RC, 0.0)

    return cut


@pytest.mark.parametrize(
    "case",
    [LLAMA, Case("llama", {"mlp_bias": True}), *(Case(n, {}) for n in ("gpt2", "opt", "phi3"))],
    ids=str,
)
@pytest.mark.parametrize("active", [0.375, 0.7])
def test_layers_are_pruned_in_sequence(case, active, tmp_path):
    dense = dense_model(case)
    stats = measure(dense, tmp_path, Wanda().collectors())
    model, results = prune_wanda(dense, stats, Wanda(active=active))
    reference = prune_by_hand(case, by_the_paper(active))
    torch.testing.assert_close(logits(model), logits(reference))
    # 32 inputs and 48 neurons: rounded to whole weights of a row.
    up, down = round(active * 32) / 32, round(active * 48) / 48
    parts = [up, down] if case.model_type in ("gpt2", "opt") else [up, up, down]
    assert results["active"] == pytest.approx(sum(parts) / len(parts))


def test_zeros_of_a_layer(tmp_path):
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path, Wanda().collectors())
    model, _ = prune_wanda(dense, stats, Wanda(active=0.25))
    for moe in moe_layers(model):
        weights = moe.shared.weights()
        assert (weights.up[0].count_nonzero(dim=1) == 8).all()
        assert (weights.down[0].count_nonzero(dim=1) == 12).all()


def test_settings_out_of_bounds():
    with pytest.raises(InputError, match=r"active must be in \(0, 1\], got 1.5; 0.7 keeps 70%"):
        Wanda(active=1.5)
