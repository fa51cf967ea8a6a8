"""Training what has no routers, no spare neurons or no weights in places: the same for all."""

import json

import pytest
import torch
from calibration_cases import BLOCK, LLAMA, Killed, Watch, make_text
from model_cases import (
    DIM,
    WIDTH,
    Case,
    cut,
    dense_model,
    layer_config,
    random_ids,
    read_all,
    same_state,
)

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.conversion.dsmoe import DSMoE, convert_dsmoe
from moesaic.models.ffn import decoder_layers, fill_experts, put_layer
from moesaic.models.modeling import adopt
from moesaic.nn.layer import MoELayer, moe_layers
from moesaic.training import TrainConfig, train
from moesaic.training.run import METRICS
from moesaic.training.trainer import DistillTrainer
from moesaic.training.zeros import pruned_zeros, zeros_kept

PLAIN = Case("gpt2", {})


def settings(**options):
    values = {"tokens": 4 * 2 * BLOCK, "batch_blocks": 2, "checkpoint_every": 2, "active": 0.0}
    return TrainConfig(**values | options)


def narrow(case=LLAMA):
    """A model of half the neurons, as structured pruning leaves it."""
    model = dense_model(case)
    ffns = [ffn.keep(torch.arange(WIDTH // 2)) for ffn in read_all(model)]
    options = {"num_experts": 0, "width": 0, "shared_width": WIDTH // 2, "router": ""}
    configs = [layer_config(case.row, ffn, **options) for ffn in ffns]
    layers = [to_plain(config) for config in configs]
    model = adopt(model, {"layers": layers, "losses": {}, "dense_width": WIDTH})
    for layer, ffn, config in zip(decoder_layers(model), ffns, configs, strict=True):
        moe = MoELayer(DIM, config)
        fill_experts(moe, ffn)
        put_layer(layer, case.row, moe)
    return model.eval()


def masked(case=LLAMA, share=0.5):
    """A model whose smallest weights are zero, as unstructured pruning leaves it."""
    model = cut(dense_model(case), num_experts=0, width=0, shared_width=WIDTH, router="")
    with torch.no_grad():
        for layer in moe_layers(model):
            for p in layer.shared.parameters():
                if p.dim() == 3:
                    p[p.abs() < p.abs().flatten().quantile(share)] = 0
    return model


def thin(case=LLAMA):
    """An ordinary dense model of half the neurons, as pruning of whole channels leaves one."""
    return dense_model(Case(case.model_type, {**case.options, "intermediate_size": WIDTH // 2}))


def fixed():
    """A model whose router always chooses two of four experts."""
    return cut(dense_model(LLAMA), router="topk-softmax", router_options={"top_k": 2})


def parent(case=LLAMA):
    return dense_model(case)


@pytest.mark.parametrize("make", [narrow, masked, fixed, thin])
def test_every_kind_of_model_trains_against_its_parent(make, tmp_path):
    before = {name: p.clone() for name, p in make().state_dict().items()}
    model, results = train(make(), make_text(), settings(), tmp_path, teacher=parent())
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed
    assert all(".mlp." in name for name in changed), "only networks and routers train"
    routed = any(layer.router is not None for layer in moe_layers(model))
    assert any(".router." in name for name in changed) == routed
    for line in results["log"]:
        assert line["kl"] > 0
        assert line["loss"] == pytest.approx(line["kl"] + line["aux"], rel=1e-5)
        assert line["active"] == (pytest.approx(0.5) if routed else 1.0)
    assert "threshold" not in results
    assert json.loads((tmp_path / METRICS).read_text().splitlines()[0]) == results["log"][0]


def test_training_lowers_the_divergence(tmp_path):
    config = settings(tokens=30 * 2 * BLOCK, learning_rate=0.01, checkpoint_every=100)
    _, results = train(masked(), make_text(), config, tmp_path, teacher=parent())
    log = results["log"]
    assert log[-1]["kl"] < 0.7 * log[0]["kl"]


def test_the_given_teacher_is_asked_and_frozen(tmp_path):
    # The dense parent cut open is its own teacher, so both ways give the same losses.
    config = DSMoE(experts=4, init="open", partition="contiguous", sparse_coef=0.1)
    runs = []
    for number, teacher in enumerate([None, parent()]):
        model = convert_dsmoe(parent(), None, config)[0]
        _, results = train(
            model, make_text(), settings(active=0.6), tmp_path / str(number), teacher=teacher
        )
        runs.append(results["log"])
    for own, given in zip(*runs, strict=True):
        assert given["loss"] == pytest.approx(own["loss"], abs=1e-5)
    teacher = parent()
    train(narrow(), make_text(), settings(learning_rate=0.1), tmp_path / "f", teacher=teacher)
    same_state(teacher, parent())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize("case", [LLAMA, PLAIN], ids=str)
def test_one_step_moves_no_pruned_weight(case, tmp_path):
    start = masked(case)
    zeros = {n: p == 0 for n, p in start.named_parameters() if p.dim() == 3}
    assert all(0.4 < zero.float().mean() < 0.6 for zero in zeros.values())
    config = settings(tokens=2 * BLOCK, learning_rate=0.1)
    model, _ = train(masked(case), make_text(), config, tmp_path, teacher=parent(case))
    before = dict(start.named_parameters())
    for name, p in model.named_parameters():
        if name in zeros:
            assert torch.equal(p == 0, zeros[name]), name
            assert not torch.equal(p, before[name]), "the others have moved"


@pytest.mark.parametrize("stop_after", [1, 3])
def test_zeros_stay_and_bits_match_after_an_interruption(stop_after, tmp_path):
    config = settings(learning_rate=0.05)
    whole, _ = train(masked(), make_text(), config, tmp_path / "whole", teacher=parent())
    watch = Watch(stop_after * 2 * BLOCK - 1)
    with pytest.raises(Killed):
        train(masked(), make_text(), config, tmp_path / "cut", watch, teacher=parent())
    again, _ = train(masked(), make_text(), config, tmp_path / "cut", teacher=parent())
    same_state(whole, again)
    for one, start in zip(moe_layers(again), moe_layers(masked()), strict=True):
        assert torch.equal(one.shared.down_proj == 0, start.shared.down_proj == 0)


def test_accumulated_gradients_are_masked_too(tmp_path):
    config = settings(accumulate=2, learning_rate=0.1)
    model, _ = train(masked(), make_text(), config, tmp_path, teacher=parent())
    for one, start in zip(moe_layers(model), moe_layers(masked()), strict=True):
        assert torch.equal(one.shared.gate_up_proj == 0, start.shared.gate_up_proj == 0)


def test_what_starts_at_zero_without_being_pruned_trains(tmp_path):
    model = fixed()
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.zero_()
            # As dequantised matrices are: one weight in two hundred.
            layer.experts.down_proj.view(-1)[::200] = 0
    stray = [layer.experts.down_proj == 0 for layer in moe_layers(model)]
    assert pruned_zeros(model) == []
    model, _ = train(model, make_text(), settings(learning_rate=0.1), tmp_path, teacher=parent())
    for layer, zero in zip(moe_layers(model), stray, strict=True):
        assert layer.router.weight.count_nonzero() > 0
        assert layer.experts.down_proj[zero].count_nonzero() > 0


def test_no_hook_is_left():
    model = masked()
    with pytest.raises(KeyError), zeros_kept(model):
        raise KeyError
    ids = random_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    grad = moe_layers(model)[0].shared.down_proj.grad
    assert grad[moe_layers(model)[0].shared.down_proj == 0].count_nonzero() > 0


@pytest.mark.parametrize("make", [narrow, masked, thin])
def test_a_model_that_lacks_weights_is_not_its_own_teacher(make, tmp_path):
    with pytest.raises(InputError, match="cannot be its own teacher; give train the dense parent"):
        train(make(), make_text(), settings(), tmp_path)
    assert not tmp_path.joinpath("train.json").exists()
    # The text alone needs no teacher.
    _, results = train(make(), make_text(), settings(distill=0, language=1.0), tmp_path)
    assert results["log"][0]["loss"] == pytest.approx(results["log"][0]["language"])


def test_what_cannot_work_with_a_teacher_is_refused(tmp_path):
    model = fixed()
    with pytest.raises(InputError, match="teacher is the model itself"):
        train(model, make_text(), settings(), tmp_path, teacher=model)
    with pytest.raises(InputError, match="needs the sparsity loss; convert"):
        train(narrow(), make_text(), settings(active=0.5), tmp_path, teacher=parent())
    with pytest.raises(InputError, match="no routers, and trains is 'routers'; set trains"):
        train(narrow(), make_text(), settings(trains="routers"), tmp_path, teacher=parent())
    train(narrow(), make_text(), settings(), tmp_path, teacher=parent())
    with pytest.raises(InputError, match="training with other teacher; choose"):
        train(narrow(), make_text(), settings(), tmp_path, teacher=dense_model(LLAMA, seed=7))


def test_the_trainer_needs_no_routing_loss(tmp_path, monkeypatch):
    seen = []
    compute = DistillTrainer.compute_loss

    def watched(self, model, inputs, *args, **options):
        loss = compute(self, model, inputs, *args, **options)
        seen.append(loss.requires_grad)
        return loss

    monkeypatch.setattr(DistillTrainer, "compute_loss", watched)
    train(narrow(), make_text(), settings(), tmp_path, teacher=parent())
    assert seen == [True] * 4
