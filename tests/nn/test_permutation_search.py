"""COMET, arXiv 2306.02824: which expert sits in which slot of a router is learned at first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import end_schedules, expert_outputs, make_layer, make_router, tokens
from scipy.optimize import linear_sum_assignment

from moesaic.nn._assignment import best_assignment
from moesaic.nn.routers.permutation_search import entropies, sinkhorn

E = 6
INNER = pytest.mark.parametrize("inner", ["topk-softmax", "soft-trees", "sigmoid-top-k"])


def same(inner_name, **options):
    """A search and its other router alone, of the same weights."""
    search = make_router("permutation-search", E, router=inner_name, **options)
    alone = make_router(inner_name, E)
    alone.load_state_dict(search.inner.state_dict())
    return search, alone


@INNER
def test_without_an_exchange_it_is_the_other_router(inner):
    search, alone = same(inner)
    h_TD = tokens(63)
    assert torch.equal(search(h_TD).weights_TE(), alone(h_TD).weights_TE())
    assert torch.equal(search(h_TD).scores_TE, alone(h_TD).scores_TE)


@INNER
def test_an_exchange_renumbers_the_experts(inner):
    search, alone = same(inner)
    h_TD = tokens(63)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    search.expert_of.copy_(order)
    before, after = alone(h_TD), search(h_TD)
    # Slot i is expert order[i], with its weight and its score.
    assert torch.equal(after.weights_TE()[:, order], before.weights_TE())
    assert torch.equal(after.scores_TE[:, order], before.scores_TE)


def test_a_layer_is_the_one_whose_experts_are_indexed_anew():
    layer = make_layer("permutation-search").eval()
    h_TD = tokens(63, dtype=torch.float64)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    weights_TE = layer.router(h_TD).weights_TE()
    outs_TED = expert_outputs(layer, h_TD)
    layer.router.expert_of.copy_(order)
    expected = (weights_TE.unsqueeze(2) * outs_TED[:, order]).sum(1)
    torch.testing.assert_close(layer(h_TD), expected)


@INNER
def test_the_search_mixes_by_the_matrix_and_keeps_the_sum(inner):
    search, alone = same(inner)
    search.train()
    alone.train()
    with torch.no_grad():
        search.logits *= 1e-3
    h_TD = tokens(63)
    matrix_EE = search.matrix()
    mixed_TE = alone(h_TD).weights_TE() @ matrix_EE.float()
    scale = alone(h_TD).weights_TE().sum(1, keepdim=True) / mixed_TE.sum(1, keepdim=True)
    routing = search(h_TD)
    torch.testing.assert_close(routing.weights_TE(), mixed_TE * scale)
    assert (routing.active_T() == E).all()
    expected = 1e-4 * entropies(matrix_EE)
    torch.testing.assert_close(routing.aux["permutation"], expected.float())
    (routing.weights_TE() * tokens(63, E, seed=3)).sum().backward()
    assert search.logits.grad.any()
    assert search.inner.weight.grad.any()


def test_after_the_search_the_matrix_is_not_asked():
    search = make_router("permutation-search", E).train()
    end_schedules(search)
    routing = search(tokens(63))
    assert not routing.aux
    assert routing.ids_TK.shape[1] == 2
    routing.weights_TK.square().sum().backward()
    assert search.logits.grad is None


def test_the_matrix_hardens_as_the_search_goes_on():
    search = make_router("permutation-search", E, search_steps=100).train()
    search.reset_parameters()
    found = []
    for step in (0, 25, 50, 99):
        search.clock.steps_done.fill_(step)
        found.append(entropies(search.matrix()).item())
    assert found == sorted(found, reverse=True)
    # Of 2 * 6 * log 6 = 21.5 at most.
    assert found[0] > 10.0
    assert found[-1] < 1e-3
    best = search.matrix().detach().argmax(1)
    search.end_step()
    assert torch.equal(search.expert_of, best)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("size", [6, 16])
def test_a_matrix_at_the_last_temperature_is_a_permutation(scale, size):
    draw = torch.Generator().manual_seed(0)
    logits_EE = torch.randn(size, size, generator=draw, dtype=torch.float64) * scale
    matrix_EE = sinkhorn(logits_EE, 1e-7, 150)
    ones_E = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(matrix_EE.sum(0), ones_E, rtol=0, atol=1e-4)
    torch.testing.assert_close(matrix_EE.sum(1), ones_E, rtol=0, atol=1e-4)
    assert entropies(matrix_EE).item() < 1e-3


def test_rounds_at_one_temperature_are_the_usual_ones():
    logits_EE = torch.randn(E, E, generator=torch.Generator().manual_seed(0)).double()
    spread = float(logits_EE.max() - logits_EE.min())
    expected = (logits_EE / spread).exp()
    for _ in range(9):
        expected = expected / expected.sum(1, keepdim=True)
        expected = expected / expected.sum(0, keepdim=True)
    torch.testing.assert_close(sinkhorn(logits_EE, spread, 9), expected)


def test_entropies_by_hand():
    assert entropies(torch.eye(3)).item() == pytest.approx(0.0, abs=1e-6)
    even = torch.full((2, 2), 0.5)
    # Two rows and two columns of log 2 each.
    assert entropies(even).item() == pytest.approx(4 * torch.tensor(2.0).log().item())
    # Rows (1/2, 1/2) and (1/2, 1/2), columns one-hot: rows and columns are told apart.
    columns = torch.tensor([[1.0, 1.0], [0.0, 0.0]]) + 1e-12
    assert entropies(columns).item() == pytest.approx(2 * torch.tensor(2.0).log().item(), rel=1e-3)


def test_steps_keep_the_best_permutation_until_the_search_ends():
    search = make_router("permutation-search", E, search_steps=2).train()
    gains_EE = search.logits.detach()
    search.end_step()
    rows, columns = linear_sum_assignment(gains_EE.numpy(), maximize=True)
    assert search.expert_of.tolist() == columns.tolist()
    assert rows.tolist() == list(range(E))
    search.end_step()
    with torch.no_grad():
        search.logits.copy_(-gains_EE)
    search.end_step()
    assert search.expert_of.tolist() == columns.tolist()


def test_the_other_router_hears_of_steps_and_noise_changes_the_matrix():
    search = make_router(
        "permutation-search",
        E,
        router="progressive-top-k",
        options={"early_top_k": 3, "early_steps": 1},
        noise=1e-3,
    ).train()
    assert not torch.equal(search.matrix(), search.matrix())
    assert torch.equal(search.eval().matrix(), search.matrix())
    search.train()
    end_schedules(search)
    assert search(tokens(5)).ids_TK.shape[1] == 3
    search.end_step()
    assert search(tokens(5)).ids_TK.shape[1] == 1


@given(size=st.integers(1, 9), seed=st.integers(0, 2**31), ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_assignment_is_as_good_as_that_of_scipy(size, seed, ties):
    draw = torch.Generator().manual_seed(seed)
    gains_EE = torch.randn(size, size, generator=draw, dtype=torch.float64)
    if ties:
        gains_EE = gains_EE.round()
    columns = best_assignment(gains_EE)
    assert sorted(columns) == list(range(size))
    rows, best = linear_sum_assignment(gains_EE.numpy(), maximize=True)
    assert gains_EE[range(size), columns].sum().item() == pytest.approx(
        gains_EE[rows, best].sum().item()
    )
