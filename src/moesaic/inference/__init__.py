"""Running a converted or dense model: one decode engine, shared by all that generate."""

from __future__ import annotations

from moesaic.inference.batching import Batch, Job
from moesaic.inference.decoder import Decoder
from moesaic.inference.engine import Engine, Sampling
from moesaic.inference.packing import pack_experts
from moesaic.inference.plain_decoder import PlainDecoder

__all__ = ["Batch", "Decoder", "Engine", "Job", "PlainDecoder", "Sampling", "pack_experts"]
