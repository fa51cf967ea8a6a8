"""A mixture whose experts are brought into latent form is a model like any other."""

from __future__ import annotations

import pytest
import torch
from compression_cases import LLAMA, logits
from model_cases import converted

from moesaic._errors import InputError
from moesaic.compression.factorization.latent_experts import LatentExperts, factorise_experts


def test_a_wide_space_changes_nothing():
    model = converted(LLAMA, torch.float64)
    before = logits(model)
    same, results = factorise_experts(model, None, LatentExperts(group_size=4, latent_width=32))
    assert same is model
    assert results["error"] < 1e-20
    torch.testing.assert_close(logits(model), before)


def test_both_errors_are_told():
    whole, cut = (
        factorise_experts(
            converted(LLAMA), None, LatentExperts(group_size=4, latent_width=5, rank=rank)
        )[1]
        for rank in (0, 3)
    )
    assert whole["rank_error"] == 0.0
    assert whole["error"] == whole["joint_error"] > 0.0
    assert 0.0 < cut["rank_error"] < cut["error"]


def test_settings_that_do_not_fit_leave_the_model_alone():
    model = converted(LLAMA)
    before = logits(model)
    with pytest.raises(InputError, match=r"group_size must divide num_experts=4, got 3"):
        factorise_experts(model, None, LatentExperts(group_size=3))
    assert torch.equal(logits(model), before)
