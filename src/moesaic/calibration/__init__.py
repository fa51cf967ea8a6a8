"""One pass over text, layer by layer: what methods need to know about a model's activations."""

from moesaic.calibration.run import CalibrationConfig, calibrate
from moesaic.calibration.stats import CalibrationStats

__all__ = ["CalibrationConfig", "CalibrationStats", "calibrate"]
