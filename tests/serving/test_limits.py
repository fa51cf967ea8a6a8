"""What a server refuses, and what it survives."""

import json
import socket
import threading
import urllib.request
from contextlib import contextmanager

import openai
import pytest
from serving_cases import running

ASK = {
    "model": "mosaic",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 12,
    "temperature": 0,
}


@contextmanager
def held(server):
    """A server that takes no step until `go` is set; a failed test lets it go as well."""
    decoder, go = server.served.worker.batch.decoder, threading.Event()
    own = decoder.step

    def step(*args, **options):
        go.wait(60)
        return own(*args, **options)

    decoder.step = step
    try:
        yield go
    finally:
        go.set()
        decoder.step = own


def until(condition):
    """Wait for what the server does by itself."""
    waiting = threading.Event()
    for _ in range(3000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it never happened")


def metric(server, line):
    text = urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics").read().decode()
    found = [
        value
        for name, _, value in (row.rpartition(" ") for row in text.splitlines())
        if name == line
    ]
    return float(found[0]) if found else 0.0


def status_of(server, path):
    """Status of an answer, which has the error form unless it is 200."""
    url = server.url.removesuffix("/v1") + path
    opener = urllib.request.build_opener(_NoRaise)
    with opener.open(url) as answer:
        body = answer.read()
    if answer.status != 200:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return answer.status


class _NoRaise(urllib.request.HTTPErrorProcessor):
    def http_response(self, request, response):
        return response


def test_a_full_server_says_so_and_takes_requests_again(mosaic):
    with running(mosaic, queue=1) as server, server.client() as client:
        with held(server) as go:
            streams = [client.chat.completions.create(**ASK, stream=True)]
            # Those that come during its step are taken in after it.
            until(lambda: server.served.worker.batch.num_running == 1)
            streams += [client.chat.completions.create(**ASK, stream=True) for _ in range(4)]
            with pytest.raises(openai.RateLimitError, match="as many requests as it takes") as info:
                client.chat.completions.create(**ASK)
            assert info.value.response.headers["retry-after"] == "1"
            assert info.value.code == "server_busy"
            assert (status_of(server, "/ready"), status_of(server, "/health")) == (503, 200)
            assert metric(server, "moesaic_running_sequences") == 1
            assert metric(server, "moesaic_waiting_sequences") == 4
            go.set()
            for stream in streams:
                assert list(stream)[-1].choices[0].finish_reason == "length"
        assert status_of(server, "/ready") == 200
        assert client.chat.completions.create(**ASK).usage.completion_tokens == 12
        with pytest.raises(openai.BadRequestError, match="asks for 6 sequences, more than the 5"):
            client.chat.completions.create(**ASK, n=6)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(mosaic, stream):
    with running(mosaic) as server:
        worker = server.served.worker
        body = json.dumps({**ASK, "stream": stream, "max_tokens": 200}).encode()
        host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
        with held(server) as go:
            with socket.create_connection((host, int(port))) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
                until(lambda: worker.batch.num_running == 1)
            until(lambda: worker.num_present == 0)
            go.set()
            until(lambda: worker.batch.num_running == 0)
        until(lambda: metric(server, "moesaic_disconnects_total") == 1)
        # Far fewer than were asked for.
        assert metric(server, "moesaic_new_tokens_total") <= 2


def test_a_request_may_not_take_for_ever(mosaic):
    with running(mosaic, timeout_s=0.2) as server, server.client() as client, held(server):
        with pytest.raises(openai.InternalServerError, match="took longer than this") as info:
            client.chat.completions.create(**ASK)
        assert (info.value.status_code, info.value.code) == (503, "timeout")
        with pytest.raises(openai.APIError, match="took longer than this server lets it"):
            list(client.chat.completions.create(**ASK, stream=True))
        until(lambda: server.served.worker.num_present == 0)


def test_bodies_have_a_size(mosaic):
    with running(mosaic, max_body_bytes=2000) as server, server.client() as client:
        with pytest.raises(
            openai.APIStatusError, match="the body has more than 2000 bytes"
        ) as info:
            client.chat.completions.create(
                model="mosaic", messages=[{"role": "user", "content": "x" * 2000}]
            )
        assert info.value.status_code == 413
        # Without a length in front: it is counted as it comes.
        request = urllib.request.Request(
            server.url + "/chat/completions", data=iter([b" " * 1500, b" " * 1500]), method="POST"
        )
        request.add_header("Transfer-Encoding", "chunked")
        with pytest.raises(urllib.error.HTTPError, match="413") as raised:
            urllib.request.urlopen(request)
        raised.value.close()
        assert client.chat.completions.create(**ASK).usage.completion_tokens == 12


def test_a_body_may_not_take_for_ever(mosaic):
    with running(mosaic, timeout_s=0.2) as server:
        host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
            )
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the body did not arrive within 0.2 seconds" in answer


def test_a_key_is_asked_for(mosaic):
    with running(mosaic, api_key="secret") as server:
        for key in ("wrong", "", "secre\u0074s"):
            with openai.OpenAI(base_url=server.url, api_key=key or "-", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError, match="asks for its key") as info:
                    client.chat.completions.create(**ASK)
                assert info.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=server.url, api_key="secret", max_retries=0) as client:
            assert client.chat.completions.create(**ASK).usage.completion_tokens == 12
        assert status_of(server, "/v1/models") == 401
        assert status_of(server, "/health") == status_of(server, "/metrics") == 200
        assert "secret" not in repr(server.served.config)


def test_requests_end_before_the_server_does(mosaic):
    with running(mosaic) as server, server.client() as client, held(server) as go:
        stream = client.chat.completions.create(**ASK, stream=True)
        server.uvicorn.should_exit = True
        until(lambda: not server.uvicorn.servers[0].is_serving())
        with pytest.raises(openai.APIConnectionError), server.client() as other:
            other.chat.completions.create(**ASK)
        go.set()
        assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_worker_that_died_is_told_and_no_traceback_leaves(mosaic, caplog):
    with running(mosaic) as server, server.client() as client:
        decoder = server.served.worker.batch.decoder
        decoder.step = lambda *args, **options: 1 // 0
        with pytest.raises(openai.InternalServerError, match="it has to be restarted") as info:
            client.chat.completions.create(**ASK)
        assert "Traceback" not in str(info.value.body)
        assert "ZeroDivisionError" in caplog.text
        with pytest.raises(openai.InternalServerError, match="it has to be restarted"):
            client.chat.completions.create(**ASK)
        assert status_of(server, "/health") == status_of(server, "/ready") == 503
