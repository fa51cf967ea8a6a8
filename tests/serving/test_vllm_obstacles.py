"""What vLLM cannot hold is refused in one sentence; importing the plug-in imports no vLLM."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig
from moesaic.serving.vllm.obstacles import check_config

ROOT = Path(__file__).resolve().parents[2]
FITTING = {"num_experts": 4, "width": 8, "router": "sigmoid-threshold"}


def config_of(*layers):
    plain = [to_plain(LayerConfig(**{**FITTING, **layer})) for layer in layers]
    return SimpleNamespace(moesaic={"layers": plain})


@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"bypass_rank": 4, "shared_width": 8, "output_bias": True},
        {"num_experts": 0, "router": "", "shared_width": 32},
        {"router": "sigmoid-top-k", "router_options": {"top_k": 2}},
        {"router": "null-experts"},
    ],
)
def test_what_it_holds(layer):
    check_config(config_of({}, layer))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"bias": True}, r"biases inside of blocks \(bias\) \(layer 1\)"),
        ({"expert_bias": True}, r"biases inside of blocks \(expert_bias\) \(layer 1\)"),
        ({"experts": "plain"}, r"experts of the kind 'plain' \(layer 1\)"),
        ({"experts": "thresholded-gated"}, "experts of the kind 'thresholded-gated'"),
        ({"activation": "gelu"}, "the activation 'gelu'"),
        ({"router": "zero-computation"}, "the router 'zero-computation'"),
    ],
)
def test_what_it_cannot_hold_is_named(layer, words):
    with pytest.raises(InputError, match=f"{words}.*; `moesaic serve` can"):
        check_config(config_of({}, layer))


def test_the_entry_point_is_there_and_imports_no_vllm():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["moesaic"].partition(":")
    assert callable(getattr(import_module(module), name))
    code = f"import sys, moesaic, {module}; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
