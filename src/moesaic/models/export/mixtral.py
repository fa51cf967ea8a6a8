"""The architecture of Mixtral (arXiv 2401.04088): softmax over the k chosen, no shared block.

Weights of the chosen blocks sum to one, so it holds gates that weigh their blocks alike, once their
sum is in the blocks, and no others. Its attention is Llama's, with a sliding window or without.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from moesaic.models.export._base import Format, FormatConfig, Layout
from moesaic.models.export._directory import DirectoryFormat, Target
from moesaic.models.export._obstacles import (
    Attention,
    first_obstacle,
    read_layers,
    sums_to_one,
)
from moesaic.models.export._stock import (
    build,
    routed_tensors,
    shared_values,
    state_beside_layers,
)
from moesaic.nn.layer import moe_layers

LAYOUT = Layout(router="topk-softmax", max_shared=0)


def obstacle(config: Any) -> str:
    """Say what of a model the architecture cannot hold; empty if nothing."""
    return first_obstacle(config, LAYOUT, _attention_obstacle, sums_to_one)


def _attention_obstacle(attention: Attention) -> str:
    if attention.qkv_bias or attention.out_bias:
        return "biases of attention"
    return "norms of queries and keys" if attention.qk_norm else ""


def build_mixtral(model: PreTrainedModel) -> Any:
    """Make the stock model around the tensors of a converted one without an obstacle.

    Args:
        model: Whose layers fit `LAYOUT`.

    Returns:
        A `MixtralForCausalLM`; nothing was copied.
    """
    config: Any = model.config
    layer = read_layers(config)[0]
    values = {
        **shared_values(config),
        "intermediate_size": layer.width,
        "num_local_experts": layer.num_experts,
        "num_experts_per_tok": layer.router_options["top_k"],
        "sliding_window": getattr(config, "sliding_window", None),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    state = state_beside_layers(model)
    for index, moe in enumerate(moe_layers(model)):
        state |= routed_tensors(moe, f"model.layers.{index}.mlp")
    return build("Mixtral", values, state, model)


_TARGET = Target(name="mixtral", layout=LAYOUT, obstacle=obstacle, build=build_mixtral)


def mixtral_format(config: FormatConfig) -> Format:
    """Make the format, which writes `MixtralForCausalLM`."""
    return DirectoryFormat(_TARGET, config)
