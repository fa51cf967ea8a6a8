"""Many requests at once: none is lost, none is mixed up, each is what it is alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest

COUNT = 64


def make_request(number):
    """A request unlike the others: text, length, sampling, operating point and form."""
    ask = {"model": "mosaic", "max_tokens": 3 + number % 9, "seed": number}
    ask["temperature"] = (0, 1.2, 0.7)[number % 3]
    ask["extra_body"] = ({}, {"threshold": 0.3}, {"active": 0.4}, {"threshold": 0.8})[number % 4]
    content = f"question {number} " * (1 + number % 11)
    if number % 5 == 0:
        return "completions", {**ask, "prompt": content, "logprobs": 2}
    return "chat", {**ask, "messages": [{"role": "user", "content": content}]}


def send(client, number, *, stream):
    """Give everything of an answer that does not depend on when it came."""
    kind, ask = make_request(number)
    endpoint = client.completions if kind == "completions" else client.chat.completions
    if stream:
        chunks = list(endpoint.create(**ask, stream=True, stream_options={"include_usage": True}))
        *parts, last = chunks
        choices = [part.choices[0] for part in parts]
        texts = [c.text if kind == "completions" else c.delta.content or "" for c in choices]
        return "".join(texts), choices[-1].finish_reason, last.usage, last.moesaic
    answer = endpoint.create(**ask)
    choice = answer.choices[0]
    text = choice.text if kind == "completions" else choice.message.content
    return text, choice.finish_reason, answer.usage, answer.moesaic


@pytest.mark.timeout(120)
def test_64_at_once_are_those_sent_one_by_one(server):
    with server.client() as client:
        alone = [send(client, number, stream=False) for number in range(COUNT)]
        assert len({text for text, *_ in alone}) > COUNT // 2
        with ThreadPoolExecutor(COUNT) as pool:
            together = list(
                pool.map(lambda number: send(client, number, stream=number % 2), range(COUNT))
            )
    assert together == alone
    worker = server.served.worker
    assert (worker.num_present, worker.batch.num_running, worker.batch.num_waiting) == (0, 0, 0)
