"""Plain transformers directories of stock architectures, from a converted model's tensors.

Shapes: D model width, E experts, F width of one expert.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moesaic.models.export._base import AUTO, FormatConfig
from moesaic.nn.layer import MoELayer
from moesaic.nn.routers.sigmoid_top_k import SigmoidTopK

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

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
    config = getattr(transformers, f"{name}Config")(**values)
    # On no device: the tensors take the place of parameters that never were.
    with torch.device("meta"):
        stock: Any = getattr(transformers, f"{name}ForCausalLM")(config)
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(like.generation_config)
    return stock.eval()


def stored_dtype(config: FormatConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the weights in a directory."""
    return dtype if config.weights == AUTO else DTYPES[config.weights]


@torch.no_grad()
def round_model(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Round every weight of a float32 model to what a dtype holds; gives whether one changed.

    The bias of a choice, which every architecture keeps in float32, stays.
    """
    changed = False
    for parameter in model.parameters():
        rounded = parameter.to(dtype).to(parameter.dtype)
        changed = changed or not torch.equal(rounded, parameter)
        parameter.copy_(rounded)
    return changed


def write_directory(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, directory: Path, dtype: torch.dtype
) -> None:
    """Save a model in a dtype, and its tokenizer; in memory it stays as it is."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.to(dtype)
        model.save_pretrained(directory)
    finally:
        for parameter, data in before:
            parameter.data = data
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def read_directory(directory: Path) -> PreTrainedModel:
    """Load a directory as anyone would, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    loaded: PreTrainedModel = model.eval()
    return loaded


def router_weight(layer: MoELayer) -> Tensor:
    """The rows of a layer's router, [E, D]."""
    assert layer.router is not None
    weight_ED: Tensor = layer.router.weight
    return weight_ED.detach()


def choice_bias(layer: MoELayer) -> Tensor:
    """The bias of a layer's choice, [E]."""
    assert isinstance(layer.router, SigmoidTopK)
    return layer.router.choice_bias
