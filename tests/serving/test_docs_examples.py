"""The examples of docs/serve.md run against a real server."""

import json
import re
import urllib.request
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000/v1"


def test_the_python_example_runs(server, capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert ADDRESS in block
    exec(compile(block.replace(ADDRESS, server.url), "serve.md", "exec"), {})
    assert "active_ffn" in capsys.readouterr().out


def test_the_curl_examples_are_answered(server):
    found = re.findall(rf"^curl {ADDRESS}(\S+) -H '(.*?): (.*?)' \\\n +-d '(.*?)'$", PAGE, re.M)
    assert len(found) == 2
    for path, name, value, body in found:
        request = urllib.request.Request(server.url + path, body.encode(), {name: value})
        with urllib.request.urlopen(request) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] <= 40
