"""A tiny DSMoE and a tiny dense Llama, one of them behind a real server on loopback."""

import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parents[1]
sys.path.extend([str(_TESTS / name) for name in ("models", "recipes")])


@pytest.fixture(scope="session")
def mosaic(tmp_path_factory):
    from serving_cases import write_mosaic

    return write_mosaic(tmp_path_factory.mktemp("serving") / "mosaic")


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    from recipe_cases import write_model

    return write_model(tmp_path_factory.mktemp("serving") / "dense")


@pytest.fixture(scope="session")
def server(mosaic):
    from serving_cases import running

    with running(mosaic) as server:
        yield server
