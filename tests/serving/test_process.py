"""`moesaic serve` as a process: what it prints, what it refuses, and how it ends."""

import os
import signal
import socket
import subprocess
import sys

import openai
import pytest

from moesaic.cli.main import main
from moesaic.serving.config import ServeConfig
from moesaic.serving.server import open_socket


@pytest.mark.slow
def test_sigterm_lets_a_stream_end(mosaic):
    argv = [sys.executable, "-m", "moesaic.cli.main", "serve", str(mosaic), "--port", "0"]
    argv += ["--length", "256", "--slots", "2"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        lines = iter(process.stderr.readline, "")
        address = next(line for line in lines if line.startswith("serving mosaic at")).split()[-1]
        with openai.OpenAI(base_url=address, api_key="x", max_retries=0) as client:
            stream = client.completions.create(
                model="mosaic", prompt="abc", max_tokens=200, temperature=0, stream=True
            )
            chunks = [next(stream)]
            process.send_signal(signal.SIGTERM)
            chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def refused(capsys, *argv):
    assert main(["serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--slots", "0"], "slots must be at least 1, got 0"),
        (["--slots", "300"], r"rows must be in [slots=300, 512], got 256"),
        (["--queue", "-1"], "queue must be at least 0, got -1"),
        (["--port", "70000"], "port must be in [0, 65535], got 70000"),
        (["--length", "1"], "length must be at least 2, got 1"),
        (["--timeout-s", "0"], "timeout_s must be above 0, got 0.0"),
        (["--engine", "transformers", "--weights", "int8"], "weights 'int8' are of the native"),
        (["--host", "256.1.1.1", "--api-key", "x"], "256.1.1.1:8000 cannot be listened on"),
    ],
)
def test_wrong_settings_are_refused_before_loading(mosaic, capsys, argv, message):
    assert message in refused(capsys, str(mosaic), *argv)


def test_an_address_in_use_and_a_model_that_is_not_there_are_said(mosaic, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        text = refused(capsys, str(mosaic), "--port", port)
        assert f"127.0.0.1:{port} cannot be listened on" in text
    text = refused(capsys, "/nowhere/model", "--port", "0")
    assert "model directory /nowhere/model does not exist" in text


def test_text_is_sent_as_soon_as_it_is_there():
    with (
        open_socket(ServeConfig(port=0)) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_without_the_extra_it_names_the_extra(mosaic, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "moesaic.serving.server", raising=False)
    assert main(["serve", str(mosaic), "--port", "0"]) == 1
    assert "moesaic serve needs uvicorn; pip install 'moesaic[serve]'" in capsys.readouterr().err


def test_an_open_address_without_a_key_is_said(mosaic, capsys, monkeypatch):
    monkeypatch.setattr("moesaic.serving.server.serve", lambda *args: None)
    assert main(["serve", str(mosaic), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "without a key; set MOESAIC_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("MOESAIC_API_KEY", "secret")
    assert main(["serve", str(mosaic), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert "without a key" not in capsys.readouterr().err
