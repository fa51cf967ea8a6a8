"""Servers as processes: the reason why one does not start, and nothing left when one ends."""

import sys
import urllib.request

import psutil
import pytest

from moesaic._errors import RunError
from moesaic.evaluation.bench.servers import running
from moesaic.serving.vllm import process

HEALTHY = """
import http.server, os, subprocess, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["GREETING"].encode())

subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def test_a_server_that_ends_before_it_is_ready_says_why(tmp_path):
    code = "print('ValueError: no such model'); print('bye'); raise SystemExit(3)"
    words = "toy ended with code 3: ValueError: no such model"
    with (
        pytest.raises(RunError, match=words),
        running(lambda _: [sys.executable, "-c", code], tmp_path / "log", name="toy"),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "nothing"),
        ("one\ntwo\n", "two"),
        ("RuntimeError: first\nTypeError: last\nat line 3\n", "TypeError: last"),
    ],
)
def test_last_words(log, words):
    assert process.last_words(log) == words


def test_it_and_what_it_started_end_with_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_GRACE_S", 0.5)

    def command(port):
        return [sys.executable, "-c", HEALTHY, str(port)]

    own = {"GREETING": "hello"}
    with running(command, tmp_path / "log", name="toy", environment=own) as server:
        with urllib.request.urlopen(f"{server.address}/health", timeout=10) as answer:
            assert answer.read() == b"hello"
        (child,) = psutil.Process(server.process.pid).children()
    assert server.process.returncode is not None
    assert psutil.wait_procs([child], timeout=10)[1] == []
