import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from evaluation_cases import VOCAB, convert, dense_model

from moesaic._errors import InputError, RunError
from moesaic.evaluation import SpeedConfig, measure_speed
from moesaic.evaluation.speed import greedy_tokens
from moesaic.inference.engine import Engine
from moesaic.ops.cpu import library

WITH_ENGINE = SpeedConfig(prefill_tokens=16, prompt_tokens=4, decode_tokens=3, repeats=3, warmup=1)
QUICK = dataclasses.replace(WITH_ENGINE, engine=False)


class Counts:
    def __init__(self):
        self.stages, self.done = [], 0

    @contextlib.contextmanager
    def stage(self, name, total, unit):
        self.stages.append((name, total, unit))
        yield self

    def advance(self, n=1.0):
        self.done += n


@pytest.fixture
def calls(monkeypatch):
    """Names of models, in the order of their forwards, with the tokens of each."""
    made = []

    def watch(name, model):
        model.register_forward_pre_hook(
            lambda m, a, k: made.append((name, k["input_ids"].shape[1])), with_kwargs=True
        )
        return model

    return made, watch


def test_models_run_in_turns(calls):
    made, watch = calls
    models = {"dense": watch("dense", dense_model()), "moe": watch("moe", convert(dense_model()))}
    progress = Counts()
    result = measure_speed(models, QUICK, progress)
    once = [16, 4, 1, 1, 1]
    order = ["dense", "moe", "moe", "dense", "dense", "moe", "moe", "dense"]
    assert made == [(name, n) for name in order for n in once]
    assert progress.stages == [("speed", 8, "runs")]
    assert progress.done == 8
    for speed in result.models.values():
        for rate in (speed.prefill_tokens_per_s, speed.decode_tokens_per_s):
            assert 0 < rate.low <= rate.median <= rate.high
    assert result.machine["threads"] == torch.get_num_threads()
    assert result.machine["dtype"] == "float32"


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
def test_the_engine_reads_and_writes_the_same_tokens(monkeypatch):
    read = []
    prefill = Engine.prefill
    monkeypatch.setattr(
        Engine, "prefill", lambda self, ids, **k: read.append(len(ids)) or prefill(self, ids, **k)
    )
    progress = Counts()
    models = {"dense": dense_model(), "moe": convert(dense_model())}
    result = measure_speed(models, WITH_ENGINE, progress)
    assert read == [16, 4, 1, 1, 1] * 8
    assert progress.done == 16
    assert result.engine.keys() == models.keys()
    assert all(speed.decode_tokens_per_s.low > 0 for speed in result.engine.values())


def test_one_model_without_an_engine_leaves_all_to_transformers(monkeypatch, caplog):
    models = {"dense": dense_model(), "odd": dense_model()}
    models["odd"].config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4}
    result = measure_speed(models, WITH_ENGINE)
    assert result.engine == {}
    assert result.models.keys() == models.keys()
    assert "speed is measured in transformers alone: " in caplog.text


def test_rates_are_tokens_over_seconds(monkeypatch):
    # A clock that moves by one second at each look: every timed span takes one second.
    ticks = iter(range(1000))
    monkeypatch.setattr("moesaic.evaluation.speed.time.perf_counter", lambda: next(ticks))
    speed = measure_speed({"dense": dense_model()}, QUICK).models["dense"]
    assert speed.prefill_tokens_per_s.median == speed.prefill_tokens_per_s.high == 16
    assert speed.decode_tokens_per_s.median == speed.decode_tokens_per_s.low == 3


def test_decoding_is_that_of_generate(moe):
    prompt = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        tokens, _ = greedy_tokens(moe, prompt, 6)
        expected = prompt
        for _ in range(6):
            next_token = moe(input_ids=expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, next_token], dim=1)
    assert tokens.tolist() == expected[:, 4:].tolist()


def test_short_prompts_are_repeated(calls):
    _, watch = calls
    seen = []
    model = watch("dense", dense_model())
    model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"].tolist()), with_kwargs=True
    )
    measure_speed({"dense": model}, QUICK, prompt_ids=np.array([7, 8, 9]))
    assert seen[0] == [([7, 8, 9] * 6)[:16]]
    assert seen[1] == [[7, 8, 9, 7]]


def test_speed_refuses(dense):
    with pytest.raises(InputError, match="speed needs at least 1 model, got 0; name one"):
        measure_speed({}, QUICK)
    with pytest.raises(InputError, match="at most the 64 positions of dense, got 512; lower them"):
        measure_speed({"dense": dense})
    with pytest.raises(InputError, match=f"1 or more tokens below {VOCAB}, got 2 up to 61; use"):
        measure_speed({"dense": dense}, QUICK, prompt_ids=np.array([3, VOCAB]))
    with pytest.raises(InputError, match="tokens below 61, got 0 up to 0; use the tokenizer"):
        measure_speed({"dense": dense}, QUICK, prompt_ids=np.array([], int))
    with pytest.raises(InputError, match="repeats must be at least 1, got 0; raise it"):
        SpeedConfig(repeats=0)
    with pytest.raises(InputError, match="warmup must be at least 0, got -1; 1 is usual"):
        SpeedConfig(warmup=-1)


def test_broken_model_gives_no_speed(dense):
    with torch.no_grad():
        dense.lm_head.weight.fill_(float("inf"))
    with pytest.raises(RunError, match="broken gives logits that are not finite; load it in float"):
        measure_speed({"broken": dense}, QUICK)
