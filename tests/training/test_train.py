"""Training as a whole: what trains, what is logged, the budget, and resuming to the bit."""

import dataclasses
import json
import shutil

import pytest
import torch
from calibration_cases import BLOCK, LLAMA, Killed, Watch, make_text
from model_cases import Case, converted, dense_model, random_ids, same_state

from moesaic._errors import InputError
from moesaic.conversion.dsmoe import DSMoE, convert_dsmoe
from moesaic.nn.layer import moe_layers
from moesaic.training import TrainConfig, train, trainer
from moesaic.training.run import METRICS, clean
from moesaic.training.teacher import ask_teacher


def start(case=LLAMA):
    config = DSMoE(experts=4, init="open", partition="contiguous", sparse_coef=0.1)
    return convert_dsmoe(dense_model(case), None, config)[0]


def settings(**options):
    steps = options.pop("steps", 4)
    values = {"tokens": steps * 2 * BLOCK, "checkpoint_every": 2, "active": 0.6}
    values |= {"batch_blocks": 2, **options}
    return TrainConfig(**values)


@pytest.mark.parametrize("trains", ["routers", "ffn", "everything", "lora"])
def test_only_what_should_train_changes(trains, tmp_path):
    before = {name: p.clone() for name, p in start().state_dict().items()}
    model, _ = train(start(), make_text(), settings(trains=trains, language=0.5), tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys(), "adapters are merged"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    routers = {name for name in before if ".router." in name}
    experts = {name for name in before if ".experts." in name}
    assert routers <= changed
    if trains == "routers":
        assert changed == routers
    elif trains == "ffn":
        assert changed == routers | experts
    elif trains == "lora":
        assert not changed & experts
        assert any("q_proj" in name for name in changed)
    else:
        assert changed == set(before)


def test_every_step_is_logged(tmp_path):
    _, results = train(start(), make_text(), settings(tensorboard=True), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == results["log"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["tokens"] == line["step"] * 2 * BLOCK
        assert line["loss"] == pytest.approx(line["kl"] + line["aux"], rel=1e-5)
        assert len(line["active_per_layer"]) == 2
        assert line["active_per_domain"].keys() == {"noise"}
        assert line["aux"] == pytest.approx(line["sparse_coef"] * line["active"], rel=0.05)
    assert lines[0]["active"] == 1.0
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-4), "an open model is its own teacher"
    assert list(tmp_path.rglob("events.out.tfevents*"))
    clean(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_training_goes_on_to_the_bit(stop_after, tmp_path):
    whole, results = train(start(), make_text(), settings(), tmp_path / "whole")
    with pytest.raises(Killed):
        train(
            start(),
            make_text(),
            settings(),
            tmp_path / "cut",
            Watch(stop_after * 2 * BLOCK - 1),
        )
    again, same = train(start(), make_text(), settings(), tmp_path / "cut")
    assert same == results
    same_state(whole, again)


@pytest.mark.parametrize("trains", ["ffn", "lora"])
def test_mixed_precision_multiplies_in_half_and_keeps_whole_weights(trains, tmp_path, monkeypatch):
    asked = []
    ask = trainer.ask_teacher
    monkeypatch.setattr(
        trainer, "ask_teacher", lambda *args, **kw: asked.append(ask(*args, **kw)) or asked[-1]
    )
    options = {"trains": trains, "match": 1.0, "learning_rate": 0.0, "router_learning_rate": 0.0}
    _, whole = train(start(), make_text(), settings(**options), tmp_path / "whole")
    halves = settings(**options, mixed_precision="bfloat16")
    model, half = train(start(), make_text(), halves, tmp_path / "half")
    assert [out.logits.dtype for out in asked] == [torch.float32] * 4 + [torch.bfloat16] * 4
    for (name, p), q in zip(model.named_parameters(), start().parameters(), strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, msg=name)
    for x, y in zip(whole["log"], half["log"], strict=True):
        assert x["active"] == y["active"], "routers decide in float32"
        assert x["match"] == y["match"] == 0.0, "an open model computes as its teacher does"


def test_mixed_precision_goes_on_to_the_bit(tmp_path):
    halves = settings(mixed_precision="bfloat16")
    whole, results = train(start(), make_text(), halves, tmp_path / "whole")
    with pytest.raises(Killed):
        train(start(), make_text(), halves, tmp_path / "cut", Watch(2 * 2 * BLOCK - 1))
    again, same = train(start(), make_text(), halves, tmp_path / "cut")
    assert same == results
    same_state(whole, again)


def test_training_reaches_the_budget(tmp_path):
    _, results = train(
        start(),
        make_text(),
        settings(steps=60, active=0.5, router_learning_rate=0.3, budget_rate=20.0, batch_blocks=2),
        tmp_path,
    )
    last = [line["active"] for line in results["log"][-10:]]
    assert sum(last) / len(last) < 0.8, "the coefficient has pushed gates off"
    assert max(line["sparse_coef"] for line in results["log"]) > 1.0


def test_accumulation_gives_the_same_step(tmp_path):
    one, a = train(start(), make_text(), settings(), tmp_path / "one")
    two, b = train(start(), make_text(), settings(accumulate=2), tmp_path / "two")
    for x, y in zip(a["log"], b["log"], strict=True):
        assert x["kl"] == pytest.approx(y["kl"], abs=1e-4)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-2, msg=name)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one step of 32, got 31"):
        train(start(), make_text(), TrainConfig(tokens=31, batch_blocks=2), tmp_path)
    with pytest.raises(InputError, match="needs the sparsity loss"):
        train(dense_model(LLAMA), make_text(), settings(), tmp_path)
    train(start(), make_text(), settings(steps=1), tmp_path)
    with pytest.raises(InputError, match="training with other settings; choose"):
        train(start(), make_text(), settings(steps=2), tmp_path)


def test_another_model_does_not_go_on_from_this_ones_checkpoint(tmp_path):
    train(start(), make_text(), settings(), tmp_path)
    other = start()
    with torch.no_grad():
        next(other.parameters()).mul_(2.0)
    with pytest.raises(InputError, match="training with other model; choose"):
        train(other, make_text(), settings(), tmp_path)


def test_a_line_cut_by_a_kill_is_written_again(tmp_path):
    whole, results = train(start(), make_text(), settings(), tmp_path / "whole")
    train(start(), make_text(), settings(), tmp_path / "cut")
    with (tmp_path / "cut" / METRICS).open("a") as handle:
        handle.write('{"step": 5, "to')
    again, resumed = train(start(), make_text(), settings(), tmp_path / "cut")
    assert resumed["log"] == results["log"]
    same_state(again, whole)


@pytest.mark.parametrize("left", ["", '{"global_step": 4, "ep'])
def test_a_checkpoint_cut_by_a_kill_is_passed_over(left, tmp_path):
    whole, results = train(start(), make_text(), settings(), tmp_path / "whole")
    with pytest.raises(Killed):
        train(start(), make_text(), settings(), tmp_path / "cut", Watch(3 * 2 * BLOCK - 1))
    (newest,) = (tmp_path / "cut").glob("checkpoint-*")
    shutil.copytree(newest, newest.with_name("checkpoint-4"))
    newest.with_name("checkpoint-4").joinpath("trainer_state.json").write_text(left)
    again, resumed = train(start(), make_text(), settings(), tmp_path / "cut")
    assert resumed == results
    same_state(again, whole)


def test_a_kill_during_the_cleaning_leaves_nothing_to_resume_from(tmp_path, monkeypatch):
    whole, _ = train(start(), make_text(), settings(), tmp_path)

    def killed(path):
        (path / "model.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.training.run.shutil.rmtree", killed)
        with pytest.raises(Killed):
            clean(tmp_path)
    again, _ = train(start(), make_text(), settings(), tmp_path)
    same_state(again, whole)


@pytest.mark.parametrize("trains", ["ffn", "lora"])
@pytest.mark.parametrize("stop_after", [3, 4])
def test_resuming_takes_up_all_that_trained(trains, stop_after, tmp_path):
    whole, results = train(start(), make_text(), settings(trains=trains), tmp_path / "whole")
    if stop_after == 4:
        # Killed after the last checkpoint, before the result was saved.
        train(start(), make_text(), settings(trains=trains), tmp_path / "cut")
    else:
        watch = Watch(stop_after * 2 * BLOCK - 1)
        with pytest.raises(Killed):
            train(start(), make_text(), settings(trains=trains), tmp_path / "cut", watch)
    again, same = train(start(), make_text(), settings(trains=trains), tmp_path / "cut")
    assert same == results
    same_state(again, whole)
    assert again.config.moesaic == whole.config.moesaic, "coefficient and threshold too"


@pytest.mark.parametrize("trains", ["routers", "ffn", "everything", "lora"])
def test_the_teacher_stays_the_dense_parent_all_through(trains, tmp_path, monkeypatch):
    ids = random_ids()
    asked = []

    def watched(teacher, **inputs):
        out = ask_teacher(teacher, **inputs)
        asked.append(ask_teacher(teacher, hidden=False, input_ids=ids).logits)
        return out

    monkeypatch.setattr("moesaic.training.trainer.ask_teacher", watched)
    rates = {"learning_rate": 0.1, "router_learning_rate": 0.1}
    train(start(), make_text(), settings(trains=trains, **rates), tmp_path)
    with torch.no_grad():
        want = dense_model(LLAMA)(ids).logits
    assert len(asked) == 4
    for logits in asked:
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_hidden_states_are_matched_with_or_without_logits(tmp_path):
    """An open model is its own teacher at the first step; its logits follow its hidden states."""
    rates = {"learning_rate": 0.01, "router_learning_rate": 0.01}
    _, both = train(start(), make_text(), settings(match=2.0, **rates), tmp_path / "both")
    _, alone = train(start(), make_text(), settings(match=2.0, distill=0.0), tmp_path / "alone")
    for line in both["log"]:
        parts = line["kl"] + 2.0 * line["match"] + line["aux"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert both["log"][0]["match"] == pytest.approx(0.0, abs=1e-6)
    assert both["log"][-1]["match"] > 1e-6
    assert all("kl" not in line for line in alone["log"])


def test_adapters_fit_the_transposed_layers_of_gpt2(tmp_path):
    case = Case("gpt2", {})
    before = {name: p.clone() for name, p in start(case).state_dict().items()}
    model, _ = train(start(case), make_text(), settings(trains="lora"), tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {name.split(".")[-2] for name in changed}
    assert kinds == {"router", "c_attn", "c_proj"}
    assert not any(".experts." in name for name in changed)


def test_a_budget_is_refused_before_training_where_it_cannot_be_met(tmp_path):
    losses = {"sparsity": {"coef": 0.1}}
    model = converted(LLAMA, losses=losses, router="topk-softmax", router_options={})
    with pytest.raises(InputError, match="layer 0 has topk-softmax; set active to 0"):
        train(model, make_text(), settings(), tmp_path)
    model = start()
    moe_layers(model)[1].router = None
    with pytest.raises(InputError, match="layer 1 has no router; set active to 0"):
        train(model, make_text(), settings(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_active_fractions_are_told_by_domain(tmp_path):
    text = make_text()
    names = ("even", "odd")
    text = dataclasses.replace(text, domains=names, domain_N=(text.document_N % 2).astype("int16"))
    _, results = train(start(), text, settings(router_learning_rate=0.1, steps=6), tmp_path)
    seen = set()
    for line in results["log"]:
        told = line["active_per_domain"]
        seen |= told.keys()
        assert told.keys() <= set(names)
        assert line["active"] == pytest.approx(
            sum(line["active_per_layer"]) / len(line["active_per_layer"]), abs=1e-4
        )
        # Two blocks a step: one of each domain, or two of one.
        assert line["active"] == pytest.approx(sum(told.values()) / len(told), abs=1e-4)
    assert seen == set(names)
    assert any(len(set(line["active_per_domain"].values())) == 2 for line in results["log"])
