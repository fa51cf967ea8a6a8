"""Training health: counts equal a plain recount in every architecture, once for each token."""

import json
import logging
import math

import pytest
import torch
from health_cases import (
    ARCHITECTURES,
    EXPERTS,
    TOP_K,
    RecountTrainer,
    arguments,
    build,
    routers,
    text,
)
from torch import distributed, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer, record_routing
from moesaic.training.health import HealthConfig, HealthMonitor, TrainingHealth
from moesaic.training.health.findings import findings, join, load
from moesaic.training.health.reading import Decision, gate_of
from moesaic.training.health.watch import LayerSums


def lines_of(directory):
    return [json.loads(line) for line in (directory / "health.jsonl").read_text().splitlines()]


def run(directory, model, *, config=None, resume=None, callbacks=(), **options):
    trainer = RecountTrainer(
        model,
        arguments(directory, **options),
        train_dataset=text(20),
        eval_dataset=text(3, seed=1),
        callbacks=list(callbacks),
    )
    trainer.add_callback(TrainingHealth(trainer, config))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


# The pass of the recount has no gradients, and this kind of checkpointing says so.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "saved"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_are_those_of_a_plain_recount(name, checkpointing, tmp_path):
    model = build(name)
    if checkpointing != "none":
        # The name of before transformers 5.20.
        old = "gradient_checkpointing_enable"
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, old)
        enable({"use_reentrant": checkpointing == "reentrant"})
    # Evaluation between the steps counts nothing.
    trainer = run(tmp_path, model, eval_strategy="steps", eval_steps=1)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        counted = {layer["name"]: layer["counts"] for layer in line["layers"]}
        recount = trainer.recount[line["step"]]
        assert counted == {name: counts.tolist() for name, counts in recount.items()}
        for layer in line["layers"]:
            assert sum(layer["counts"]) == TOP_K * layer["tokens"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_entropy_and_saturation_are_those_of_the_logits(name, tmp_path):
    trainer = run(tmp_path, build(name), max_steps=1)
    (line,) = lines_of(tmp_path)
    for layer in line["layers"]:
        logits_TE = torch.cat(trainer.logits[layer["name"]])
        if ARCHITECTURES[name][1]:
            gates_TE = logits_TE.sigmoid()
            p_TE = gates_TE / gates_TE.sum(1, keepdim=True)
        else:
            p_TE = logits_TE.softmax(-1)
            strong = (p_TE.amax(1) > 0.99).float().mean()
            assert layer["saturation"] == pytest.approx(float(strong), abs=1e-6)
        entropy = -(p_TE * p_TE.log()).sum(1).mean() / math.log(EXPERTS)
        assert layer["entropy"] == pytest.approx(float(entropy), abs=1e-5)


class Beside(nn.Module):
    """Layers that all see the same tokens."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, h):
        return sum(layer(h) for layer in self.layers)


def test_our_layers_count_as_their_routing_says(tmp_path):
    torch.manual_seed(0)
    options = {"num_experts": EXPERTS, "width": 8}
    model = Beside(
        MoELayer(16, LayerConfig(**options, router="topk-softmax")),
        MoELayer(16, LayerConfig(**options, router="sigmoid-threshold")),
        MoELayer(16, LayerConfig(**options, router="null-experts")),
    )
    h = torch.randn(3, 5, 16)
    with record_routing(model) as routings:
        model(h)
    with HealthMonitor(model, tmp_path / "health.jsonl") as health:
        model(h).sum().backward()
        scalars = health.end_step()
    (line,) = lines_of(tmp_path)
    assert line["tokens"] == 15
    for layer, routing in zip(line["layers"], routings, strict=True):
        assert layer["counts"] == routing.counts_E().tolist()
        assert layer["entropy"] is not None
    assert scalars["experts/load"] == max(load(layer["counts"]) for layer in line["layers"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_evaluation_and_passes_without_gradient_count_nothing(tmp_path):
    model = build("Mixtral")
    batch = {"input_ids": torch.arange(1, 13).reshape(1, 12)}
    with HealthMonitor(model, tmp_path / "health.jsonl") as health:
        model.eval()(**batch)
        model.train()
        with torch.no_grad():
            model(**batch)
        assert health.end_step() == {}
        model(**batch)
        assert health.end_step()
    assert [line["tokens"] for line in lines_of(tmp_path)] == [12]


def test_the_tokens_of_all_processes_are_added(tmp_path, monkeypatch):
    model = build("Mixtral")
    batch = {"input_ids": torch.arange(1, 13).reshape(1, 12)}
    with HealthMonitor(model, tmp_path / "one" / "health.jsonl") as health:
        model(**batch)
        health.end_step()
    # A second process that saw the same text.
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    with HealthMonitor(model, tmp_path / "two" / "health.jsonl") as health:
        model(**batch)
        health.end_step()
    (one,), (two,) = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert two["tokens"] == 2 * one["tokens"]
    for alone, both in zip(one["layers"], two["layers"], strict=True):
        assert both["counts"] == [2 * count for count in alone["counts"]]
        assert both["entropy"] == pytest.approx(alone["entropy"])


def test_the_inner_model_may_be_called_alone(tmp_path):
    model = build("Qwen3Moe")
    with HealthMonitor(model, tmp_path / "health.jsonl") as health:
        model.model(input_ids=torch.arange(1, 13).reshape(1, 12))
        health.end_step()
    assert [line["tokens"] for line in lines_of(tmp_path)] == [12]


def kill(model, expert):
    """Let no token choose an expert: a choice bias does what a router's rows cannot surely do."""
    for router in routers(model).values():
        router.e_score_correction_bias[expert] = -100.0


@pytest.mark.parametrize("name", ["DeepseekV3", "Glm4Moe"])
def test_a_dead_expert_gets_one_warning(name, tmp_path, caplog):
    model = build(name)
    kill(model, 5)
    config = HealthConfig(window=2, min_tokens=1, max_load=7.9)
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        run(tmp_path, model, config=config)
    warnings = [w for line in lines_of(tmp_path) for w in line["warnings"] if w["kind"] == "dead"]
    assert len(warnings) == len(routers(model))
    for warning in warnings:
        assert "over 2 steps" in warning["sentence"]
        assert "5" in warning["sentence"].partition("(")[2].partition(")")[0].split(", ")
        assert "copy a busy expert" in warning["sentence"]
        assert sum(warning["sentence"] in record.message for record in caplog.records) == 1


class Stop(Exception):
    """The power goes."""


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Stop


@pytest.mark.parametrize("name", ["GptOss", "Mixtral"])
def test_killed_and_resumed_the_history_is_that_of_one_run(name, tmp_path):
    config = HealthConfig(window=2, min_tokens=1, max_load=1.5)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    run(tmp_path / "whole", build(name), config=config, **options)
    whole = (tmp_path / "whole" / "health.jsonl").read_text()
    assert '"kind": "load"' in whole

    place = tmp_path / "cut"
    with pytest.raises(Stop):
        run(place, build(name), config=config, callbacks=[Kill()], **options)
    # No checkpoint knows of the fifth step, and the sixth was cut in the middle of its line.
    with (place / "health.jsonl").open("a") as handle:
        handle.write('{"step": 6, "la')
    assert (place / "health.jsonl").read_text().count("\n") == 5
    last = str(place / "checkpoint-4")
    # Without this, the Trainer of transformers 5.23 resumes with fresh experts: docs/traps.md.
    model = AutoModelForCausalLM.from_pretrained(last)
    run(place, model, config=config, resume=last, **options)
    assert (place / "health.jsonl").read_text() == whole


def test_lines_of_several_steps_close_at_a_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 7}
    trainer = run(tmp_path, build("Olmoe"), config=HealthConfig(every=3), **options)
    lines = lines_of(tmp_path)
    assert [(line["step"], line["steps"]) for line in lines] == [(3, 3), (5, 2), (7, 2)]
    recount = sum(next(iter(step.values())) for step in trainer.recount.values())
    counted = torch.tensor([line["layers"][0]["counts"] for line in lines]).sum(0)
    assert counted.tolist() == recount.tolist()


