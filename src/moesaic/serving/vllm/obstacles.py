"""What of a converted model vLLM's fused experts cannot hold, in words."""

from __future__ import annotations

from typing import Any

import torch

from moesaic._config import build_config
from moesaic._errors import InputError
from moesaic.models.export._obstacles import read_layers
from moesaic.nn.layer import LayerConfig
from moesaic.nn.routers._base import Router
from moesaic.nn.routers._table import ROUTERS


def check_config(config: Any) -> None:
    """Refuse a converted model that vLLM cannot run as it is.

    Args:
        config: Of the model.

    Raises:
        InputError: Naming the property that stands in the way, its layer, and what can serve it.
    """
    for index, layer in enumerate(read_layers(config)):
        if found := obstacle(layer):
            raise InputError(
                f"vLLM's fused experts cannot hold {found} (layer {index}); `moesaic serve` can, "
                "and so can vLLM with --model-impl transformers --trust-remote-code"
            )


def obstacle(layer: LayerConfig) -> str:
    """Say what of a layer cannot be held; empty if nothing."""
    for name in ("bias", "expert_bias"):
        if getattr(layer, name):
            return f"biases inside of blocks ({name})"
    if layer.experts != "gated":
        return f"experts of the kind {layer.experts!r}"
    if layer.activation not in ("silu", "swish"):
        return f"the activation {layer.activation!r}"
    if not layer.num_experts:
        return ""
    with torch.device("meta"):
        router = make_router(layer, dim=1)
    if router.free_experts or router.needs_previous:
        return f"the router {layer.router!r} with experts without neurons or ties between layers"
    return ""


def make_router(layer: LayerConfig, dim: int) -> Router:
    """Make the router of a layer, for inference."""
    options = build_config(
        ROUTERS.load_config(layer.router), layer.router_options, where=f"router {layer.router}"
    )
    router: Router = ROUTERS.load(layer.router)(dim, layer.num_experts, options)
    return router.eval().requires_grad_(False)
