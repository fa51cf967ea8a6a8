"""Tiny dense models of every architecture in the table, and how to cut them.

Shapes: B sequences, S positions, D model width, E experts, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moesaic._config import to_plain
from moesaic.models.architectures import ARCHITECTURES, Architecture
from moesaic.models.ffn import FFN, decoder_layers, fill_experts, put_layer, read_ffn
from moesaic.models.modeling import adopt
from moesaic.nn.layer import LayerConfig, MoELayer

VOCAB, DIM, WIDTH, LAYERS, EXPERTS = 64, 32, 48, 2, 4

# Right for most decoders; a new row of the table is tested with these.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": DIM, "n_inner": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "mistral": {"sliding_window": 8},
    "opt": {"ffn_dim": WIDTH, "word_embed_proj_dim": DIM},
}
_TOKENS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


class Case(NamedTuple):
    """An architecture with the config options that matter to it."""

    model_type: str
    options: dict[str, Any]

    @property
    def row(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    def __str__(self) -> str:
        return "-".join([self.model_type, *(f"{k}={v}" for k, v in self.options.items())])


ROWS = [Case(model_type, {}) for model_type in ARCHITECTURES]
# What a row can also be: tied or not, with biases, with another activation.
CASES = [
    *ROWS,
    Case("gemma2", {"tie_word_embeddings": False}),
    Case("gpt2", {"tie_word_embeddings": False}),
    Case("gpt_neox", {"use_parallel_residual": False}),
    Case("llama", {"mlp_bias": True}),
    Case("llama", {"tie_word_embeddings": True}),
    Case("opt", {"do_layer_norm_before": False}),
    Case("opt", {"activation_function": "gelu"}),
    Case("qwen2", {"tie_word_embeddings": True}),
    Case("smollm3", {"mlp_bias": True}),
]


def dense_config(case: Case) -> Any:
    """A tiny config."""
    common = _COMMON
    if case.model_type == "gpt2":
        common = {name: _COMMON[name] for name in _TOKENS}
    options = {**common, **_OWN.get(case.model_type, {}), **case.options}
    return getattr(transformers, case.row.name + case.row.config)(**options)


def dense_model(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A dense model whose networks and biases are far from zero, so that errors show."""
    torch.manual_seed(seed)
    model = getattr(transformers, case.row.name + case.row.head)(dense_config(case))
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=draw)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3, generator=draw)
            # Not `model.to`: loading keeps the frequencies of rotary embeddings in float32.
            parameter.data = parameter.data.to(dtype)
    # No end token: every generation has the length that was asked for.
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model.eval()


def read_all(model: PreTrainedModel) -> list[FFN]:
    """The networks of a dense model."""
    row = ARCHITECTURES[model.config.model_type]
    act = getattr(model.config, row.activation)
    return [read_ffn(layer, row, act) for layer in decoder_layers(model)]


def layer_config(row: Architecture, ffn: FFN, **options: Any) -> LayerConfig:
    """E equal experts and, by option, a shared part."""
    values = {
        "num_experts": EXPERTS,
        "output_bias": ffn.down_bias_D is not None,
        "router": "sigmoid-threshold",
        "experts": "gated" if row.gated else "plain",
        "activation": ffn.activation,
        "bias": ffn.up_bias_F is not None,
        **options,
    }
    routed = ffn.width - values.get("shared_width", 0)
    values.setdefault("width", routed // max(1, values["num_experts"]))
    return LayerConfig(**values)


def cut(
    model: PreTrainedModel, losses: dict[str, Any] | None = None, seed: int = 2, **options: Any
) -> PreTrainedModel:
    """Cut every network of a dense model, in place, into experts with routers that differ."""
    row = ARCHITECTURES[model.config.model_type]
    ffns = read_all(model)
    configs = [layer_config(row, ffn, **options) for ffn in ffns]
    moesaic = {"layers": [to_plain(config) for config in configs], "losses": losses or {}}
    model = adopt(model, moesaic)
    draw = torch.Generator().manual_seed(seed)
    for layer, ffn, config in zip(decoder_layers(model), ffns, configs, strict=True):
        moe = MoELayer(DIM, config).to(model.dtype)
        fill_experts(moe, ffn)
        if moe.router is not None:
            with torch.no_grad():
                for parameter in moe.router.parameters():
                    parameter.normal_(std=0.5, generator=draw)
        put_layer(layer, row, moe)
    return model.eval()


def converted(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A converted model."""
    return cut(dense_model(case, dtype), **options)


def random_ids(num_sequences: int = 2, length: int = 11, seed: int = 3) -> Tensor:
    """Token ids without the special ones, [B, S]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num_sequences, length), generator=draw)


def recompute(model: PreTrainedModel, **options: Any) -> None:
    """Switch gradient checkpointing on, by the name this version of transformers prefers."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def same_state(a: PreTrainedModel, b: PreTrainedModel) -> None:
    """Hold two models to the same names, dtypes and bits."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