def test_reporters_get_the_worst_of_all_layers_and_still_the_loss(tmp_path):
    got = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            got.append((state.global_step, dict(logs)))

    run(tmp_path, build("Mixtral"), callbacks=[Reporter()], logging_steps=2)
    lines = lines_of(tmp_path)
    for step in (2, 4):
        logged = {name: value for at, logs in got if at == step for name, value in logs.items()}
        layers = lines[step - 1]["layers"]
        assert logged["experts/load"] == max(load(layer["counts"]) for layer in layers)
        assert logged["experts/entropy"] == min(layer["entropy"] for layer in layers)
        assert logged["loss"] > 0
    assert not any("experts/load" in logs for step, logs in got if step in (1, 3))


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="Sequential has no layer with a router and experts"):
        HealthMonitor(nn.Sequential(nn.Linear(2, 2)), tmp_path / "health.jsonl")


def test_history_of_another_model_is_refused(tmp_path):
    path = tmp_path / "health.jsonl"
    model = build("Mixtral")
    with HealthMonitor(model, path) as health:
        model(input_ids=torch.arange(1, 13).reshape(1, 12))
        health.end_step()
    with pytest.raises(InputError, match="history of a model with other experts"):
        HealthMonitor(build("DeepseekV3"), path, step=1)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(InputError, match="is no history of training health"):
        HealthMonitor(model, path, step=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("every", 0, "every must be at least 1, got 0"),
        ("max_load", 1.0, r"max_load must be above 1, got 1\.0"),
        ("min_entropy", 2.0, r"min_entropy must be in \[0, 1\], got 2\.0"),
        ("every", 60, "window must be at least every=60, got 50"),
    ],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(InputError, match=message):
        HealthConfig(**{field: value})


