"""The tiny models of every architecture, for the tests here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models"))
