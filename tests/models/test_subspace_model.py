"""A language model of CDSP-MoE layers: its loss, its tasks, its checkpoint and its cost."""

from __future__ import annotations

import pytest
import torch
from model_cases import recompute

import moesaic as mo
from moesaic._errors import InputError
from moesaic.evaluation.cost import model_cost
from moesaic.nn.layer import end_step, moe_layers, pass_state, record_routing

D, E, F, BLOCK, VOCAB = 32, 4, 12, 6, 61
LAYER = mo.LayerConfig(
    num_experts=E,
    width=F,
    router="task-top-k",
    router_options={"num_tasks": 3, "probability": 0.0},
    experts="subspace",
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"dim": D, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 24}
    return mo.build_mixture(mo.MixtureConfig(**sizes, vocab_size=VOCAB, layers=(LAYER,)))


def ids():
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def step(model):
    out = model.train()(ids(), labels=ids())
    out.loss.backward()
    model.zero_grad()
    end_step(model)
    return out.aux_loss.item()


def test_its_loss_holds_that_of_its_experts(model):
    # The mean over layers; a first step knows of no conflict.
    expected = []
    for layer in moe_layers(model):
        links = layer.experts.links()
        size = layer.experts.topology.abs().mean()
        expected.append(1e-3 * size + 1e-2 * (links * (1 - links)).mean())
    first = step(model)
    assert first == pytest.approx(sum(expected).item() / 2)
    assert step(model) > first
    model.eval()
    assert step(model) == pytest.approx(first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_layers_are_compared_once(model, use_reentrant):
    step(model)
    expected = [layer.experts.conflict.last_EE for layer in moe_layers(model)]
    recompute(model.eval(), use_reentrant=use_reentrant)
    step(model)
    for layer, conflict_EE in zip(moe_layers(model), expected, strict=True):
        torch.testing.assert_close(layer.experts.conflict.last_EE, conflict_EE)


def test_tasks_reach_the_routers_of_a_model_and_its_generation(model):
    model.eval()
    tasks = torch.tensor([2, -1])
    with torch.no_grad(), record_routing(model) as routings:
        model(ids())
        with pass_state(model, tasks=tasks):
            model(ids())
            model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=2)
    blind, told, written = routings[0], routings[2], routings[4]
    same_T = (blind.scores_TE == told.scores_TE).all(1)
    assert same_T.tolist() == [False] * 12 + [True] * 12
    assert torch.equal(written.scores_TE, told.scores_TE)
    assert len(routings) == 2 * 4


def test_tasks_and_recomputation_do_not_go_together(model):
    recompute(model.train(), use_reentrant=False)
    message = r"tasks need a model without gradient checkpointing, .*_checkpointing_disable\(\)$"
    with pytest.raises(InputError, match=message), pass_state(model, tasks=torch.zeros(2)):
        pass
    # Evaluation computes nothing anew.
    with pass_state(model.eval(), tasks=torch.zeros(2, dtype=torch.int64)):
        model(ids())


def test_it_is_saved_and_loaded_without_what_a_step_left(model, tmp_path):
    step(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    assert [layer.experts.conflict.last_EE for layer in moe_layers(again)] == [None] * 2


def test_cost_counts_the_backbone_once(model):
    backbone = 2 * E * BLOCK * D
    assert sum(p.numel() for p in moe_layers(model)[0].experts.parameters()) == backbone + E * E
    fixed = sum(p.numel() for p in model.parameters()) - 2 * backbone
    for active, used in ((0, 0), (1, 2 * F * D), (2, backbone), (4, backbone)):
        # A share of the 24 neurons of the dense network.
        cost = model_cost(model, [active * F / 24] * 2, context=12)
        assert cost.active_parameters == fixed + 2 * used
        router = E * (D + 16)
        attention = 2 * D * D + 2 * D * D // 2
        products = VOCAB * D + 2 * (attention + router + active * 2 * F * D)
        assert cost.flops_per_token == 2 * products
