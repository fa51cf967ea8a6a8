"""A converted model whose experts are brought into latent form is a model like any other."""

from __future__ import annotations

import pytest
import torch
from compression_cases import LLAMA, logits
from model_cases import converted, dense_model, same_state

from moesaic._errors import InputError
from moesaic.compression.factorization.latent_experts import factorise_model
from moesaic.models import checkpoint
from moesaic.nn.layer import moe_layers


def test_wide_space_changes_nothing():
    model = converted(LLAMA, torch.float64)
    before = logits(model)
    same, errors = factorise_model(model, 4, 32)
    assert same is model
    assert max(error["total"] for error in errors) < 1e-20
    torch.testing.assert_close(logits(model), before)


def test_narrow_space_changes_it_and_survives_saving(tmp_path):
    dense = dense_model(LLAMA)
    manifest = checkpoint.new_manifest("tiny", dense)
    model = converted(LLAMA, shared_width=8)
    before = logits(model)
    model, errors = factorise_model(model, 2, 5)
    assert len(errors) == len(moe_layers(model))
    assert (logits(model) - before).abs().max() > 1e-2
    checkpoint.save(model, tmp_path, manifest)
    loaded = checkpoint.load(tmp_path)
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.moesaic["exact"] is False


def test_a_model_without_experts_is_refused():
    with pytest.raises(InputError, match=r"has no experts to factorise; convert it first"):
        factorise_model(dense_model(LLAMA), 2)


def test_settings_that_do_not_fit_leave_the_model_alone():
    model = converted(LLAMA)
    before = logits(model)
    with pytest.raises(InputError, match=r"group_size must divide num_experts=4, got 3"):
        factorise_model(model, 3)
    assert torch.equal(logits(model), before)
