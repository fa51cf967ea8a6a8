"""The tiny models and texts of other tests serve here too."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path.extend([str(_TESTS / "models"), str(_TESTS / "calibration"), str(_TESTS / "recipes")])
