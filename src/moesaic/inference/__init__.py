"""Running a converted or dense model: one decode engine, shared by all that generate."""

from __future__ import annotations

from moesaic.inference.decoder import Decoder
from moesaic.inference.engine import Engine, Sampling
from moesaic.inference.packing import pack_experts

__all__ = ["Decoder", "Engine", "Sampling", "pack_experts"]
