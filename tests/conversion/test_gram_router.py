"""The Gram fit: its error is the real one, its budget is met, it finds what there is to find."""

import pytest
import torch

from moesaic.conversion.allocation import allocate
from moesaic.conversion.gram_router import (
    FRACTIONS,
    BlockErrors,
    Sample,
    fit_router,
    move_bias,
    whitening,
)
from moesaic.nn.experts._base import ExpertsConfig
from moesaic.nn.experts.gated import GatedExperts
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold, SigmoidThresholdConfig

E, F, D, T = 4, 3, 8, 600


def make_experts(seed=0, **options):
    torch.manual_seed(seed)
    experts = GatedExperts(D, E, F, ExpertsConfig(**options))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts


def make_router(**options):
    return SigmoidThreshold(
        D, E, SigmoidThresholdConfig(bias=True, value="one", normalize="none", **options)
    )


def outputs(experts, h_TD):
    """Output of every block, written out."""
    blocks = []
    for e in range(E):
        gate, up = (experts.gate_up_proj[e] @ h_TD.T).T.chunk(2, dim=1)
        block_TD = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T
        if experts.down_proj_bias is not None:
            block_TD = block_TD + experts.down_proj_bias[e]
        blocks.append(block_TD)
    return torch.stack(blocks, dim=1)


def scaled_error(o_TED, w_TE):
    """Error of the output with blocks weighted so, [T]."""
    y_TD = o_TED.sum(1)
    energy_T = y_TD.square().sum(1)
    scale_T = (energy_T.clamp(min=energy_T.median()) * energy_T.median()).sqrt()
    wrong_TD = (w_TE.unsqueeze(-1) * o_TED).sum(1) - y_TD
    return wrong_TD.square().sum(1) / scale_T


biased = pytest.mark.parametrize("biased", [False, True])


@biased
@torch.no_grad()
def test_error_is_the_squared_error_of_the_output(biased):
    experts, h_TD = make_experts(down_bias=biased), torch.randn(20, D)
    errors, all_T = BlockErrors(h_TD, experts), torch.arange(20)
    w_TE = torch.rand(20, E)
    want_T = scaled_error(outputs(experts, h_TD), w_TE)
    assert errors.error(all_T, w_TE) == pytest.approx(float(want_T.mean()), rel=1e-5)
    some_B = torch.tensor([3, 17, 3])
    want = float(want_T[some_B].mean())
    assert errors.error(some_B, w_TE[some_B]) == pytest.approx(want, rel=1e-5)
    assert errors.error(all_T, torch.ones(20, E)) < 1e-12


@biased
@torch.no_grad()
def test_savings_are_what_switching_one_block_changes(biased):
    experts, h_TD = make_experts(down_bias=biased), torch.randn(20, D)
    o_TED = outputs(experts, h_TD)
    on_TE = torch.rand(20, E) < 0.5
    errors, all_T = BlockErrors(h_TD, experts), torch.arange(20)
    saved_TE = errors.savings(all_T, on_TE)
    for e in range(E):
        with_TE, without_TE = on_TE.clone(), on_TE.clone()
        with_TE[:, e], without_TE[:, e] = True, False
        want_T = scaled_error(o_TED, without_TE.float()) - scaled_error(o_TED, with_TE.float())
        torch.testing.assert_close(saved_TE[:, e], want_T, rtol=1e-4, atol=1e-4)


