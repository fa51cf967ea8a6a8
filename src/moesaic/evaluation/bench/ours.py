"""What of ours is measured: the one place that says how a user would get the fastest path.

Shapes: T tokens, K slots per token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from moesaic.inference.engine import Engine
from moesaic.inference.packing import pack_experts
from moesaic.nn.layer import MoELayer
from moesaic.ops.cpu import library
from moesaic.ops.cpu.packed import Format

ExpertsCall = Callable[[Tensor, Tensor, Tensor], Tensor]


def our_layer(layer: MoELayer) -> MoELayer:
    """Prepare a layer for inference; it is called without gradients."""
    layer.eval()
    if not library.why_not():
        pack_experts(layer)
    return layer


def why_no_engine() -> str:
    """Say why whole models cannot be run by the engine; empty if they can."""
    return library.why_not()


def our_engine(model: PreTrainedModel, length: int, weight_format: Format | None = None) -> Engine:
    """Prepare a model for inference; its dtype says how weights are stored if nothing else does."""
    return Engine(model, length=length, weight_format=weight_format)
