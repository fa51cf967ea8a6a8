"""The architecture of Qwen3-MoE (arXiv 2505.09388): softmax over the k chosen, normed attention.

Its routed part is Mixtral's. Queries and keys are always normed, so only decoders of the family of
Qwen3 fit. Layers may be without a router: `mlp_only_layers`.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from moesaic.models.export._base import Format, FormatConfig, Layout
from moesaic.models.export._directory import DirectoryFormat, Target
from moesaic.models.export._obstacles import (
    Attention,
    attention_of,
    first_obstacle,
    read_layers,
    sums_to_one,
)
from moesaic.models.export._stock import (
    build,
    routed_tensors,
    shared_network,
    shared_values,
    state_beside_layers,
)
from moesaic.nn.layer import moe_layers

LAYOUT = Layout(router="topk-softmax", max_shared=0, dense_layers=True)


def _obstacle(config: Any) -> str:
    return first_obstacle(config, LAYOUT, _attention_obstacle, sums_to_one)


def _attention_obstacle(attention: Attention) -> str:
    if not attention.qk_norm:
        return "attention without norms of queries and keys"
    return "attention in a sliding window" if attention.window else ""


def _build(model: PreTrainedModel) -> Any:
    """Make the stock model around the tensors of a converted one without an obstacle."""
    config: Any = model.config
    layers = read_layers(config)
    routed = next(layer for layer in layers if layer.num_experts)
    values = {
        **shared_values(config),
        "intermediate_size": routed.num_experts * routed.width,
        "moe_intermediate_size": routed.width,
        "num_experts": routed.num_experts,
        "num_experts_per_tok": routed.router_options["top_k"],
        "norm_topk_prob": True,
        "mlp_only_layers": [i for i, layer in enumerate(layers) if not layer.num_experts],
        "attention_bias": attention_of(config).qkv_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    state = state_beside_layers(model)
    for index, moe in enumerate(moe_layers(model)):
        place = f"model.layers.{index}.mlp"
        if moe.experts is not None:
            state |= routed_tensors(moe, place)
        else:
            state |= {f"{place}.{name}": tensor for name, tensor in shared_network(moe).items()}
    return build("Qwen3Moe", values, state, model)


_TARGET = Target(name="qwen3_moe", layout=LAYOUT, obstacle=_obstacle, build=_build)


def qwen3_moe_format(config: FormatConfig) -> Format:
    """Make the format, which writes `Qwen3MoeForCausalLM`."""
    return DirectoryFormat(_TARGET, config)
