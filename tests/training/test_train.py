"""Training as a whole: what trains, what is logged, the budget, and resuming to the bit."""

import json

import pytest
import torch
from calibration_cases import BLOCK, LLAMA, Killed, Watch, make_text
from model_cases import dense_model, same_state

from moesaic._errors import InputError
from moesaic.conversion.dsmoe import DSMoE, convert_dsmoe
from moesaic.training import TrainConfig, train
from moesaic.training.run import METRICS, clean


def start():
    config = DSMoE(experts=4, init="open", partition="contiguous", sparse_coef=0.1)
    return convert_dsmoe(dense_model(LLAMA), None, config)[0]


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
    with pytest.raises(InputError, match="no routed layer"):
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
