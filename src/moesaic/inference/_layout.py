"""Where the decoders of transformers keep what the native code reads, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The norms of a decoder layer, by the names of their modules; empty where there is none.

    Attributes:
        attention_norm: Before attention.
        attention_post: After attention, before the residual sum.
        ffn_norm: Before the feed-forward network.
        ffn_post: After it, before the residual sum.
        offset: What is added to the weight of a norm; Gemma stores it less one.
    """

    attention_norm: str = "input_layernorm"
    attention_post: str = ""
    ffn_norm: str = "post_attention_layernorm"
    ffn_post: str = ""
    offset: float = 0.0


_PRE = Layout()
_GEMMA = Layout(
    attention_post="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post="post_feedforward_layernorm",
    offset=1.0,
)
_LAYOUTS = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "llama": _PRE,
    "mistral": _PRE,
    "olmo2": Layout(
        attention_norm="",
        attention_post="post_attention_layernorm",
        ffn_norm="",
        ffn_post="post_feedforward_layernorm",
    ),
    "phi3": _PRE,
    "qwen2": _PRE,
    "qwen3": _PRE,
    "smollm3": _PRE,
}
# Their tables of angles change with the length of what is read.
_MOVING_ROPE = ("dynamic", "longrope")


def layout_of(model: PreTrainedModel) -> Layout:
    """Find the layout of a dense or converted model.

    Raises:
        InputError: If there is none, or its rotary embedding cannot be a table.
    """
    config: Any = model.config
    model_type = config.model_type.removeprefix("moesaic_")
    if model_type not in _LAYOUTS:
        raise InputError(
            f"{model_type} has no native decoder; {', '.join(_LAYOUTS)} have, others generate "
            "with transformers"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {
        v.get("rope_type") for v in rope.values() if isinstance(v, dict)
    }
    moving = sorted(kind for kind in kinds if kind in _MOVING_ROPE)
    if moving:
        raise InputError(
            f"rope_type {moving[0]} has no native decoder: its angles change with the length; "
            "generate with transformers"
        )
    return _LAYOUTS[model_type]


def norm_weight(norm: Any, layout: Layout) -> Tensor:
    """The factor of an RMS norm, float32."""
    weight: Tensor = norm.weight.detach().float() + layout.offset
    return weight.contiguous()
