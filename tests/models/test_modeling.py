"""Converted models behave as transformers models: generation, losses, gradients, recomputation."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from model_cases import (
    CASES,
    EXPERTS,
    LAYERS,
    ROWS,
    VOCAB,
    Case,
    converted,
    cut,
    dense_config,
    dense_model,
    random_ids,
    recompute,
)
from transformers import AutoModelForCausalLM

from moesaic import all_experts_on, record_routing
from moesaic._errors import InputError
from moesaic.models import modeling
from moesaic.models.modeling import moesaic_classes
from moesaic.nn.layer import moe_layers

LLAMA = Case("llama", {})
SPARSITY = {"sparsity": {"coef": 0.7}}
SOFTMAX = {"load-balance": {"coef": 0.3, "scope": "batch"}, "z-loss": {"coef": 0.01}}
# transformers computes losses and some norms in float32 whatever the model's dtype.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-7}
TOP2 = {"router": "topk-softmax", "router_options": {"top_k": 2}}


def padded(ids_BS, num_padding, side="left"):
    """Pad the second sequence; returns ids, attention mask and labels."""
    ids_BS = ids_BS.clone()
    mask_BS = torch.ones_like(ids_BS)
    where = slice(None, num_padding) if side == "left" else slice(-num_padding, None)
    ids_BS[1, where] = 0
    mask_BS[1, where] = 0
    return ids_BS, mask_BS, ids_BS.masked_fill(mask_BS == 0, -100)


def sparsity_by_hand(router_logits, mask_BS, threshold=0.5):
    """Mean over layers, unmasked tokens and experts of the gates that are on."""
    keep_T = mask_BS.flatten().bool()
    gates = [logits.sigmoid()[keep_T] for logits in router_logits]
    return sum((g * (g > threshold)).mean() for g in gates) / len(gates)


def lm_loss_by_hand(logits, labels):
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100
    )


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_generation_with_cache_equals_without(case):
    model = converted(case)
    ids = random_ids(2, 5)
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with_cache = model.generate(ids, use_cache=True, **options)
    without = model.generate(ids, use_cache=False, **options)
    assert with_cache.shape == (2, 13)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_left_padded_batch_generates_as_single_sequences(case):
    model = converted(case)
    ids, mask, _ = padded(random_ids(2, 6), 2)
    options = {"max_new_tokens": 7, "do_sample": False}
    batch = model.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, 2)):
        single = ids[row : row + 1, start:]
        alone = model.generate(single, attention_mask=torch.ones_like(single), **options)
        assert torch.equal(batch[row, start:], alone[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_gets_a_finite_gradient(case):
    model = converted(case, losses=SPARSITY).train()
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in moe_layers(model):
        assert layer.router.weight.grad.abs().min() > 0
        for name, parameter in layer.experts.named_parameters():
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_loss_is_the_language_models_plus_the_layers(case):
    model = converted(case, losses=SPARSITY)
    ids, mask, labels = padded(random_ids(), 4, side="right")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    assert len(out.router_logits) == LAYERS
    assert all(scores.shape == (ids.numel(), EXPERTS) for scores in out.router_logits)
    want_aux = 0.7 * sparsity_by_hand(out.router_logits, mask)
    torch.testing.assert_close(out.aux_loss, want_aux)
    torch.testing.assert_close(out.loss, lm_loss_by_hand(out.logits, labels) + want_aux)


def test_softmax_losses_by_hand():
    model = converted(LLAMA, losses=SOFTMAX, **TOP2)
    ids, mask, labels = padded(random_ids(), 4)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    keep_T = mask.flatten().bool()
    want = 0.0
    for scores_TE in out.router_logits:
        scores = scores_TE[keep_T]
        load_E = F.one_hot(scores.topk(2).indices, EXPERTS).sum(1).float().mean(0)
        balance = EXPERTS * (load_E * scores.softmax(-1).mean(0)).sum()
        want += (0.3 * balance + 0.01 * scores.logsumexp(-1).square().mean()) / LAYERS
    torch.testing.assert_close(out.aux_loss, want)
    torch.testing.assert_close(out.loss - out.aux_loss, lm_loss_by_hand(out.logits, labels))


def test_padding_does_not_move_the_loss():
    model = converted(LLAMA, losses=SPARSITY)
    ids = random_ids(1, 7)
    both = torch.cat([ids, ids])
    left, mask, labels = padded(torch.cat([torch.zeros(2, 3, dtype=torch.long), both], 1), 3)
    left[0, :3], mask[0, :3], labels[0, :3] = 0, 0, -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(both, labels=both)
        got = model(left, attention_mask=mask, labels=labels, position_ids=positions)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    # The first real token is a label only where padding stands before it.
    got_lm = lm_loss_by_hand(got.logits[:, 3:], both)
    torch.testing.assert_close(got_lm, want.loss - want.aux_loss)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_router_logits_are_asked_for_as_in_transformers(case):
    model = converted(case)
    ids = random_ids()
    with torch.no_grad():
        plain = model(ids)
        assert getattr(plain, "router_logits", None) is None
        asked = model(ids, output_router_logits=True)
        assert len(asked.router_logits) == LAYERS
        assert asked.loss is None
        assert torch.equal(asked.logits, plain.logits)
        with record_routing(model) as routings:
            model(ids)
        for scores, routing in zip(asked.router_logits, routings, strict=True):
            assert torch.equal(scores, routing.scores_TE)
        model.config.output_router_logits = True
        assert len(model(ids).router_logits) == LAYERS
        assert model(ids, output_router_logits=False).get("router_logits") is None


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_tuples_on_request(case):
    model = converted(case, losses=SPARSITY)
    ids = random_ids()
    with torch.no_grad():
        out = model(ids, labels=ids, output_router_logits=True)
        loss, aux, logits, *_, scores = model(
            ids, labels=ids, output_router_logits=True, return_dict=False
        )
        assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    assert torch.equal(loss, out.loss)
    assert torch.equal(aux, out.aux_loss)
    assert torch.equal(logits, out.logits)
    assert len(scores) == LAYERS


def test_arguments_may_be_positional_or_embeddings():
    model = converted(LLAMA, losses=SPARSITY)
    ids, mask, labels = padded(random_ids(), 4)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, labels=labels)
        by_place = model(ids, mask, labels=labels)
        embedded = model(
            inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, labels=labels
        )
    assert torch.equal(by_place.loss, want.loss)
    assert torch.equal(embedded.loss, want.loss)


def test_four_dimensional_mask_counts_every_token():
    model = converted(LLAMA, losses=SPARSITY)
    ids = random_ids()
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with torch.no_grad():
        want = model(ids, labels=ids)
        got = model(ids, attention_mask=causal, labels=ids)
    torch.testing.assert_close(got.loss, want.loss)


def test_mask_of_a_cached_step_covers_its_own_tokens():
    model = converted(LLAMA, losses=SPARSITY)
    ids, mask, _ = padded(random_ids(2, 8), 4)
    with torch.no_grad():
        past = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
        out = model(
            ids[:, 5:],
            past_key_values=past,
            attention_mask=mask,
            labels=ids[:, 5:],
            output_router_logits=True,
        )
    assert out.router_logits[0].shape == (6, EXPERTS)
    want = 0.7 * sparsity_by_hand(out.router_logits, torch.ones(2, 3))
    torch.testing.assert_close(out.aux_loss, want)


def test_without_losses_the_loss_is_the_language_models():
    model = converted(LLAMA)
    ids = random_ids()
    with torch.no_grad():
        out = model(ids, labels=ids)
    assert torch.equal(out.aux_loss, torch.zeros(()))
    torch.testing.assert_close(out.loss, lm_loss_by_hand(out.logits, ids))


def test_all_experts_on_has_no_layer_loss():
    model = converted(LLAMA, losses=SPARSITY)
    ids = random_ids()
    with torch.no_grad(), all_experts_on(model):
        out = model(ids, labels=ids, output_router_logits=True)
    assert out.aux_loss is None
    torch.testing.assert_close(out.loss, lm_loss_by_hand(out.logits, ids))


def test_coefficient_is_changed_here_and_in_the_config():
    model = converted(LLAMA, losses=SPARSITY)
    ids = random_ids()
    with torch.no_grad():
        before = model(ids, labels=ids).aux_loss
        model.set_loss_coef("sparsity", 1.4)
        after = model(ids, labels=ids).aux_loss
    torch.testing.assert_close(after, 2 * before)
    assert model.config.moesaic["losses"]["sparsity"]["coef"] == 1.4


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_accumulated_losses_are_those_of_the_whole_batch(case):
    dropouts = {name: 0.0 for name in dense_config(case).to_dict() if "drop" in name}
    model = converted(Case(case.model_type, dropouts), torch.float64, losses=SPARSITY).train()
    ids = random_ids(4, 9)
    whole = copy.deepcopy(model)
    out = whole(ids, labels=ids)
    out.loss.backward()
    total = 0.0
    for part in (ids[:1], ids[1:]):
        loss = model(part, labels=part, num_items_in_batch=torch.tensor(4 * 8)).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, out.loss.detach(), **FLOAT32)
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **FLOAT32, msg=name)


def test_accumulation_counts_labels_shifted_beforehand():
    model = converted(LLAMA, losses=SPARSITY)
    ids = random_ids()
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        want = model(ids, labels=ids, num_items_in_batch=torch.tensor(40))
        got = model(ids, labels=ids, shift_labels=shifted, num_items_in_batch=torch.tensor(40))
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_recomputation_changes_nothing(case):
    model = converted(case, dtype=torch.float64, losses=SPARSITY)
    again = copy.deepcopy(model)
    recompute(again, use_reentrant=False)
    ids = random_ids()
    losses = []
    for each in (model, again):
        each.train()
        torch.manual_seed(6)
        out = each(ids, labels=ids, use_cache=False)
        out.loss.backward()
        losses.append((out.loss.detach(), out.aux_loss.detach()))
    assert losses[0] == losses[1]
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_recomputation_that_loses_the_losses_gradient_is_refused():
    ids = random_ids()
    model = converted(LLAMA, losses=SPARSITY).train()
    recompute(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(InputError, match="use_reentrant=True gives the routing losses no gradient"):
        model(ids, labels=ids, use_cache=False)
    # Without such losses, or with nothing to learn, it is harmless.
    model.loss_terms.clear()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert moe_layers(model)[0].router.weight.grad.abs().max() > 0
    model.attach_losses()
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).aux_loss > 0


def test_recomputation_happens():
    model = converted(LLAMA).train()
    recompute(model, use_reentrant=False)
    calls = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda *_: calls.append(1))
    ids = random_ids()
    loss = model(ids, labels=ids, use_cache=False).loss
    assert len(calls) == LAYERS
    loss.backward()
    assert len(calls) == 2 * LAYERS


def test_no_hook_stays_behind():
    model = converted(LLAMA, losses=SPARSITY)
    ids = random_ids()
    model(ids, labels=ids)
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(ids, labels=ids, attention_mask=torch.ones(2, 1, 3, 3))
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_forward_keeps_the_parents_parameters(case):
    _, model_class = moesaic_classes(case.row)
    parent = inspect.signature(type(dense_model(case)).forward).parameters
    ours = dict(inspect.signature(model_class.forward).parameters)
    assert ours.pop("output_router_logits").default is None
    assert list(ours.items()) == list(parent.items())


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_fresh_model_from_its_config(case):
    model = converted(case, losses=SPARSITY)
    torch.manual_seed(7)
    fresh = AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is type(model)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert all(p.isfinite().all() for p in fresh.parameters())
    assert all(0.0 < layer.router.weight.std() < 0.1 for layer in moe_layers(fresh))
    assert fresh.loss_terms["sparsity"].coef == 0.7


def test_adopting_keeps_the_object_and_every_reader_of_its_config():
    dense = dense_model(LLAMA)
    dense.config._attn_implementation = "eager"
    old = dense.config
    model = cut(dense)
    assert model is dense
    assert model.config.model_type == "moesaic_llama"
    assert model.config._attn_implementation == "eager"
    assert not any(getattr(module, "config", None) is old for module in model.modules())


def test_classes_have_one_identity_and_survive_pickling():
    config_class, model_class = moesaic_classes(LLAMA.row)
    assert modeling.MoesaicLlamaConfig is config_class
    assert modeling.MoesaicLlamaForCausalLM is model_class
    model = converted(LLAMA)
    copied = pickle.loads(pickle.dumps(model.config))
    assert type(copied) is config_class
    assert copied.to_dict() == model.config.to_dict()
    with pytest.raises(AttributeError, match="MoesaicBloomConfig"):
        modeling.MoesaicBloomConfig  # noqa: B018
