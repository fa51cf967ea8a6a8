"""Sequences written together are those written alone, whatever comes and goes beside them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import Case, converted, dense_model, random_ids

from moesaic._errors import InputError
from moesaic.inference import Batch, Decoder, Engine, Job, PlainDecoder, Sampling
from moesaic.nn.layer import record_routing
from moesaic.nn.operating_point import threshold_at
from moesaic.ops.cpu import library

native = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
LLAMA = Case("llama", {})
KINDS = [pytest.param(Decoder, marks=native, id="native"), pytest.param(PlainDecoder, id="plain")]


def run(batch, jobs, add_at=None, remove_at=None):
    """Write jobs to their ends; `add_at` and `remove_at` give the step of a key."""
    add_at, remove_at = add_at or {}, remove_at or {}
    texts = {key: [] for key in jobs}
    for number in range(1000):
        for key, job in jobs.items():
            if add_at.get(key, 0) == number:
                batch.add(key, job)
        for key in [key for key, at in remove_at.items() if at == number]:
            batch.remove(key)
        step = batch.step()
        if step is None and number > max([*add_at.values(), 0]):
            return texts
        for written in step.written if step else []:
            if written.token is not None:
                texts[written.key].append(written.token)
    raise AssertionError("the batch does not end")


def make_jobs():
    jobs = {}
    for key, (length, new) in enumerate([(3, 9), (14, 5), (1, 12), (20, 7), (6, 1), (9, 20)]):
        hot = key % 2 == 1
        jobs[key] = Job(
            prompt_T=random_ids(1, length, seed=key)[0].tolist(),
            max_new_tokens=new,
            sampling=Sampling(temperature=1.2, top_p=0.9, seed=key) if hot else Sampling(),
            threshold=(None, 0.3, 0.7)[key % 3],
        )
    return jobs


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_together_are_those_alone(kind):
    model = converted(LLAMA)
    jobs = make_jobs()
    alone = {}
    for key, job in jobs.items():
        alone |= run(Batch(kind(model, length=64)), {key: job})
    together = Batch(kind(model, length=64, slots=3), max_rows=7)
    assert run(together, jobs, add_at={3: 2, 5: 6}) == alone
    assert [len(text) for text in alone.values()] == [job.max_new_tokens for job in jobs.values()]
    assert (together.num_running, together.num_waiting) == (0, 0)


@native
def test_both_kinds_write_what_the_engine_writes():
    model = converted(LLAMA)
    job = make_jobs()[1]
    for threshold in (0.5, 0.3):
        with threshold_at(model, threshold):
            expected = Engine(model, length=64).generate(job.prompt_T, 5, sampling=job.sampling)
        own = Job(
            prompt_T=job.prompt_T, max_new_tokens=5, sampling=job.sampling, threshold=threshold
        )
        for kind in (Decoder, PlainDecoder):
            assert run(Batch(kind(model, length=64)), {0: own}) == {0: expected}


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox"])
def test_models_without_a_native_decoder_are_batched(model_type):
    model = dense_model(Case(model_type, {}))
    prompts = [random_ids(1, n, seed=n)[0] for n in (4, 9)]
    jobs = {i: Job(prompt_T=p.tolist(), max_new_tokens=8) for i, p in enumerate(prompts)}
    texts = run(Batch(PlainDecoder(model, length=64, slots=2), max_rows=5), jobs)
    for i, prompt in enumerate(prompts):
        expected = model.generate(prompt.unsqueeze(0), max_new_tokens=8, do_sample=False)
        assert texts[i] == expected[0, len(prompt) :].tolist()


@native
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 9), min_size=6, max_size=6),
    st.dictionaries(st.integers(0, 5), st.integers(0, 20), max_size=3),
    st.integers(1, 4),
    st.integers(4, 30),
)
def test_who_comes_and_goes_beside_it_changes_nothing(come, go, slots, max_rows):
    model = _model()
    jobs = make_jobs()
    batch = Batch(Decoder(model, length=64, slots=slots), max_rows=max_rows)
    texts = run(batch, jobs, add_at=dict(enumerate(come)), remove_at=go)
    for key, text in texts.items():
        expected = _alone(key)
        if key in go:
            # It was cut off, or left the line and was put in again by a later step.
            assert text == expected[: len(text)]
        else:
            assert text == expected
    assert batch.num_running == batch.num_waiting == 0


_CACHE = {}


def _model():
    if "model" not in _CACHE:
        _CACHE["model"] = converted(LLAMA)
    return _CACHE["model"]


def _alone(key):
    if key not in _CACHE:
        batch = Batch(Decoder(_model(), length=64))
        _CACHE[key] = run(batch, {key: make_jobs()[key]})[key]
    return _CACHE[key]


@pytest.mark.parametrize("kind", KINDS)
def test_it_tells_the_experts_of_every_row(kind):
    model = converted(LLAMA, router_options={"normalize": "none"})
    prompt = random_ids(1, 6)[0]
    batch = Batch(kind(model, length=64), max_rows=4, record=True)
    batch.add(7, Job(prompt_T=prompt.tolist(), max_new_tokens=3))
    steps = []
    while (step := batch.step()) is not None:
        steps.append(step)
    # transformers would round a prompt in parts differently.
    parts = [4, 2] if kind is Decoder else [6]
    assert [len(step.keys) for step in steps] == [*parts, 1, 1]
    assert [step.prompt_rows for step in steps] == [*parts, 0, 0]
    assert all(key == 7 for step in steps for key in step.keys)
    tokens = [written.token for step in steps for written in step.written]
    read = torch.cat([prompt, torch.tensor(tokens[:-1])])
    with torch.no_grad(), record_routing(model) as routings:
        model(read.unsqueeze(0))
    expected_LTE = torch.stack([routing.active_TE() for routing in routings])
    used_LTE = torch.cat([step.used_LTE for step in steps], 1)
    assert torch.equal(used_LTE.bool(), expected_LTE)
    # A token's experts are those of the row that chose it.
    first = next(step.written[0] for step in steps if step.written)
    assert torch.equal(first.used_LE.bool(), expected_LTE[:, 5])


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_model(kind):
    model = converted(LLAMA)
    prompt = random_ids(1, 6)[0]
    batch = Batch(kind(model, length=64))
    # Warm: what the sampling does to probabilities is no part of them.
    sampling = Sampling(temperature=0.7, top_p=0.5, seed=2)
    batch.add(0, Job(prompt_T=prompt.tolist(), max_new_tokens=1, sampling=sampling, num_likely=3))
    (written,) = batch.step().written
    with torch.no_grad():
        expected_V = model(prompt.unsqueeze(0)).logits[0, -1].log_softmax(0)
    assert written.logprob == pytest.approx(float(expected_V[written.token]), abs=1e-4)
    top = expected_V.topk(3)
    assert [token for token, _ in written.likely] == top.indices.tolist()
    assert [value for _, value in written.likely] == pytest.approx(top.values.tolist(), abs=1e-4)
    batch.add(0, Job(prompt_T=[3], max_new_tokens=1))
    (plain,) = batch.step().written
    assert (plain.logprob, plain.likely) == (None, ())


@native
def test_a_stop_token_ends_the_text_and_frees_the_slot():
    model = dense_model(LLAMA)
    prompt = random_ids(1, 12)[0].tolist()
    free = Engine(model, length=64).generate(prompt, 20)
    batch = Batch(Decoder(model, length=64))
    batch.add(0, Job(prompt_T=prompt, max_new_tokens=20, stop={free[5]}))
    last = None
    text = []
    while (step := batch.step()) is not None:
        (last,) = step.written
        text += [] if last.token is None else [last.token]
    assert text == free[: free.index(free[5])]
    assert (last.token, last.finish) == (None, "stop")
    assert batch.num_running == 0


def test_what_cannot_be_written_is_refused():
    model = dense_model(LLAMA)
    batch = Batch(PlainDecoder(model, length=16))
    with pytest.raises(InputError, match="take 17 positions, more than the 16 of this decoder"):
        batch.add(0, Job(prompt_T=[3] * 10, max_new_tokens=8))
    batch.add(0, Job(prompt_T=[3] * 10, max_new_tokens=7))
    with pytest.raises(InputError, match="key 0 is in use"):
        batch.add(0, Job(prompt_T=[3], max_new_tokens=1))
    with pytest.raises(InputError, match="at least 1 token, got 0"):
        Job(prompt_T=[], max_new_tokens=1)
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
        Job(prompt_T=[3], max_new_tokens=0)
    with pytest.raises(InputError, match=r"threshold must be in \[0, 1\), got 1.0"):
        Job(prompt_T=[3], max_new_tokens=1, threshold=1.0)
    with pytest.raises(InputError, match="max_rows must be at least slots=4, got 3"):
        Batch(PlainDecoder(model, length=16, slots=4), max_rows=3)
    with pytest.raises(InputError, match=r"positions must be in \[0, 16\), got 16"):
        PlainDecoder(model, length=16).step(
            torch.zeros(17, dtype=torch.int64), torch.zeros(17), torch.arange(17), []
        )
