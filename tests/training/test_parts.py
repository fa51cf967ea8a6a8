"""Divergence, teacher and budget, each alone."""

import pytest
import torch
from calibration_cases import LLAMA, make_text
from model_cases import dense_model, random_ids

from moesaic._errors import InputError
from moesaic.conversion.dsmoe import DSMoE, convert_dsmoe
from moesaic.models import load, new_manifest, save
from moesaic.models.ffn import dense_ffn_width
from moesaic.nn.layer import moe_layers, record_routing
from moesaic.nn.shape import layer_shapes
from moesaic.training import divergence as divergence_file
from moesaic.training.budget import BudgetControl, active_fraction, settle_threshold
from moesaic.training.config import TrainConfig
from moesaic.training.divergence import divergence, mismatch
from moesaic.training.run import select_trainable
from moesaic.training.teacher import dense_teacher


def open_model(bias=True):
    config = DSMoE(experts=4, init="open" if bias else "random", partition="contiguous")
    return convert_dsmoe(dense_model(LLAMA), None, config)[0]


@pytest.mark.parametrize("chunk", [1, 4, 128])
def test_divergence_and_its_gradient_equal_plain_torch(chunk, monkeypatch):
    monkeypatch.setattr(divergence_file, "_CHUNK", chunk)
    torch.manual_seed(0)
    student_TV = torch.randn(7, 11, requires_grad=True)
    teacher_TV = torch.randn(7, 11)
    got = divergence(student_TV, teacher_TV)
    (3 * got).backward()
    plain_TV = student_TV.detach().clone().requires_grad_()
    want = torch.nn.functional.kl_div(
        plain_TV.log_softmax(-1), teacher_TV.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    (3 * want).backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(student_TV.grad, plain_TV.grad)
    assert float(divergence(teacher_TV, teacher_TV)) == pytest.approx(0.0, abs=1e-6)


def test_mismatch_is_relative_for_each_token():
    theirs_BSD = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    ours_BSD = torch.tensor([[[3.0, 3.0], [300.0, 300.0]]])
    # 1 of 25 and 10,000 of 250,000; the second layer is right.
    got = mismatch([ours_BSD, theirs_BSD], [theirs_BSD, theirs_BSD])
    assert float(got) == pytest.approx((0.04 + 0.04) / 2 / 2)


@pytest.mark.parametrize("trains", ["routers", "ffn", "everything"])
def test_teacher_is_the_dense_parent_and_stays_it(trains):
    ids = random_ids()
    with torch.no_grad():
        want = dense_model(LLAMA)(ids).logits
    model = open_model()
    select_trainable(model, trains)
    teacher = dense_teacher(model)
    ours, theirs = dict(model.named_parameters()), dict(teacher.named_parameters())
    for name, parameter in ours.items():
        shared = parameter.data_ptr() == theirs[name].data_ptr()
        assert shared == (not parameter.requires_grad), name
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(1.0)
    with torch.no_grad():
        torch.testing.assert_close(teacher(ids).logits, want, atol=1e-4, rtol=1e-4)
    assert not any(
        p.requires_grad for p in teacher.parameters() if all(p is not q for q in ours.values())
    )


def test_budget_control_pushes_towards_the_target():
    control = BudgetControl(0.5, 1.0, 2.0)
    above = control.update(0.7)
    assert above == pytest.approx(1.0 + 2.0 * 0.2 + 10 * 2.0 * 0.2)
    assert control.update(0.1) == 0.0, "a coefficient is never negative"
    assert control.integral == pytest.approx(1.4 - 0.8)


@pytest.mark.parametrize("active", [0.25, 0.6, 1.0])
def test_threshold_settles_at_the_budget_and_is_saved(active, tmp_path):
    model = open_model(bias=False)
    ids = torch.from_numpy(make_text().ids_NS).long()
    threshold = settle_threshold(model, ids, active)
    for layer in model.config.moesaic["layers"]:
        assert layer["router_options"]["threshold"] == threshold
    save(model, tmp_path / "m", new_manifest("tiny", model))
    again = load(tmp_path / "m")
    assert {layer.router.threshold for layer in moe_layers(again)} == {threshold}
    with torch.no_grad(), record_routing(again) as routings:
        again(ids)
    fractions = active_fraction(routings, layer_shapes(again, dense_ffn_width(again.config)))
    assert sum(fractions) / len(fractions) == pytest.approx(active, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("active", [0.01, 0.5, 1.0])
def test_equal_gates_stay_on_together(active):
    model = open_model()
    ids = random_ids()
    want = model(ids).logits
    settle_threshold(model, ids, active)
    torch.testing.assert_close(model(ids).logits, want)


@torch.no_grad()
def test_saturated_gates_leave_a_threshold_that_loads(tmp_path):
    model = open_model()
    for layer in moe_layers(model):
        layer.router.weight.normal_()
        layer.router.bias.fill_(100.0)
    assert 0.0 < settle_threshold(model, random_ids(), 0.5) < 1.0
    save(model, tmp_path / "m", new_manifest("tiny", model))
    ids = random_ids()
    torch.testing.assert_close(load(tmp_path / "m")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("training", [True, False])
def test_settling_leaves_the_mode_of_the_model(training):
    model = open_model(bias=False).train(training)
    settle_threshold(model, random_ids(), 0.5)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_divergence_of_half_precision_logits(dtype):
    torch.manual_seed(0)
    student_TV = torch.randn(300, 11).to(dtype).requires_grad_()
    teacher_TV = torch.randn(300, 11).to(dtype)
    got = divergence(student_TV, teacher_TV)
    got.backward()
    plain_TV = student_TV.detach().float().requires_grad_()
    want = torch.nn.functional.kl_div(
        plain_TV.log_softmax(-1),
        teacher_TV.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    want.backward()
    assert got.dtype == torch.float32
    assert student_TV.grad.dtype == dtype
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(student_TV.grad, plain_TV.grad.to(dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"active": 1.5}, r"active must be in \(0, 1\]"),
        ({"distill": 0.0}, "not all 0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"batch_blocks": 3, "accumulate": 2}, "accumulate must divide batch_blocks=3"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
    ],
)
def test_wrong_settings_say_so(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)