@biased
@torch.no_grad()
def test_rounding_is_little_beside_what_is_measured(biased):
    experts, h_TD = make_experts(down_bias=biased), torch.randn(20, D)
    exact, rounded = (BlockErrors(h_TD, experts, rounded=rounded) for rounded in (False, True))
    all_T, on_TE = torch.arange(20), torch.rand(20, E) < 0.5
    assert rounded.error(all_T, torch.ones(20, E)) == pytest.approx(0, abs=1e-5)
    error = exact.error(all_T, on_TE.float())
    assert 0 < abs(rounded.error(all_T, on_TE.float()) - error) < 0.01 * error
    saved_TE = exact.savings(all_T, on_TE)
    gap_TE = (rounded.savings(all_T, on_TE) - saved_TE).abs()
    assert 0 < gap_TE.max() < 0.02 * saved_TE.abs().max()


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("active", [0.3, 0.5, 0.75])
def test_fit_meets_the_fraction_on_held_tokens_and_the_router_is_what_was_fitted(active, rank):
    experts, router = make_experts(), make_router(rank=rank)
    h_TD = torch.randn(T, D) * torch.linspace(0.1, 5, D) + 3.0
    errors = fit_router(router, experts, h_TD, active, steps=30, seed=0)
    # Whitening is folded back: the module itself, on the raw inputs, is on as often.
    router.eval()
    with torch.no_grad():
        assert float(router(h_TD).active_TE().float().mean()) == pytest.approx(active, abs=0.05)
    held_TD = Sample.draw(h_TD, E * F, 0).h_TD[-T // 4 :]
    with torch.no_grad():
        assert float(router(held_TD).active_TE().float().mean()) == pytest.approx(active, abs=0.02)
    assert list(errors) == sorted(errors, reverse=True) or max(errors) == errors[0]
    assert errors[-1] == pytest.approx(0.0, abs=1e-6)


def test_a_fit_of_low_rank_is_the_nearest_to_that_of_full_rank():
    experts, h_TD = make_experts(), torch.randn(T, D) * torch.linspace(0.1, 5, D) + 3.0
    whole = make_router()
    fit_router(whole, experts, h_TD, 0.5, steps=30, seed=0)
    train_TD = Sample.draw(h_TD, E * F, 0).h_TD[: -T // 4]
    away = []
    with torch.no_grad():
        # What each rank leaves of scores of inputs that count alike in every direction.
        _, whiten_DD = whitening(train_TD)
        want_ED = whole.weight @ torch.linalg.inv(whiten_DD)
    for rank in range(1, E):
        low = make_router(rank=rank)
        fit_router(low, experts, h_TD, 0.5, steps=30, seed=0)
        with torch.no_grad():
            gap_ED = low.map_ED() @ torch.linalg.inv(whiten_DD) - want_ED
        sizes_K = torch.linalg.svdvals(want_ED)
        assert float(gap_ED.norm()) == pytest.approx(float(sizes_K[rank:].norm()), rel=1e-2)
        away.append(float(gap_ED.norm()))
    assert away == sorted(away, reverse=True)


def test_fit_finds_which_block_a_token_needs():
    """Each token feeds one block alone; half of the gates can be off at almost no loss."""
    experts = make_experts()
    with torch.no_grad():
        experts.gate_up_proj.zero_()
        for e in range(E):
            experts.gate_up_proj[e, :, e] = torch.rand(2 * F) + 1.0
    h_TD = 0.02 * torch.randn(T, D)
    needed_T = torch.randint(E, (T,))
    h_TD[torch.arange(T), needed_T] += 3.0
    router = make_router()
    left = fit_router(router, experts, h_TD, 0.5, steps=100, seed=0)
    errors, all_T = BlockErrors(h_TD, experts), torch.arange(T)
    static = min(
        errors.error(all_T, mask.float().expand(T, E))
        for mask in torch.cartesian_prod(*[torch.tensor([0, 1])] * E)
        if mask.sum() == E // 2
    )
    assert left[FRACTIONS.index(0.5)] < 0.02
    assert static > 0.2
    router.eval()
    with torch.no_grad():
        active_TE = router(h_TD).active_TE()
    assert float(active_TE[torch.arange(T), needed_T].float().mean()) > 0.98


@torch.no_grad()
def test_folded_router_gives_the_scores_of_the_fit(monkeypatch):
    """What the fit decides at its fraction the module decides, on the same tokens as they came."""
    experts, router = make_experts(), make_router()
    h_TD = torch.randn(T, D) @ torch.randn(D, D) * torch.linspace(0.1, 5, D) + 3.0
    decided = []
    decide = SigmoidThreshold.decide
    monkeypatch.setattr(
        SigmoidThreshold, "decide", lambda self, s: decided.append(s.detach()) or decide(self, s)
    )
    with torch.enable_grad():
        fit_router(router, experts, h_TD, 0.5, steps=20, seed=0)
    inside_TE, outside_TE = decided[FRACTIONS.index(0.5)], router.eval()(h_TD).scores_TE
    distance = torch.cdist(inside_TE.double(), outside_TE.double())
    assert 0 < len(inside_TE) < T
    assert float(distance.min(1).values.max()) < 1e-4 * float(outside_TE.std())
    nearest = distance.argmin(1)
    assert len(nearest.unique()) == len(nearest)


@torch.no_grad()
def test_fit_beats_random_choices():
    experts, router = make_experts(), make_router()
    h_TD = torch.randn(T, D) + 1.0
    with torch.enable_grad():
        fit_router(router, experts, h_TD, 0.5, steps=100, seed=0)
    fresh_TD = torch.randn(T, D) + 1.0
    errors, all_T = BlockErrors(fresh_TD, experts), torch.arange(T)
    weights_TE = router.eval()(fresh_TD).weights_TE()
    fitted = errors.error(all_T, weights_TE)
    # The same number of gates for every token, dealt anew.
    dealt = [
        errors.error(all_T, torch.stack([w[torch.randperm(E)] for w in weights_TE]))
        for _ in range(10)
    ]
    assert fitted < 0.7 * min(dealt)


def test_steps_find_what_single_blocks_do_not_tell():
    """Blocks of a pair nearly cancel: their own energy says keep, their Gram says drop both."""
    width, num_experts, neurons = 32, 8, 6
    torch.manual_seed(1)
    experts = GatedExperts(width, num_experts, neurons, ExpertsConfig())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
        experts.gate_up_proj[1::2] = experts.gate_up_proj[::2]
        experts.down_proj[1::2] = -0.7 * experts.down_proj[::2]
    h_TD = torch.randn(3000, width)
    options = SigmoidThresholdConfig(bias=True, value="one", normalize="none")
    errors = [
        fit_router(
            SigmoidThreshold(width, num_experts, options), experts, h_TD, 0.5, steps=steps, seed=0
        )[FRACTIONS.index(0.5)]
        for steps in (1, 200)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_fit_is_reproducible():
    h_TD = torch.randn(T, D)
    routers = [make_router(), make_router()]
    for router in routers:
        fit_router(router, make_experts(), h_TD, 0.5, steps=5, seed=3)
    assert torch.equal(routers[0].weight, routers[1].weight)
    assert torch.equal(routers[0].bias, routers[1].bias)


def test_budget_goes_where_it_is_needed():
    line = [1.0 - f for f in FRACTIONS]
    square = [(1.0 - f) ** 2 for f in FRACTIONS]
    even = allocate([1.0, 1.0], [square, square], FRACTIONS, 0.6)
    assert even == pytest.approx([0.6, 0.6], abs=0.01)
    # Marginal costs 2 s (1 - a) are equal where s1 (1 - a1) = s2 (1 - a2): 4 * 0.16 = 1 * 0.64.
    shared = allocate([4.0, 1.0], [square, square], FRACTIONS, 0.6)
    assert shared == pytest.approx([0.84, 0.36], abs=0.02)
    # A straight line has one price: the dearer layer takes all that there is.
    assert allocate([2.0, 1.0], [line, line], FRACTIONS, 0.55) == pytest.approx(
        [1.0, 0.1], abs=0.02
    )
    assert sum(allocate([3.0, 1.0, 0.1], [square] * 3, FRACTIONS, 0.7)) == pytest.approx(
        2.1, abs=0.01
    )


def test_a_moved_bias_gives_the_scores_that_the_router_now_has():
    router = SigmoidThreshold(8, 6, SigmoidThresholdConfig(threshold=0.4, bias=True)).eval()
    h_TD = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    scores_TE = move_bias(router, h_TD, 0.5)
    routing = router(h_TD)
    torch.testing.assert_close(scores_TE, routing.scores_TE)
    assert routing.active_T().sum() == 150
