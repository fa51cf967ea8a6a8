"""The official client against a real server on loopback."""

import json
import urllib.request

import openai
import pytest
import torch
from serving_cases import chat_tokenizer, running

from moesaic.inference import PlainDecoder
from moesaic.models.checkpoint import load
from moesaic.ops.cpu import library

ASK = {"model": "mosaic", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def greedy(model, prompt, count):
    """What transformers writes."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def post(server, path, body):
    """Status and body of an answer to any bytes."""
    request = urllib.request.Request(
        server.url + path, data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_a_chat_is_what_transformers_writes(client, mosaic):
    tokenizer, model = chat_tokenizer(), load(mosaic)
    prompt = tokenizer("<user>hello\n<assistant>")["input_ids"]
    expected = tokenizer.decode(greedy(model, prompt, 12))
    answer = client.chat.completions.create(**ASK, temperature=0)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(prompt) + 12
    assert 0 < answer.moesaic["active_ffn"] < 1
    assert 0 < answer.moesaic["experts_per_token"] < 4


@pytest.mark.parametrize("sampled", [{"temperature": 0}, {"temperature": 1.3, "seed": 5}])
def test_a_stream_is_the_whole_answer_in_parts(client, sampled):
    whole = client.chat.completions.create(**ASK, **sampled, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(
            **ASK,
            **sampled,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in parts] == [None] * (len(parts) - 1) + ["length"]
    scores = [s for c in parts for s in (c.choices[0].logprobs or _NONE).content]
    assert scores == whole.choices[0].logprobs.content
    assert len(scores) == 12
    assert all(len(score.top_logprobs) == 2 for score in scores)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert last.moesaic == whole.moesaic
    assert len({chunk.id for chunk in chunks}) == 1


class _NONE:
    content = ()


def test_completions_take_text_tokens_and_several_of_each(client):
    tokenizer = chat_tokenizer()
    ask = {"model": "mosaic", "max_tokens": 6, "temperature": 0}
    texts = ["one", "another prompt"]
    alone = [client.completions.create(prompt=text, **ask).choices[0].text for text in texts]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(prompt=prompt, **ask)
        assert [choice.text for choice in answer.choices] == alone
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 12
    assert client.completions.create(prompt=ids[0], **ask).choices[0].text == alone[0]
    stream = client.completions.create(prompt=texts, stream=True, **ask)
    parts = {0: "", 1: ""}
    for chunk in stream:
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(parts.values()) == alone


def test_log_probabilities_of_completions(client):
    answer = client.completions.create(
        model="mosaic", prompt="ab", max_tokens=5, temperature=0, logprobs=3
    )
    told = answer.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 5
    for token, value, likely in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        # Tokens that are half a character have one name together.
        assert 1 <= len(likely) <= 3
        assert value <= max(likely.values())
        assert token in likely


def test_seeds_repeat_and_choices_differ(client):
    hot = {**ASK, "temperature": 1.5}
    first = client.chat.completions.create(**hot, seed=3, n=3)
    again = client.chat.completions.create(**hot, seed=3, n=3)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) == 3
    alone = client.chat.completions.create(**hot, seed=3)
    assert alone.choices[0].message.content == texts[0]
    assert first.usage.prompt_tokens == alone.usage.prompt_tokens
    assert first.usage.completion_tokens == 36
    free = {client.chat.completions.create(**hot).choices[0].message.content for _ in range(4)}
    assert len(free) > 1


def test_stop_strings_end_the_text_and_are_no_part_of_it(client):
    free = client.chat.completions.create(**ASK, temperature=0).choices[0].message.content
    stop = free[4:6]
    for form in (stop, ["never", stop]):
        answer = client.chat.completions.create(**ASK, temperature=0, stop=form)
        assert answer.choices[0].message.content == free[: free.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 12


def test_the_operating_point_moves_per_request(client, server):
    ask = {**ASK, "temperature": 0}
    seen = {}
    for active in (1.0, 0.7, 0.3):
        answer = client.chat.completions.create(**ask, extra_body={"active": active})
        assert answer.moesaic["active_ffn"] == pytest.approx(active, abs=0.12)
        seen[active] = answer.moesaic["active_ffn"]
    assert seen[1.0] == 1.0
    assert seen[1.0] > seen[0.7] > seen[0.3]
    low = client.chat.completions.create(**ask, extra_body={"threshold": 0.9})
    high = client.chat.completions.create(**ask, extra_body={"threshold": 0.1})
    assert low.moesaic["active_ffn"] < 0.3 < 0.8 < high.moesaic["active_ffn"]
    own = client.chat.completions.create(**ask)
    same = client.chat.completions.create(**ask, extra_body={"threshold": 0.5})
    assert own.choices[0].message.content == same.choices[0].message.content


def test_models(client):
    assert [model.id for model in client.models.list()] == ["mosaic"]
    assert client.models.retrieve("mosaic").owned_by == "moesaic"
    with pytest.raises(openai.NotFoundError, match="the model 'other' is not here; this server"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as info:
        client.chat.completions.create(**{**ASK, "model": "other"})
    assert (info.value.code, info.value.param) == ("model_not_found", "model")


CHAT = "/chat/completions"
USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "change", "message", "param"),
    [
        (CHAT, {"temperature": 3}, "temperature: Input should be less than or equal to 2", ...),
        (CHAT, {"temperature": float("nan")}, "temperature: Input should be", ...),
        (CHAT, {"top_p": 0}, "top_p: Input should be greater than 0", ...),
        (CHAT, {"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1", ...),
        (CHAT, {"max_tokens": 5000}, "max_tokens is 5000, more than the 1024", ...),
        (CHAT, {"max_tokens": 254}, "the prompt has 19 tokens, and with 254 new ones more", None),
        (CHAT, {"messages": []}, "messages: List should have at least 1 item", ...),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "refuses these mess", None),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "messages.0"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content: Field required", "messages"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs needs logprobs to be true", None),
        (CHAT, {"tools": [{"type": "function"}]}, "tools: List should have at most 0", ...),
        (CHAT, {"logit_bias": {"1": 5}}, "logit_bias: Dictionary should have at most 0", ...),
        (CHAT, {"frequency_penalty": 1}, "frequency_penalty: Input should be less", ...),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format.type", "response"),
        (CHAT, {"n": 17}, "asks for 17 sequences, more than the 16", ...),
        (CHAT, {"stop": ["a"] * 5}, "stop", "stop"),
        (CHAT, {"wisdom": 3}, "wisdom: Extra inputs are not permitted", ...),
        (CHAT, {"\ud800": 3}, "unable to parse raw data as a unicode string", None),
        (CHAT, {"\u00e9": 3}, "\u00e9: Extra inputs are not permitted", ...),
        (CHAT, {"model": "\ud800"}, "model: the text holds half a surrogate pair", ...),
        (CHAT, {"stop": "\ud800"}, "the text holds half a surrogate pair", "stop"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate pair", "messages"),
        ("/completions", {"prompt": "\ud800"}, "the text holds half a surrogate pair", "prompt"),
        (CHAT, {"seed": 2**64}, "seed: Input should be less than or equal to", ...),
        (CHAT, {"active": 0.5, "threshold": 0.5}, "say the same thing; give one of them", None),
        (CHAT, {"threshold": 1.0}, "threshold: Input should be less than 1", ...),
        ("/completions", {"prompt": [[260]]}, r"token ids must be in [0, 260), got 260", ...),
        ("/completions", {"prompt": []}, "prompt", "prompt"),
        ("/completions", {"prompt": "x", "echo": True}, "echo", "echo"),
        ("/completions", {"prompt": "x", "best_of": 3}, "best_of", "best_of"),
    ],
)
def test_bad_requests_get_the_error_form(server, path, change, message, param):
    base = {"messages": USER} if path == CHAT else {}
    body = json.dumps({"model": "mosaic", **base, **change}).encode()
    status, answer = post(server, path, body)
    assert status == 400, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    if param is None:
        assert error["param"] is None
    else:
        assert error["param"].startswith(next(iter(change)) if param is ... else param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'"x"', b"[" * 100_000], ids=range(7)
)
def test_what_is_no_request_gets_the_error_form(server, body):
    status, answer = post(server, CHAT, body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_other_paths_and_methods_get_the_error_form(server):
    status, answer = post(server, "/nothing", b"{}")
    assert (status, answer["error"]["message"]) == (404, "Not Found")
    status, answer = post(server, "/models", b"{}")
    assert (status, answer["error"]["type"]) == (405, "invalid_request_error")


def test_a_dense_model_has_no_gates_to_move_and_may_have_no_template(dense):
    with running(dense, name="plain") as server, server.client() as client:
        answer = client.completions.create(model="plain", prompt="abc", temperature=0)
        assert answer.usage.completion_tokens == 16
        assert not hasattr(answer, "moesaic")
        with pytest.raises(openai.BadRequestError, match="active moves the gates of a DSMoE"):
            client.completions.create(model="plain", prompt="a", extra_body={"active": 0.5})
        with pytest.raises(openai.BadRequestError, match="has no chat template; give a prompt"):
            client.chat.completions.create(**{**ASK, "model": "plain"})


def test_without_native_code_transformers_decodes_and_says_why(mosaic, server, monkeypatch, caplog):
    ask = {**ASK, "temperature": 0, "extra_body": {"threshold": 0.4}}
    with server.client() as client:
        expected = client.chat.completions.create(**ask)
    monkeypatch.setattr(library, "why_not", lambda: "there is no compiler")
    library.library.cache_clear()
    with running(mosaic) as plain, plain.client() as client:
        answer = client.chat.completions.create(**ask)
    monkeypatch.undo()
    library.library.cache_clear()
    assert isinstance(plain.served.worker.batch.decoder, PlainDecoder)
    assert "decoding with transformers, one sequence at a time: there is no compiler" in caplog.text
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert answer.moesaic == expected.moesaic
