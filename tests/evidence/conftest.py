"""Importing what stands beside the package."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def evidence(monkeypatch):
    """Import a module of `evidence` by its name."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield lambda name: importlib.import_module(f"evidence.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "evidence"]:
        del sys.modules[name]
