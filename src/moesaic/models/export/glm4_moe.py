"""The architecture of GLM-4.5 (arXiv 2508.06471): k sigmoid gates and a shared block.

Sigmoid gates, a bias for the choice, a free factor and a shared expert: what a DSMoE is once every
token has the same number of blocks. Its attention takes biases of queries, keys and values and
norms of queries and keys, so decoders of the families of Llama and Qwen fit.

What its classes ask for, tried: a shared expert (vLLM fails without one), an untied head (vLLM
never ties it), at least two routed blocks (the best two of a group are looked up).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from moesaic._config import build_config
from moesaic.models.export._base import Format, FormatConfig, Layout
from moesaic.models.export._directory import DirectoryFormat, Target
from moesaic.models.export._obstacles import Attention, attention_of, first_obstacle, read_layers
from moesaic.models.export._stock import (
    build,
    choice_bias,
    routed_tensors,
    shared_network,
    shared_values,
    state_beside_layers,
)
from moesaic.nn.layer import moe_layers
from moesaic.nn.routers.sigmoid_top_k import SigmoidTopKConfig

LAYOUT = Layout(router="sigmoid-top-k", min_shared=1)


def obstacle(config: Any) -> str:
    """Say what of a model the architecture cannot hold; empty if nothing."""
    return first_obstacle(config, LAYOUT, _attention_obstacle, _router_obstacle)


def _router_obstacle(options: Mapping[str, Any]) -> str:
    return "groups of experts to choose from" if options.get("num_groups", 1) > 1 else ""


def _attention_obstacle(attention: Attention) -> str:
    if attention.out_bias:
        return "a bias of the output of attention"
    return "attention in a sliding window" if attention.window else ""


def build_glm4_moe(model: PreTrainedModel) -> Any:
    """Make the stock model around the tensors of a converted one without an obstacle.

    Args:
        model: Whose layers fit `LAYOUT`.

    Returns:
        A `Glm4MoeForCausalLM`; nothing but a tied head was copied.
    """
    config: Any = model.config
    layer = read_layers(config)[0]
    attention = attention_of(config)
    router = build_config(SigmoidTopKConfig, layer.router_options, where="config.moesaic.layers")
    values = {
        **shared_values(config),
        "partial_rotary_factor": 1.0,
        "intermediate_size": layer.shared_width + layer.num_experts * layer.width,
        "moe_intermediate_size": layer.width,
        "n_routed_experts": layer.num_experts,
        "n_shared_experts": layer.shared_width // layer.width,
        "num_experts_per_tok": router.top_k,
        "routed_scaling_factor": router.scale,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": router.normalize,
        "num_nextn_predict_layers": 0,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm,
        "tie_word_embeddings": False,
    }
    state = state_beside_layers(model)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    for index, moe in enumerate(moe_layers(model)):
        place = f"model.layers.{index}.mlp"
        state |= routed_tensors(moe, place)
        state[f"{place}.gate.e_score_correction_bias"] = choice_bias(moe)
        for name, tensor in shared_network(moe).items():
            state[f"{place}.shared_experts.{name}"] = tensor
    return build("Glm4Moe", values, state, model)


_TARGET = Target(name="glm4_moe", layout=LAYOUT, obstacle=obstacle, build=build_glm4_moe)


def glm4_moe_format(config: FormatConfig) -> Format:
    """Make the format, which writes `Glm4MoeForCausalLM`."""
    return DirectoryFormat(_TARGET, config)
