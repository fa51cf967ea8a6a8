"""CDSP-MoE's experts: who takes which dimensions, conflicts by hand, what a step leaves behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from nn_cases import make_layer, tokens
from torch import distributed
from torch.nn import functional

from moesaic._errors import InputError
from moesaic.nn._passes import _MANY_PASSES
from moesaic.nn.experts._conflict import StepConflict, shared_cosines
from moesaic.nn.experts.subspace import SubspaceExperts, SubspaceExpertsConfig
from moesaic.nn.layer import end_step, forget_step, record_routing
from moesaic.nn.routing import Routing

D = 6


def make(num_experts=4, width=4, *, dim=D, seed=0, **options):
    torch.manual_seed(seed)
    config = SubspaceExpertsConfig(**options)
    return SubspaceExperts(dim, num_experts, width, config).double()


def routed(ids, num_experts=4):
    ids_TK = torch.tensor(ids)
    scores_TE = torch.zeros(len(ids), num_experts)
    return Routing(ids_TK, torch.full(ids_TK.shape, 0.5).double(), scores_TE, num_experts)


def opposed(experts):
    """A step after which experts 0 and 1 pull each shared dimension in opposite directions."""
    with torch.no_grad():
        experts.up_proj.fill_(0.1)
        experts.down_proj.fill_(1.0)
        # Each takes its own block and the other's.
        experts.topology[:2, :2] = 2.0
    x_TD = torch.ones(1, D).double()
    out = experts.train()(x_TD, routed([[0]])) - experts(x_TD, routed([[1]]))
    out.sum().backward()
    experts.end_step()
    return experts


def test_gradients_are_matched_by_dimension():
    # Expert 0 has dimensions 0 and 1, expert 1 has 2 and 3: nothing shared.
    gradient_EFD = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    cosines_EE = shared_cosines(gradient_EFD, torch.tensor([[0, 1], [2, 3]]), 4)
    torch.testing.assert_close(cosines_EE, torch.eye(2))
    # Dimension 1 alone is shared: rows (3, 4) and (-6, -8). What else they have does not count.
    gradient_EFD[1, 0] = torch.tensor([-6.0, -8.0])
    shared_EF = torch.tensor([[0, 1], [1, 3]])
    cosines_EE = shared_cosines(gradient_EFD, shared_EF, 4)
    assert cosines_EE[0, 1].item() == cosines_EE[1, 0].item() == pytest.approx(-1.0)
    # (3, 4) and (4, -3) are at right angles; (3, 4) and (4, 3) have 24 / 25.
    gradient_EFD[1, 0] = torch.tensor([4.0, -3.0])
    assert shared_cosines(gradient_EFD, shared_EF, 4)[0, 1].item() == pytest.approx(0.0)
    gradient_EFD[1, 0] = torch.tensor([4.0, 3.0])
    assert shared_cosines(gradient_EFD, shared_EF, 4)[0, 1].item() == pytest.approx(24 / 25)


def test_the_order_of_dimensions_does_not_matter():
    draw = torch.Generator().manual_seed(0)
    gradient_EFD = torch.randn(5, 7, 3, generator=draw)
    dims_EF = torch.rand(5, 11, generator=draw).argsort(1)[:, :7]
    order_EF = torch.rand(5, 7, generator=draw).argsort(1)
    moved_EFD = gradient_EFD.gather(1, order_EF.unsqueeze(-1).expand(-1, -1, 3))
    torch.testing.assert_close(
        shared_cosines(moved_EFD, dims_EF.gather(1, order_EF), 11),
        shared_cosines(gradient_EFD, dims_EF, 11),
    )


def test_cosines_are_those_of_a_loop():
    draw = torch.Generator().manual_seed(1)
    gradient_EFD = 1e-25 * torch.randn(5, 7, 3, generator=draw)
    gradient_EFD[4] = 0.0
    dims_EF = torch.rand(5, 11, generator=draw).argsort(1)[:, :7]
    found_EE = shared_cosines(gradient_EFD, dims_EF, 11)
    for i in range(5):
        for j in range(5):
            both = sorted(set(dims_EF[i].tolist()) & set(dims_EF[j].tolist()))
            rows = [[dims_EF[e].tolist().index(k) for k in both] for e in (i, j)]
            first, second = (
                1e25 * gradient_EFD[e][r].flatten() for e, r in zip((i, j), rows, strict=True)
            )
            expected = functional.cosine_similarity(first, second, dim=0) if both else 0.0
            assert found_EE[i, j].item() == pytest.approx(float(expected), abs=1e-5)


def test_fresh_experts_have_the_numbers_of_the_card():
    # N = 8 and Db = 256: blocks of 32 and r = floor(256 / sqrt(8)) = 90.
    experts = make(8, 90, dim=64)
    assert experts.block == 32
    assert experts.up_proj.shape == (256, 64)
    links_EE = experts.links()
    own = 1 / (1 + math.exp(-1.0))  # 0.731
    torch.testing.assert_close(links_EE.diagonal(), torch.full((8,), own).double())
    others = links_EE[~torch.eye(8, dtype=torch.bool)]
    assert others.mean().item() == pytest.approx(0.525, abs=1e-3)
    dims_EF, influence_EF = experts.dims()
    for expert, dims in enumerate(dims_EF.tolist()):
        assert set(range(32 * expert, 32 * expert + 32)) <= set(dims)
        assert len(set(dims)) == 90
    # (32 * 0.731 + 58 * 0.525) / 90, and a little more since the largest links are taken.
    assert influence_EF.mean(1).mean().item() == pytest.approx(0.598, abs=3e-3)


def test_the_paper_of_the_text_example_has_the_same_rule():
    # N = 16 and Db = 1024 give r = 256.
    assert make(16, 256).up_proj.shape[0] == 1024


@pytest.mark.parametrize("cut", [-torch.inf, -1e4])
def test_where_no_link_is_left_the_lowest_dimensions_are_borrowed(cut):
    experts = make(8, 90, dim=4)
    with torch.no_grad():
        experts.topology.fill_(cut).fill_diagonal_(1.0)
    dims_EF, influence_EF = experts.dims()
    assert ((influence_EF > 0).sum(1) == 32).all()
    for expert, dims in enumerate(dims_EF.tolist()):
        own = list(range(32 * expert, 32 * expert + 32))
        rest = [k for k in range(256) if k not in own]
        assert dims == own + rest[:58]
    assert torch.equal(dims_EF, experts.dims()[0])


def test_output_is_the_formula():
    experts = make(4, 4, block=2)
    x_TD = tokens(5, D, dtype=torch.float64)
    dims_EF, influence_EF = experts.dims()
    for expert in range(4):
        up, down = experts.up_proj[dims_EF[expert]], experts.down_proj[:, dims_EF[expert]]
        hidden = x_TD @ up.T
        expected = (hidden * hidden.sigmoid()) @ down.T * influence_EF[expert].mean()
        ids_TK = [[expert, 4]] * 5
        routing = routed(ids_TK)
        routing.weights_TK[:, 1] = 0.0
        torch.testing.assert_close(experts(x_TD, routing), 0.5 * expected)


def test_the_task_teaches_the_links_of_what_is_taken():
    experts = make(4, 4, block=2)
    with torch.no_grad():
        # Expert 0 takes its own block and that of 2.
        experts.topology[0] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    experts(tokens(3, D, dtype=torch.float64), routed([[0, 4]] * 3)).sum().backward()
    grad_EE = experts.topology.grad
    assert grad_EE[0].ne(0).tolist() == [True, False, True, False]
    assert not grad_EE[1:].any()
    # Through the mean of the influences: as the slopes of the sigmoid.
    slope = [math.exp(-a) / (1 + math.exp(-a)) ** 2 for a in (1.0, 0.5)]
    assert (grad_EE[0, 0] / grad_EE[0, 2]).item() == pytest.approx(slope[0] / slope[1])


def test_conflict_charges_links_alone():
    experts = opposed(make(4, 4, block=2, conflict_coef=1.0, size_coef=0.0, choice_coef=0.0))
    experts.zero_grad()
    # They are opposite on all that they share; experts 2 and 3 had no gradient.
    expected_EE = torch.zeros(4, 4).double()
    expected_EE[0, 1] = expected_EE[1, 0] = 1.0
    torch.testing.assert_close(experts.conflict.last_EE, expected_EE)
    losses = experts.aux_losses(routed([[0, 1], [2, 3]]))
    sigmoid = 1 / (1 + math.exp(-2.0))
    assert losses["conflict"].item() == pytest.approx(2 * sigmoid)
    assert losses["topology"].item() == 0.0
    losses["conflict"].backward()
    assert experts.up_proj.grad is None
    assert experts.down_proj.grad is None
    torch.testing.assert_close(experts.topology.grad, expected_EE * sigmoid * (1 - sigmoid))


def test_a_pair_that_is_not_active_is_not_charged():
    experts = opposed(make(4, 4, block=2))
    assert experts.aux_losses(routed([[0, 2], [0, 3]]))["conflict"].item() == 0.0
    # A slot of weight zero uses nothing.
    idle = routed([[0, 1]])
    idle.weights_TK[0, 1] = 0.0
    assert experts.aux_losses(idle)["conflict"].item() == 0.0


def test_the_weight_of_conflicts_is_the_papers():
    conflict = opposed(make(4, 4, block=2)).aux_losses(routed([[0, 1]]))["conflict"].item()
    assert conflict == pytest.approx(10 * 2 / (1 + math.exp(-2.0)))


def test_the_topology_stays_small_and_decided():
    experts = make(2, 2, size_coef=0.3, choice_coef=0.7)
    with torch.no_grad():
        experts.topology.copy_(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
    s = [1 / (1 + math.exp(-a)) for a in (0.0, -2.0, 3.0, 0.0)]
    expected = 0.3 * 5 / 4 + 0.7 * sum(x * (1 - x) for x in s) / 4
    losses = experts.aux_losses(routed([[0]], 2))
    assert losses["topology"].item() == pytest.approx(expected)
    # The first step knows of no other.
    assert losses.keys() == {"topology"}


def step(layer, h_TD, passes=1, end=True):
    """One step of plain descent; gives the conflict loss that it saw, as a mean over passes."""
    layer.train()
    seen = 0.0
    for part_TD in h_TD.chunk(passes):
        with record_routing(layer) as routings:
            out_TD = layer(part_TD)
        aux = routings[0].aux
        loss = (out_TD[:, :2] - 1).square().sum() / len(h_TD) + sum(aux.values()) / passes
        loss.backward()
        if "conflict" in aux:
            seen += aux["conflict"].item() / passes
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    if end:
        end_step(layer)
    return seen


def layer_of(**options):
    return make_layer(
        "topk-softmax",
        dim=D,
        num_experts=4,
        width=6,
        experts="subspace",
        experts_options={"conflict_coef": 0.01, **options},
        router_config={"top_k": 3},
    )


def same(first, second):
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    return True


def test_a_step_sees_the_conflict_of_the_step_before():
    layer, h_TD = layer_of(), tokens(64, D, dtype=torch.float64)
    assert step(layer, h_TD) == 0.0
    first_EE = layer.experts.conflict.last_EE
    assert step(layer, h_TD) > 0
    assert not torch.equal(first_EE, layer.experts.conflict.last_EE)


def test_experts_in_two_slots_add_their_gradients():
    experts, x_TD = make(4, 4, block=2).train(), tokens(2, D, dtype=torch.float64)
    experts(x_TD, routed([[0, 1], [1, 0]])).square().sum().backward()
    experts.end_step()
    both_EE = experts.conflict.last_EE
    # Gradients of the gathered rows, all slots at once, written out.
    dims_EF, influence_EF = experts.dims()
    rows = experts.up_proj.detach()[dims_EF].requires_grad_()
    out_TD = sum(
        0.5 * functional.silu(x_TD @ rows[e].T) @ experts.down_proj[:, dims_EF[e]].T * s
        for e, s in zip((0, 1), influence_EF.mean(1), strict=False)
    )
    out_TD.square().sum().backward()
    torch.testing.assert_close(both_EE, (-shared_cosines(rows.grad, dims_EF, 8)).relu())


@pytest.mark.parametrize("passes", [2, 4])
def test_accumulated_passes_are_one_step(passes):
    whole, cut = layer_of(), layer_of()
    for seed in range(4):
        h_TD = tokens(64, D, seed=seed, dtype=torch.float64)
        conflict = step(whole, h_TD)
        assert step(cut, h_TD, passes) == pytest.approx(conflict)
    assert conflict > 0
    assert same(whole, cut)


def test_gradients_of_all_processes_are_compared(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    mine_EFD, theirs_EFD = torch.randn(2, 4, 3, 5, generator=draw)
    dims_EF = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 2, 4]])
    whole, part = StepConflict(5), StepConflict(5)
    for gradient_EFD in (mine_EFD, theirs_EFD):
        whole.add(dims_EF, gradient_EFD)
    whole.end_step()
    before_EFD = mine_EFD.clone()
    part.add(dims_EF, mine_EFD)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda values: values.add_(theirs_EFD))
    part.end_step()
    torch.testing.assert_close(part.last_EE, whole.last_EE)
    assert 0 < whole.last_EE.count_nonzero() < 12
    assert torch.equal(mine_EFD, before_EFD)


def test_conflict_is_in_no_checkpoint_and_gone_after_loading():
    layer, h_TD = layer_of(), tokens(64, D, dtype=torch.float64)
    step(layer, h_TD)
    assert "conflict" not in "".join(layer.state_dict())
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert layer.experts.conflict.last_EE is None
    assert step(layer, h_TD) == 0.0


def test_evaluation_forgets_and_collects_nothing():
    layer, h_TD = layer_of(), tokens(64, D, dtype=torch.float64)
    step(layer, h_TD)
    layer.train()
    assert layer.experts.conflict.last_EE is not None
    layer.eval()(h_TD).sum().backward()
    end_step(layer)
    assert layer.experts.conflict.last_EE is None


@pytest.mark.parametrize("told", [True, False], ids=["told", "overflowed"])
def test_a_skipped_step_leaves_nothing(told):
    layer, other = layer_of(), layer_of()
    first, second = (tokens(64, D, seed=s, dtype=torch.float64) for s in (0, 1))
    # What mixed precision skips: the gradients are there, and the weights stay.
    scale = 1.0 if told else math.inf
    (scale * layer.train()(first).sum()).backward()
    layer.zero_grad()
    if told:
        forget_step(layer)
    else:
        end_step(layer)
    assert layer.experts.conflict.last_EE is None
    for h_TD in (second, first):
        assert step(layer, h_TD) == step(other, h_TD)
    assert same(layer, other)


def test_a_resumed_run_equals_one_that_forgot_when_it_saved():
    whole, h_TD = layer_of(), tokens(64, D, dtype=torch.float64)
    for _ in range(3):
        step(whole, h_TD)
    saved = copy.deepcopy(whole.state_dict())
    unaware = copy.deepcopy(whole)
    forget_step(whole)
    again = layer_of()
    again.load_state_dict(saved)
    seen = [[step(layer, h_TD) for _ in range(3)] for layer in (whole, again)]
    assert seen[0] == seen[1]
    assert seen[0][0] == 0.0 < seen[0][1]
    assert same(whole, again)
    # Who does not forget differs in the conflict of the first step, and from then on.
    assert step(unaware, h_TD) > 0


def test_conflict_of_weight_zero_collects_nothing():
    layer, h_TD = layer_of(conflict_coef=0.0), tokens(64, D, dtype=torch.float64)
    step(layer, h_TD)
    assert layer.experts.conflict.last_EE is None


def test_frozen_experts_collect_nothing():
    layer, h_TD = layer_of(), tokens(64, D, dtype=torch.float64)
    layer.experts.requires_grad_(False)
    layer.train()(h_TD).sum().backward()
    end_step(layer)
    assert layer.experts.conflict.last_EE is None


def test_conflict_cuts_a_block_that_is_borrowed_against_its_owner():
    experts = make(3, 4, block=2, conflict_coef=1.0).train()
    with torch.no_grad():
        experts.up_proj.fill_(0.1)
        experts.down_proj.fill_(1.0)
        # Expert 0 borrows from 1, which borrows from 2.
        experts.topology.copy_(torch.tensor([[1.0, 0.3, 0.0], [-1.0, 1.0, 0.0], [0, 0.0, 1.0]]))
    x_TD, links, dims = torch.ones(1, D).double(), [], []
    for _ in range(8):
        conflict = experts.aux_losses(routed([[0, 1]], 3)).get("conflict", 0.0)
        # The two want the opposite.
        out_TD = experts(x_TD, routed([[0]], 3)) - experts(x_TD, routed([[1]], 3))
        links.append(experts.topology[0, 1].item())
        dims.append(experts.dims()[0][0].tolist())
        (1e-9 * out_TD.sum() + conflict).backward()
        with torch.no_grad():
            experts.topology -= 0.5 * experts.topology.grad
        experts.zero_grad()
        experts.end_step()
    assert dims[0] == [0, 1, 2, 3]
    assert links[0] == pytest.approx(links[1])
    assert links[1] > links[2]
    # Of block 2 expert 1 has both dimensions, too: it goes on, without block 1.
    assert dims[-1] == [0, 1, 4, 5]


def test_a_step_that_never_ends_is_said_once(caplog):
    conflict = StepConflict(2)
    for _ in range(2 * _MANY_PASSES):
        conflict.add(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 1))
    assert caplog.messages == [
        "the gradients of 1000 passes wait to be compared; call "
        "moesaic.nn.layer.end_step(model) after optimizer.step()"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": -1}, r"block must be at least 0, got -1; 0 follows from the width"),
        ({"block": 1, "width": 5}, r"width must be at most num_experts \* block=4, got 5; raise"),
        ({"conflict_coef": -1.0}, r"conflict_coef must be at least 0, got -1.0; 0 is none"),
        ({"size_coef": math.nan}, r"size_coef must be at least 0, got nan; 0 is none"),
        ({"choice_coef": -1.0}, r"choice_coef must be at least 0, got -1.0; 0 is none"),
        ({"topology_rate": 0.0}, r"topology_rate must be above 0, got 0.0; 10 is the paper's"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)
