"""What llama.cpp calls the architectures that a mixture of ours fits, as data.

`glm4moe` is that of GLM-4.5 (arXiv 2508.06471): sigmoid gates and a shared block; queries and keys
are not permuted. `llama` with experts is that of Mixtral (arXiv 2401.04088): softmax over the
chosen, whose weights sum to one, none shared; the rows of every head are ordered to rotate
neighbours. Both tried against llama.cpp.

Shapes: E experts, F width of one expert, D model width, O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moesaic.models.export import glm4_moe, mixtral
from moesaic.models.export._obstacles import read_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    Attributes:
        name: Its name there.
        names: Its name in `gguf.MODEL_ARCH`.
        stock: Prefix of the classes in transformers that hold the same tensors.
        obstacle: Says what of a converted model's config it cannot hold.
        build: Makes the stock model of a converted one without an obstacle.
        describe: Writes what its files say beside what those of any decoder do.
        values: Reads the stock config's fields for that, given a reader of keys.
        permuted: Whether rows of queries and keys are ordered to rotate neighbours.
    """

    name: str
    names: str
    stock: str
    obstacle: Callable[[Any], str]
    build: Callable[[Any], Any]
    describe: Callable[[Any, Any], None]
    values: Callable[[Callable[[str], Any], set[str]], dict[str, Any]]
    permuted: bool


def _describe_glm(writer: Any, config: Any) -> None:
    import gguf

    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _glm_values(of: Callable[[str], Any], names: set[str]) -> dict[str, Any]:
    return {
        "partial_rotary_factor": of("rope.dimension_count") / of("attention.key_length"),
        "first_k_dense_replace": of("leading_dense_block_count"),
        "n_routed_experts": of("expert_count"),
        "num_experts_per_tok": of("expert_used_count"),
        "moe_intermediate_size": of("expert_feed_forward_length"),
        "n_shared_experts": of("expert_shared_count"),
        "routed_scaling_factor": of("expert_weights_scale"),
        "norm_topk_prob": of("expert_weights_norm"),
        "num_nextn_predict_layers": 0,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in names,
    }


def _describe_mixtral(writer: Any, config: Any) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _mixtral_values(of: Callable[[str], Any], names: set[str]) -> dict[str, Any]:
    return {
        "intermediate_size": of("feed_forward_length"),
        "num_local_experts": of("expert_count"),
        "num_experts_per_tok": of("expert_used_count"),
        "sliding_window": None,
    }


def _mixtral_obstacle(config: Any) -> str:
    if found := mixtral.obstacle(config):
        return found
    # Its files have no place for one.
    window = getattr(config, "sliding_window", None)
    return "attention in a sliding window" if window is not None else ""


GLM = GgufArchitecture(
    name="glm4moe",
    names="GLM4_MOE",
    stock="Glm4Moe",
    obstacle=glm4_moe.obstacle,
    build=glm4_moe.build_glm4_moe,
    describe=_describe_glm,
    values=_glm_values,
    permuted=False,
)
LLAMA = GgufArchitecture(
    name="llama",
    names="LLAMA",
    stock="Mixtral",
    obstacle=_mixtral_obstacle,
    build=mixtral.build_mixtral,
    describe=_describe_mixtral,
    values=_mixtral_values,
    permuted=True,
)
ARCHITECTURES = {each.name: each for each in (GLM, LLAMA)}


def architecture_for(config: Any) -> GgufArchitecture:
    """Choose the architecture for a converted model, by the routers of its layers."""
    routers = {layer.router for layer in read_layers(config) if layer.num_experts}
    return LLAMA if routers == {mixtral.LAYOUT.router} else GLM


def add_decoder(writer: Any, config: Any) -> None:
    """Write what the file of any decoder like Llama says of its sizes.

    Args:
        writer: A `GGUFWriter`.
        config: Of the model.
    """
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def stock_values(reader: Any) -> tuple[GgufArchitecture, dict[str, Any]]:
    """Read the architecture of a file and the values of its stock config."""
    architecture = ARCHITECTURES[reader.fields["general.architecture"].contents()]

    def of(key: str) -> Any:
        return reader.fields[f"{architecture.name}.{key}"].contents()

    return architecture, {
        "vocab_size": of("vocab_size"),
        "num_hidden_layers": of("block_count"),
        "max_position_embeddings": of("context_length"),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("attention.key_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": of("rope.freq_base")},
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": False,
        **architecture.values(of, {each.name for each in reader.tensors}),
    }


@functools.cache
def _names(architecture: str, num_layers: int) -> Any:
    """The names of tensors; making them takes a while."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], num_layers)


def pieces(
    architecture: GgufArchitecture, name: str, tensor: Tensor, config: Any
) -> Iterator[tuple[str, Tensor]]:
    """Name a tensor of a stock model, or its two halves, as GGUF does.

    Args:
        architecture: Of the file.
        name: In the stock model.
        tensor: It, or one of its shape.
        config: Of the stock model.
    """
    names = _names(architecture.names, config.num_hidden_layers)
    if name.endswith("e_score_correction_bias"):
        parts = [(name.removesuffix("_bias") + ".bias", tensor)]
    elif name.endswith("experts.gate_up_proj"):
        gate_EFD, up_EFD = tensor.chunk(2, dim=1)
        place = name.removesuffix("gate_up_proj")
        parts = [(f"{place}gate_proj.weight", gate_EFD), (f"{place}up_proj.weight", up_EFD)]
    elif name.endswith("experts.down_proj"):
        parts = [(f"{name}.weight", tensor)]
    else:
        parts = [(name, tensor)]
    for part, value in parts:
        target = names.get_name(part, try_suffixes=(".weight", ".bias"))
        assert target is not None, part
        yield target, value


def num_rotated(architecture: GgufArchitecture, name: str, config: Any) -> int:
    """Heads of a tensor whose rows are ordered to rotate neighbours; 0 if they are not."""
    if not architecture.permuted:
        return 0
    if name.endswith("q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith("k_proj.weight") else 0


def pair_halves(weight_OI: Tensor, num_heads: int) -> Tensor:
    """Order the rows of every head to rotate neighbours, where transformers rotates halves."""
    halves: Tensor = weight_OI.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def part_pairs(weight_OI: Tensor, num_heads: int) -> Tensor:
    """Undo `pair_halves`."""
    pairs: Tensor = weight_OI.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
