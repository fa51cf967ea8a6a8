"""What stands between a converted model and a stock architecture, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesaic._config import build_config
from moesaic.models.export._base import Layout
from moesaic.nn.layer import LayerConfig

THRESHOLD = "sigmoid-threshold"

_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
# What others differ in, beside the biases, norms of heads and windows of their attention.
_FOREIGN = {
    "gemma2": "norms after attention and network and a scale of the embedding",
    "gemma3_text": "norms after attention and network and a scale of the embedding",
    "gpt2": "learned positions and a network without a gate",
    "gpt_neox": "layer norms with a bias and a network without a gate",
    "olmo2": "norms after attention and network instead of before them",
    "opt": "learned positions and a network without a gate",
    "phi3": "projections of queries, keys and values in one",
    "smollm3": "layers without rotary positions",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How the attention of a decoder like Llama differs from Llama's.

    Attributes:
        qkv_bias: Whether queries, keys and values have biases.
        out_bias: Whether the output has one.
        qk_norm: Whether queries and keys are normed in each head.
        window: Whether some layer sees a sliding window alone.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    window: bool = False


def foreign(config: Any) -> str:
    """Say why a decoder is not like Llama; empty if it is."""
    dense_type = config.model_type.removeprefix("moesaic_")
    if dense_type in _LIKE_LLAMA:
        return ""
    return f"{dense_type}, which has {_FOREIGN.get(dense_type, 'a decoder layer of its own')}"


def attention_of(config: Any) -> Attention:
    """Read the attention of a decoder that is like Llama."""
    dense_type = config.model_type.removeprefix("moesaic_")
    bias = bool(getattr(config, "attention_bias", False))
    return Attention(
        qkv_bias=bias or dense_type == "qwen2",
        out_bias=bias,
        qk_norm=dense_type == "qwen3",
        window=getattr(config, "sliding_window", None) is not None,
    )


def read_layers(config: Any) -> list[LayerConfig]:
    """Read the layers of a converted model's config."""
    return [
        build_config(LayerConfig, values, where="config.moesaic.layers")
        for values in config.moesaic["layers"]
    ]


def first_obstacle(
    config: Any,
    layout: Layout,
    attention: Callable[[Attention], str],
    router: Callable[[Mapping[str, Any]], str],
) -> str:
    """Look for what a stock architecture cannot hold: decoder, attention, then layers.

    Args:
        config: Of the converted model.
        layout: Of the architecture.
        attention: Says what of an attention it cannot hold.
        router: Says what of the settings of a router that it knows, a mapping, it cannot hold.
    """
    if found := foreign(config) or attention(attention_of(config)):
        return found
    layers = read_layers(config)
    for index, layer in enumerate(layers):
        if found := _in_layer(layer, layout, router):
            return f"{found} (layer {index})"
    return _differences(layers, layout)


def sums_to_one(options: Mapping[str, Any]) -> str:
    """Say what of the settings of `topk-softmax` an architecture that renormalises cannot hold."""
    return "" if options.get("renormalize", True) else "weights that do not sum to one"


def _in_layer(
    layer: LayerConfig, layout: Layout, router: Callable[[Mapping[str, Any]], str]
) -> str:
    if layer.iterations > 1 or layer.iteration_residual != "none":
        return f"iterations, here {layer.iterations} ({layer.iteration_residual!r})"
    if layer.reuse > 1:
        return f"experts of {layer.reuse} layers in one"
    if layer.bypass_rank:
        # Its neurons are act(gate) * up: a sum of them has no slope at zero, a linear map has one.
        return (
            f"a bypass, here of rank {layer.bypass_rank}: a linear map beside the blocks, which "
            "conversion leaves out with bypass=0"
        )
    for name in ("bias", "expert_bias", "output_bias"):
        if getattr(layer, name):
            return f"biases in the network ({name})"
    if layer.experts != "gated":
        return f"experts of the kind {layer.experts!r}"
    if layer.activation not in ("silu", "swish"):
        return f"the activation {layer.activation!r}"
    if not layer.num_experts:
        return "" if layout.dense_layers else "a layer without a router"
    if layer.router == THRESHOLD:
        return _in_gates(layer, layout)
    if layer.router != layout.router:
        return f"the router {layer.router!r}"
    if layer.shared_width % layer.width:
        return f"a shared part of {layer.shared_width} neurons beside blocks of {layer.width}"
    num_shared = layer.shared_width // layer.width
    if layout.max_shared is not None and num_shared > layout.max_shared:
        return "a shared part beside the routed blocks"
    if num_shared < layout.min_shared:
        return "layers without a shared block"
    return router(layer.router_options)


def _in_gates(layer: LayerConfig, layout: Layout) -> str:
    """What of a DSMoE layer no fixed number of blocks makes fit."""
    weighs = layer.router_options.get("value", "gate") == "gate"
    if layer.shared_width:
        return "a shared part beside gates, which conversion leaves out with shared=0"
    if weighs and layout.router == "topk-softmax":
        return "gates that weigh their blocks (router.value 'gate'), since its weights sum to one"
    if weighs and layer.router_options.get("bias", False):
        # The sigmoid of a linear map without a constant cannot be theirs.
        return "gates that weigh their blocks and have a bias (router.value 'gate', router.bias)"
    return ""


def _differences(layers: Sequence[LayerConfig], layout: Layout) -> str:
    routed = [layer for layer in layers if layer.num_experts]
    if not routed:
        return "a model without any routed block"
    routers = {layer.router for layer in layers}
    if THRESHOLD in routers and len(routers) > 1:
        return "gates in some layers and none in others"
    aspects: dict[str, set[Any]] = {
        "numbers of blocks": {layer.num_experts for layer in routed},
        "widths of blocks": {layer.width for layer in routed},
        "widths of the shared part": {layer.shared_width for layer in routed},
    }
    if routed[0].router != THRESHOLD:
        # Gates with a threshold get one number of blocks on the way.
        options = {tuple(sorted(layer.router_options.items())) for layer in routed}
        aspects["numbers of blocks per token or other settings of routers"] = options
    for what, values in aspects.items():
        if len(values) > 1:
            return f"{what} that differ between layers"
    neurons = {layer.shared_width + layer.num_experts * layer.width for layer in layers}
    if layout.dense_layers and len(neurons) > 1:
        return "layers without a router that are of another width"
    return ""
