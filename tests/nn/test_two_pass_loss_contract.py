"""What every loss that judges two passes owes training."""

from __future__ import annotations

import pytest
import torch
from nn_cases import make_loss, tokens

from moesaic.nn.losses._base import Passes
from moesaic.nn.losses._table import LOSSES

V, B, S = 9, 3, 5
NAMES = [name for name in LOSSES if "two-passes" in LOSSES[name].abilities]
each_loss = pytest.mark.parametrize("name", NAMES)
MASK_BS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], dtype=torch.bool)


def passes(scale=1.0, dtype=torch.float32):
    return Passes(
        *((scale * tokens(B * S, V, seed=seed)).to(dtype).requires_grad_() for seed in (1, 2))
    )


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_float32_scalar_that_teaches_both_passes(name, dtype):
    both = passes(dtype=dtype)
    value = make_loss(name)(both, MASK_BS)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value > 0
    value.backward()
    for logits_TV in both:
        assert logits_TV.grad.isfinite().all()
        assert logits_TV.grad[MASK_BS.flatten()].any(1).all()
        assert not logits_TV.grad[~MASK_BS.flatten()].any()


@each_loss
def test_equal_passes_and_masked_ones_are_exactly_zero(name):
    both, loss = passes(), make_loss(name)
    assert loss(Passes(both.first_TV, both.first_TV), MASK_BS).item() == 0.0
    assert loss(both, torch.zeros_like(MASK_BS)).item() == 0.0


@each_loss
def test_the_order_of_passes_does_not_matter(name):
    both, loss = passes(), make_loss(name)
    swapped = Passes(both.second_TV, both.first_TV)
    torch.testing.assert_close(loss(swapped, MASK_BS), loss(both, MASK_BS))


@each_loss
def test_saturated_logits_stay_finite(name):
    both = passes(scale=1e4)
    value = make_loss(name)(both, MASK_BS)
    value.backward()
    assert value.isfinite()
    assert all(logits_TV.grad.isfinite().all() for logits_TV in both)


@each_loss
def test_no_token_at_all_is_zero(name):
    empty = Passes(torch.zeros(0, V), torch.zeros(0, V))
    assert make_loss(name)(empty, torch.ones(0, S, dtype=torch.bool)).item() == 0.0
