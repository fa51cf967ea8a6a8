"""Text and calibration that the tests of compressions share."""

import numpy as np
from model_cases import VOCAB

from moesaic.calibration import CalibrationConfig, calibrate
from moesaic.data.blocks import TokenBlocks


def noise(num_blocks=8, length=16, seed=0):
    """Blocks of random tokens, each a document of its own."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (num_blocks, length), dtype=np.int32)
    return TokenBlocks(
        ids_NS=ids,
        domain_N=np.zeros(num_blocks, np.int16),
        document_N=np.arange(num_blocks, dtype=np.int32),
        domains=("noise",),
    )


def measure(model, directory, collectors, text=None):
    """Calibrate on all of some text."""
    text = noise() if text is None else text
    return calibrate(model, text, collectors, CalibrationConfig(tokens=text.ids_NS.size), directory)
