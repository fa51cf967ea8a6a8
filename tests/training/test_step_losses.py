"""What experts carry from step to step: skipped steps, checkpoints, and resuming to the bit."""

import pytest
import torch
from calibration_cases import BLOCK, Killed, Watch, make_text
from model_cases import VOCAB, same_state

import moesaic as mo
from moesaic.nn.layer import moe_layers
from moesaic.training import EndStep, TrainConfig, train

STEPS = 4


def start(**options):
    torch.manual_seed(0)
    layer = mo.LayerConfig(
        num_experts=4,
        width=8,
        router="task-top-k",
        experts="subspace",
        experts_options={"conflict_coef": 1.0, **options},
    )
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 16}
    return mo.build_mixture(mo.MixtureConfig(**sizes, vocab_size=VOCAB, layers=(layer,)))


def settings(every=2, **options):
    return TrainConfig(
        tokens=STEPS * 2 * BLOCK,
        batch_blocks=2,
        checkpoint_every=every,
        active=0.0,
        distill=0.0,
        language=1.0,
        trains="everything",
        **options,
    )


def aux(results):
    return [line["aux"] for line in results["log"]]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_training_goes_on_to_the_bit(stop_after, tmp_path):
    whole, results = train(start(), make_text(), settings(), tmp_path / "whole")
    watch = Watch(stop_after * 2 * BLOCK - 1)
    with pytest.raises(Killed):
        train(start(), make_text(), settings(), tmp_path / "cut", watch)
    again, same = train(start(), make_text(), settings(), tmp_path / "cut")
    assert same == results
    same_state(whole, again)


def test_the_step_after_a_checkpoint_has_no_conflict(tmp_path):
    none, often, rarely = (
        aux(train(start(conflict_coef=coef), make_text(), settings(every), tmp_path / name)[1])
        for name, coef, every in (("0", 0.0, 2), ("1", 1.0, 2), ("2", 1.0, 4))
    )
    # The loss of the topology alone is nearly the same in all. Fresh experts agree at first.
    charged = [[b - a > 0.01 for a, b in zip(none, seen, strict=True)] for seen in (often, rarely)]
    assert charged == [[False, False, False, True], [False, False, True, True]]


def test_the_topology_trains_at_its_own_rate(tmp_path):
    model = start(topology_rate=50.0, conflict_coef=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model, _ = train(model, make_text(), settings(learning_rate=1e-4), tmp_path)
    for name, parameter in model.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        # AdamW's first steps are about the rate long, here 4 of them on a cosine.
        assert (moved > 1e-3) == name.endswith("topology"), name


class Skipping:
    """An optimiser as accelerate wraps it, after a step that it skipped or did."""

    def __init__(self, skipped):
        self.step_was_skipped = skipped


def backward(model):
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    model.train()(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("skipped", [True, False])
def test_a_skipped_step_is_forgotten(skipped):
    model, told = start(), EndStep()
    backward(model)
    told.on_optimizer_step(None, None, None, model=model, optimizer=Skipping(skipped))
    known = [layer.experts.conflict.last_EE is not None for layer in moe_layers(model)]
    assert known == [not skipped] * 2
    backward(model)
    told.on_save(None, None, None, model=model)
    told.on_optimizer_step(None, None, None, model=model, optimizer=Skipping(False))
    assert [layer.experts.conflict.last_EE for layer in moe_layers(model)] == [None] * 2
