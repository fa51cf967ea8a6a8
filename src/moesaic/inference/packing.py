"""Give the experts of a model a copy for the native CPU code, wherever the model then runs them.

This is for models that stay in transformers, ours or any other mixture of experts; `Engine` packs
whole models and needs none of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moesaic._errors import InputError
from moesaic.models.experts_function import expert_weights
from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import moe_layers
from moesaic.nn.packed_layer import pack_layer
from moesaic.ops.cpu.packed import Format, PackedExperts, format_of


def pack_experts(model: nn.Module, weight_format: Format | None = None) -> int:
    """Pack all experts of a model; calls without gradients then take the native path.

    A copy stands beside the weights, so the experts need their memory twice (`int8`: a quarter
    more than once in float32). Changed weights are noticed and run in plain torch until they are
    packed again.

    Args:
        model: One of ours, or a mixture of experts of transformers whose experts implementation
            is `moesaic`.
        weight_format: How the copy is stored; that of the weights' dtype if none.

    Returns:
        Bytes of the copies.

    Raises:
        InputError: If there are no experts, or their activation has no native code.
        RunError: If the native code cannot run here.
    """
    num_bytes = 0
    for module in model.modules():
        weights = None
        if isinstance(module, Experts):
            weights = module.weights()
        elif _is_transformers_experts(module):
            weights = expert_weights(module)
        if weights is None:
            continue
        packed = PackedExperts(weights, weight_format or format_of(weights.up.dtype))
        num_bytes += packed.num_bytes
        if isinstance(module, Experts):
            module.packed = packed
        else:
            module.moesaic_packed = packed  # type: ignore[assignment]
    for layer in moe_layers(model):
        part = layer.experts or layer.shared
        if part is not None:
            dtype = next(layer.parameters()).dtype
            layer.packed = pack_layer(layer, weight_format or format_of(dtype))
    if not num_bytes:
        raise InputError(
            f"{type(model).__name__} has no experts to pack; convert it first, or give a mixture "
            "of experts"
        )
    return num_bytes


def _is_transformers_experts(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "down_proj"))
