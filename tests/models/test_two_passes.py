"""A model whose losses judge two passes makes both in training, and one in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as nnf
from model_cases import Case, converted, random_ids, recompute

from moesaic.nn.layer import moe_layers, record_routing

LLAMA = Case("llama", {})
COEF = 5.0


def thor(**options):
    """Copies that differ, one of which is drawn."""
    return converted(
        LLAMA, router="stochastic", losses={"consistency": {"coef": COEF}}, width=48, **options
    )


@pytest.fixture
def model(monkeypatch):
    # `cut` splits one network; here every expert is a whole one, of its own.
    import model_cases

    monkeypatch.setattr(model_cases, "fill_experts", lambda moe, ffn: spread_out(moe))
    return thor()


@torch.no_grad()
def spread_out(moe):
    for parameter in moe.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)


def language(logits_BSV, labels_BS):
    return nnf.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def draw_twice(model, ids, labels, **options):
    """What training computes, and the logits of its two passes."""
    torch.manual_seed(0)
    with record_routing(model) as routings:
        out = model(ids, labels=labels, **options)
    drawn = [int(routing.ids_TK[0, 0]) for routing in routings]
    num_layers = len(moe_layers(model))
    assert len(drawn) == 2 * num_layers
    torch.manual_seed(0)
    first, second = (model(ids).logits for _ in range(2))
    return out, first, second, drawn


def test_loss_is_the_cards_sum(model):
    ids = random_ids()
    labels = ids.clone()
    labels[0, :4] = -100
    out, first, second, drawn = draw_twice(model.train(), ids, labels)
    assert drawn[:2] != drawn[2:], "another seed draws twice"
    log_p, log_q = (logits[:, :-1].log_softmax(-1) for logits in (first, second))
    gaps_BS = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
    consistency = gaps_BS[labels[:, 1:] != -100].mean()
    assert consistency > 1e-3
    expected = language(first, labels) + language(second, labels) + COEF * consistency
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.aux_loss, COEF * consistency)
    torch.testing.assert_close(out.logits, first)


def test_without_labels_all_text_counts(model):
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    out, first, second, _ = draw_twice(
        model.train(), ids, None, attention_mask=mask, output_router_logits=True
    )
    torch.manual_seed(0)
    first, second = (model(ids, attention_mask=mask).logits for _ in range(2))
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    gaps_BS = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
    torch.testing.assert_close(out.aux_loss, COEF * gaps_BS[mask.bool()].mean())
    assert out.loss is None


def test_a_step_teaches_what_was_drawn(model):
    ids = random_ids()
    torch.manual_seed(0)
    with record_routing(model) as routings:
        model.train()(ids, labels=ids).loss.backward()
    for index, layer in enumerate(moe_layers(model)):
        drawn = {int(routing.ids_TK[0, 0]) for routing in routings[index::2]}
        moved = layer.experts.down_proj.grad.flatten(1).any(1)
        assert set(moved.nonzero().flatten().tolist()) == drawn


def test_equal_experts_have_no_consistency_to_lose(model):
    with torch.no_grad():
        for layer in moe_layers(model):
            for parameter in layer.experts.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    ids = random_ids()
    out = model.train()(ids, labels=ids)
    assert out.aux_loss.item() == 0.0
    torch.testing.assert_close(out.loss, 2 * model.eval()(ids, labels=ids).loss)


def test_evaluation_makes_one_pass(model):
    ids = random_ids()
    torch.manual_seed(0)
    with record_routing(model) as routings, torch.no_grad():
        out = model(ids, labels=ids)
    assert len(routings) == len(moe_layers(model))
    torch.testing.assert_close(out.loss, language(out.logits, ids))


def test_recomputation_draws_the_same(model):
    ids = random_ids()
    again = copy.deepcopy(model)
    recompute(again, use_reentrant=False)
    for each in (model, again):
        torch.manual_seed(0)
        each.train()(ids, labels=ids).loss.backward()
    for (name, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
