"""What people put around a transformers model works: the Trainer and PEFT."""

import copy

import pytest
import torch
from model_cases import ROWS, Case, converted, random_ids, same_state
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moesaic
from moesaic.models import new_manifest
from moesaic.nn.layer import moe_layers

LLAMA = Case("llama", {})
LOSSES = {"sparsity": {"coef": 0.7}}
# Where the attention projections have other names.
TARGETS = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}


def trained_parameters(model, before):
    """Names of the parameters that differ from before."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def step(model):
    """One step of plain gradient descent; returns which parameters it changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    ids = random_ids()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    return trained_parameters(model, before)


def trainer(model, path, **options):
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    # The domain is a column that the model does not take.
    rows = [{"input_ids": ids, "labels": ids, "domain": "docs"} for ids in random_ids(4, 9)]
    return Trainer(model, arguments, train_dataset=rows)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_trainer_takes_a_step(case, tmp_path):
    model = converted(case, losses=LOSSES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(model, tmp_path, per_device_train_batch_size=2)
    assert run.model_accepts_loss_kwargs
    run.train()
    changed = trained_parameters(model, before)
    assert {name for name in before if "router" in name or "experts" in name} <= changed
    assert all(p.isfinite().all() for p in model.parameters())
    run.save_model(str(tmp_path / "model"))
    same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


def test_trainer_accumulates_to_the_same_step(tmp_path):
    model = converted(LLAMA, losses=LOSSES)
    halves = copy.deepcopy(model)
    whole = trainer(model, tmp_path, per_device_train_batch_size=4)
    parts = trainer(halves, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    losses = [run.train().training_loss for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_lora_on_attention_with_routers_in_full(case, tmp_path):
    model = converted(case, losses=LOSSES)
    ids = random_ids()
    with torch.no_grad():
        base = model(ids, labels=ids)
    wrapped = lora(
        model,
        target_modules=TARGETS.get(case.model_type, ["q_proj", "v_proj"]),
        modules_to_save=["router"],
        fan_in_fan_out=case.model_type == "gpt2",
    )
    with torch.no_grad():
        start = wrapped(input_ids=ids, labels=ids)
    torch.testing.assert_close(start.loss, base.loss)
    torch.testing.assert_close(start.aux_loss, base.aux_loss)
    changed = step(wrapped)
    assert all("lora_" in name or "router.modules_to_save" in name for name in changed)
    assert sum("lora_B" in name for name in changed) >= 2
    assert sum("router.modules_to_save" in name for name in changed) == 2
    with torch.no_grad():
        trained = wrapped(input_ids=ids, labels=ids)
    assert (trained.logits - base.logits).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    assert type(merged) is type(model)
    with torch.no_grad():
        after = merged(ids, labels=ids)
    torch.testing.assert_close(after.logits, trained.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.aux_loss, trained.aux_loss)
    moesaic.save(merged, tmp_path / "model", new_manifest("parent", merged))
    same_state(moesaic.load(tmp_path / "model"), merged)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_lora_on_the_experts_themselves(model_type):
    model = converted(Case(model_type, {}), losses=LOSSES)
    ids = random_ids()
    up = "gate_up_proj" if model_type == "llama" else "up_proj"
    wrapped = lora(model, target_parameters=[f"experts.{up}", "experts.down_proj"])
    with torch.no_grad():
        start = wrapped(input_ids=ids)
    changed = step(wrapped)
    assert changed
    assert all("lora_" in name for name in changed)
    with torch.no_grad():
        trained = wrapped(input_ids=ids)
    assert (trained.logits - start.logits).abs().max() > 1e-3
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained.logits, rtol=1e-4, atol=1e-5)


def test_adapters_off_and_all_experts_on_is_the_dense_parent():
    """The teacher of self-distillation under LoRA is the same weights."""
    model = converted(LLAMA, losses=LOSSES)
    ids = random_ids()
    with torch.no_grad(), moesaic.all_experts_on(model):
        want = model(ids).logits
    wrapped = lora(
        model,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        modules_to_save=["router"],
    )
    step(wrapped)
    with torch.no_grad():
        with wrapped.disable_adapter(), moesaic.all_experts_on(wrapped):
            off = wrapped(input_ids=ids).logits
        with moesaic.all_experts_on(wrapped):
            on = wrapped(input_ids=ids).logits
    assert torch.equal(off, want)
    assert (on - want).abs().max() > 1e-3


def test_lora_under_recomputation_is_the_same_step():
    results = []
    for recompute in (False, True):
        wrapped = lora(
            converted(LLAMA, losses=LOSSES),
            target_modules=["q_proj"],
            modules_to_save=["router"],
        )
        if recompute:
            base = wrapped.get_base_model()
            switch = getattr(base, "activation_checkpointing_enable", None)
            (switch or base.gradient_checkpointing_enable)({"use_reentrant": False})
            wrapped.enable_input_require_grads()
        step(wrapped)
        results.append({k: v.detach() for k, v in wrapped.named_parameters() if "lora" in k})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_layers_are_found_through_wrappers():
    model = converted(LLAMA)
    assert len(moe_layers(lora(model, target_modules=["q_proj"]))) == 2
