"""Models of stock architectures around the tensors of converted ones.

Shapes: D model width, E experts, F width of one expert.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.nn.layer import MoELayer
from moesaic.nn.routers.sigmoid_top_k import SigmoidTopK

# What decoders like Llama and their mixtures call alike.
_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def shared_values(config: Any) -> dict[str, Any]:
    """Take from a decoder's config what its mixture calls alike."""
    values = {name: getattr(config, name, None) for name in _SHARED_FIELDS}
    if values["head_dim"] is None:
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    return {**values, "rope_parameters": copy.deepcopy(config.rope_parameters)}


def state_beside_layers(model: PreTrainedModel, layers: str = ".mlp.") -> dict[str, Tensor]:
    """Take all tensors but those of the MoE layers; a tied head is there under both names."""
    return {name: value for name, value in model.state_dict().items() if layers not in name}


def split_gated(gate_up_FD: Tensor, down_DF: Tensor) -> dict[str, Tensor]:
    """Name the matrices of one gated network as transformers does.

    Args:
        gate_up_FD: Gate rows, then up rows, [2F, D].
        down_DF: [D, F].
    """
    gate_FD, up_FD = gate_up_FD.chunk(2)
    return {
        "gate_proj.weight": gate_FD,
        "up_proj.weight": up_FD,
        "down_proj.weight": down_DF,
    }


def shared_network(layer: MoELayer) -> dict[str, Tensor]:
    """Name the matrices of a layer's shared part as transformers does."""
    assert layer.shared is not None
    weights = layer.shared.weights()
    return split_gated(weights.up[0].detach(), weights.down[0].detach())


def build(name: str, values: dict[str, Any], state: dict[str, Tensor], like: Any) -> Any:
    """Make a model of a stock architecture around tensors, none of which is copied.

    Args:
        name: Prefix of its classes in transformers.
        values: Of its config.
        state: Its tensors by name.
        like: The converted model, for how it generates.
    """
    stock = empty_model(name, values)
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(like.generation_config)
    return stock


def empty_model(name: str, values: dict[str, Any]) -> Any:
    """Make a model of a stock architecture whose parameters are nowhere yet.

    Args:
        name: Prefix of its classes in transformers.
        values: Of its config.
    """
    config = getattr(transformers, f"{name}Config")(**values)
    with torch.device("meta"):
        stock: Any = getattr(transformers, f"{name}ForCausalLM")(config)
    # Its frequencies are in no checkpoint.
    stock.model.rotary_emb = type(stock.model.rotary_emb)(config=config)
    return stock.eval()


def routed_tensors(layer: MoELayer, place: str) -> dict[str, Tensor]:
    """Name the routed blocks of a layer and the rows of its router as transformers does."""
    assert layer.router is not None
    assert layer.experts is not None
    weights, rows_ED = layer.experts.weights(), layer.router.weight
    assert isinstance(rows_ED, Tensor)
    return {
        f"{place}.gate.weight": rows_ED.detach(),
        f"{place}.experts.gate_up_proj": weights.up.detach(),
        f"{place}.experts.down_proj": weights.down.detach(),
    }


def choice_bias(layer: MoELayer) -> Tensor:
    """The bias of a layer's choice, [E]."""
    assert isinstance(layer.router, SigmoidTopK)
    return layer.router.choice_bias
