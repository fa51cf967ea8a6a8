"""The fit of the bypass, held to plain least squares.

Shapes: T tokens, D model width, E experts, F width of one.
"""

import pytest
import torch

from moesaic.conversion.bypass_fit import fit_bypass
from moesaic.conversion.gram_router import BlockErrors
from moesaic.nn.bypass import Bypass
from moesaic.nn.experts._base import ExpertsConfig
from moesaic.nn.experts.gated import GatedExperts

E, F, D, T = 4, 3, 8, 400


@pytest.fixture(params=[False, True], ids=["", "biased"])
def case(request):
    torch.manual_seed(0)
    experts = GatedExperts(D, E, F, ExpertsConfig(down_bias=request.param))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    h_TD = torch.randn(T, D) + 1
    on_TE = (torch.rand(T, E) < 0.5).float()
    errors = BlockErrors(h_TD, experts)
    return errors, h_TD, errors.missing(torch.arange(T), on_TE)


def left(errors, missing_TD, added_TD):
    return float((errors.scale_T1 * (missing_TD - added_TD).square()).sum())


def test_full_rank_is_weighted_least_squares(case):
    errors, h_TD, missing_TD = case
    bypass = Bypass(D, D)
    fit_bypass(bypass, h_TD, missing_TD, errors.scale_T1)
    root_T1 = errors.scale_T1.sqrt()
    x_TI = torch.cat([h_TD, torch.ones(T, 1)], 1)
    map_ID = torch.linalg.lstsq(root_T1 * x_TI, root_T1 * missing_TD).solution
    best = left(errors, missing_TD, x_TI @ map_ID)
    found = left(errors, missing_TD, bypass(h_TD).detach())
    assert best <= found <= best * 1.001
    assert found < 0.9 * left(errors, missing_TD, torch.zeros(T, D))


def test_a_low_rank_is_the_best_of_its_rank(case):
    errors, h_TD, missing_TD = case
    bypass = Bypass(D, 2)
    fit_bypass(bypass, h_TD, missing_TD, errors.scale_T1)
    found = left(errors, missing_TD, bypass(h_TD).detach())
    # No other of that rank, trained from there on, does better.
    optimizer = torch.optim.Adam(bypass.parameters(), lr=1e-2)
    for _ in range(300):
        loss = (errors.scale_T1 * (missing_TD - bypass(h_TD)).square()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found <= float(loss.detach()) * 1.001
    whole = Bypass(D, D)
    fit_bypass(whole, h_TD, missing_TD, errors.scale_T1)
    assert left(errors, missing_TD, whole(h_TD).detach()) < found


def test_what_is_linear_is_made_up_for():
    """Experts whose activation is near the identity for large inputs: all that is off is linear."""
    torch.manual_seed(0)
    experts = GatedExperts(D, E, F, ExpertsConfig(activation="relu"))
    h_TD = torch.rand(T, D) + 0.5
    with torch.no_grad():
        gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
        # The gates are the sum of the inputs, the same for all; the up rows read one input less.
        gate_EFD.fill_(1.0)
        up_EFD.normal_()
        experts.down_proj.normal_()
    h_TD = h_TD / h_TD.sum(1, keepdim=True)
    errors, off_TE = BlockErrors(h_TD, experts), torch.zeros(T, E)
    bypass = Bypass(D, D)
    missing_TD = errors.missing(torch.arange(T), off_TE)
    fit_bypass(bypass, h_TD, missing_TD, errors.scale_T1)
    assert errors.error(torch.arange(T), off_TE) > 0.5
    assert errors.error(torch.arange(T), off_TE, bypass(h_TD).detach()) < 1e-4
