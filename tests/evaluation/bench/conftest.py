"""Tiny models and text of other folders."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[2]
sys.path.extend([str(_TESTS / name) for name in ("models", "recipes", "serving")])
