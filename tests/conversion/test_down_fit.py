"""The fit of the down product, held to plain ridge regression.

Shapes: T tokens, D model width, E experts, F width of one, M = E * F.
"""

import pytest
import torch

from moesaic.conversion import down_fit
from moesaic.conversion.down_fit import fit_down
from moesaic.conversion.gram_router import BlockErrors
from moesaic.nn.experts._base import ExpertsConfig
from moesaic.nn.experts.gated import GatedExperts

E, F, D, T = 4, 3, 8, 1200


@pytest.fixture(params=[False, True], ids=["", "biased"])
def case(request):
    torch.manual_seed(0)
    experts = GatedExperts(D, E, F, ExpertsConfig(down_bias=request.param))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    h_TD = torch.randn(T, D) + 1
    # Odd weights too: a router may give its gates' values.
    weights_TE = (torch.rand(T, E) < 0.5).float() * (0.5 + torch.rand(T, E))
    return experts, h_TD, weights_TE


def neurons(experts, h_TD):
    gate, up = (h_TD @ experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=2)
    return (torch.nn.functional.silu(gate) * up).transpose(0, 1)


def outputs(experts, h_TD, weights_TE):
    out_TD = torch.einsum("tef,edf,te->td", neurons(experts, h_TD), experts.down_proj, weights_TE)
    return (
        out_TD if experts.down_proj_bias is None else out_TD + weights_TE @ experts.down_proj_bias
    )


@torch.no_grad()
def test_it_is_weighted_ridge_regression(case):
    experts, h_TD, weights_TE = case
    want_TD = outputs(experts, h_TD, torch.ones(T, E))
    errors, tokens_B = BlockErrors(h_TD, experts), torch.arange(900)
    down_EDF = experts.down_proj.clone()
    missing_BD = (want_TD - outputs(experts, h_TD, weights_TE))[tokens_B].double()
    x_BM = (neurons(experts, h_TD) * weights_TE.unsqueeze(2)).flatten(1)[tokens_B].double()
    share_B1 = (errors.scale_T1[tokens_B] / errors.scale_T1[tokens_B].sum()).double()
    # Ridge regression as least squares: rows that pull every move to zero.
    strength_M = (down_fit._RIDGE * E * F / 900 * (share_B1 * x_BM.square()).sum(0)).sqrt()
    rows = torch.cat([share_B1.sqrt() * x_BM, torch.diag(strength_M)])
    aims = torch.cat([share_B1.sqrt() * missing_BD, torch.zeros(E * F, D).double()])
    move_MD = torch.linalg.lstsq(rows, aims).solution.float()

    fit_down(experts, errors, tokens_B, weights_TE[tokens_B])
    moved_EDF = down_EDF + move_MD.view(E, F, D).transpose(1, 2)
    torch.testing.assert_close(experts.down_proj, moved_EDF, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_errors_tell_what_is_left_and_it_is_less(case):
    experts, h_TD, weights_TE = case
    want_TD = outputs(experts, h_TD, torch.ones(T, E))
    errors, fresh_B = BlockErrors(h_TD, experts), torch.arange(900, T)
    before = errors.error(fresh_B, weights_TE[fresh_B])
    fit_down(experts, errors, torch.arange(900), weights_TE[:900])
    left_TD = want_TD - outputs(experts, h_TD, weights_TE)
    torch.testing.assert_close(
        errors.missing(fresh_B, weights_TE[fresh_B]), left_TD[fresh_B], rtol=1e-3, atol=1e-3
    )
    assert errors.error(fresh_B, weights_TE[fresh_B]) < 0.9 * before


@torch.no_grad()
def test_what_is_never_on_stays(case):
    experts, h_TD, weights_TE = case
    weights_TE[:, 1] = 0
    before_EDF = experts.down_proj.clone()
    fit_down(experts, BlockErrors(h_TD, experts), torch.arange(T), weights_TE)
    assert torch.equal(experts.down_proj[1], before_EDF[1])
    assert not torch.equal(experts.down_proj[0], before_EDF[0])


@torch.no_grad()
def test_with_all_on_nothing_moves(case):
    experts, h_TD, _ = case
    before_EDF = experts.down_proj.clone()
    fit_down(experts, BlockErrors(h_TD, experts), torch.arange(T), torch.ones(T, E))
    torch.testing.assert_close(experts.down_proj, before_EDF)
