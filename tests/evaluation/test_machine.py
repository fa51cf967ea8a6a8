import json

import pytest

from moesaic.evaluation import fastest_dtype, machine, machine_info


def test_machine_is_described():
    info = machine_info("bfloat16")
    assert info["cpu"]
    assert info["cores"] >= 1
    assert info["memory_bytes"] > 1 << 28
    assert info["dtype"] == "bfloat16"
    assert {"torch", "transformers", "threads", "device"} <= info.keys()
    assert json.loads(json.dumps(info)) == info


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"float32": 1.0, "bfloat16": 4.0}, "float32"),
        ({"float32": 1.0, "bfloat16": 0.95}, "float32"),
        ({"float32": 1.0, "bfloat16": 0.4}, "bfloat16"),
    ],
)
def test_fastest_dtype_follows_the_probe(monkeypatch, seconds, expected):
    fastest_dtype.cache_clear()
    monkeypatch.setattr(machine, "_probe", lambda dtype: seconds[str(dtype).split(".")[1]])
    assert fastest_dtype() == expected
    fastest_dtype.cache_clear()
    assert fastest_dtype("cuda:0") == "bfloat16"
    fastest_dtype.cache_clear()


def test_probe_is_real():
    fastest_dtype.cache_clear()
    assert fastest_dtype() in ("float32", "bfloat16")
