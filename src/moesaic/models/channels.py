"""The channels of the residual stream: which axis of each weight they are, and how to remove some.

Every layer reads and writes the same D channels, so a channel goes everywhere at once: a column of
the embedding, an entry of every norm, a column of every matrix that reads the stream and a row of
every one that writes it. The heads of attention keep their size. What is left is an ordinary model
of transformers with a smaller `hidden_size`.

Shapes: D model width, K channels that stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic._errors import InputError
from moesaic.models.architectures import dense_architecture

# Decoders whose heads have a size beside the width. The others here derive one from the other
# (GPT-2, GPT-NeoX, OPT), check rotary factors against it (Phi-3), or scale embeddings by its root
# (Gemma).
NARROWABLE = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")


def check_narrowable(config: Any, *, by: str) -> None:
    """Refuse a model that is no ordinary model any more with fewer channels.

    Args:
        config: Of a model of a known architecture.
        by: Who wants to remove channels.

    Raises:
        InputError: If it is converted already; or naming the architectures that work.
    """
    dense_architecture(config.model_type)
    if config.model_type not in NARROWABLE:
        raise InputError(
            f"{by} cannot remove channels of {config.model_type}, whose config ties "
            f"heads or the scale of embeddings to the width; {', '.join(NARROWABLE)} work"
        )


def channel_axes(model: PreTrainedModel) -> dict[str, int]:
    """Find the axis of each weight that runs over the channels, by its name in the state.

    Weights without one, such as the norms of heads, are left out.

    Args:
        model: A dense model that `check_narrowable` lets pass.
    """
    config: Any = model.config
    # A multiple of the heads, as Llama's config demands; on no device, so it costs nothing.
    with torch.device("meta"):
        other = type(model)(_resized(config, config.hidden_size + config.num_attention_heads))
    sizes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    axes: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        changed = [
            axis
            for axis, pair in enumerate(zip(tensor.shape, sizes[name], strict=True))
            if pair[0] != pair[1]
        ]
        assert len(changed) <= 1, name
        if changed:
            axes[name] = changed[0]
    return axes


@torch.no_grad()
def keep_channels(model: PreTrainedModel, kept_K: Tensor) -> PreTrainedModel:
    """Remove all channels but some, in place.

    Args:
        model: A dense model that `check_narrowable` lets pass; it is consumed.
        kept_K: Numbers of the channels that stay, in the order they are to have; as many as a
            multiple of the heads.

    Returns:
        The same object.
    """
    axes = channel_axes(model)
    for name, parameter in model.named_parameters():
        if name in axes:
            index_K = kept_K.to(parameter.device)
            parameter.data = parameter.data.index_select(axes[name], index_K)
    dense_config = model.config
    config = _resized(dense_config, len(kept_K))
    modules: Iterable[Any] = model.modules()
    for module in modules:
        # What printing shows, and every module that reads the config.
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = module.weight.shape[1]
        if getattr(module, "hidden_size", None) == dense_config.hidden_size:
            module.hidden_size = config.hidden_size
        if getattr(module, "config", None) is dense_config:
            module.config = config
    return model


def _resized(config: Any, width: int) -> Any:
    """The same config with another number of channels and heads of the same size."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {**config.to_dict(), "hidden_size": width, "head_dim": head_dim}
    del values["model_type"]
    resized: PreTrainedConfig = type(config)(**values)
    resized._attn_implementation = config._attn_implementation
    return resized