def sums(counts, entropy=0.5, saturation=0.0):
    return LayerSums("layer", sum(counts), tuple(counts), entropy, saturation)


def test_findings_by_hand():
    config = HealthConfig(min_tokens=10, max_load=3.0)
    # Mean 25; the busiest has 3.88 times as much, the last under a hundredth of it.
    kinds = [f.kind for f in findings(sums([97, 2, 1, 0]), 50, config)]
    assert kinds == ["load", "dead"]
    assert load([97, 2, 1, 0]) == 3.88
    # Too few tokens say nothing about loads.
    assert findings(sums([36, 0, 0, 0]), 50, config) == []
    kinds = [f.kind for f in findings(sums([25] * 4, 0.01, 0.95), 50, config)]
    assert kinds == ["entropy", "saturation"]


def test_stretches_add_up_by_their_tokens():
    joined = join([sums([30, 0], 0.9, None), sums([0, 10], 0.1, 0.5)])
    assert (joined.tokens, joined.counts) == (40, (30, 10))
    assert joined.entropy == pytest.approx(0.7)
    assert joined.saturation == 0.5


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_tell_the_gate(top_k, scale, dtype):
    scores_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for gate, gates_TE in (
        ("softmax", scores_TE.softmax(-1)),
        ("sigmoid", scores_TE.sigmoid()),
    ):
        gates_TK, ids_TK = gates_TE.topk(top_k)
        for weights_TK in (gates_TK, gates_TK / gates_TK.sum(1, keepdim=True)):
            found = gate_of(Decision(ids_TK, (weights_TK * scale).to(dtype), scores_TE), 8)
            # One gate over itself is one, whatever it was.
            assert found == (None if top_k == 1 and weights_TK is not gates_TK else gate)
    alike = Decision(ids_TK, torch.full((64, top_k), 0.5), torch.zeros(64, 8))
    assert gate_of(alike, 8) is None
