"""A language model made of parts: a small Llama-like decoder whose networks are any MoE layers.

It is the class that conversions give, with fresh weights instead of a parent's, so everything that
takes a converted model takes it: the Trainer, saving and loading, evaluation, generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic.models.architectures import dense_architecture
from moesaic.models.modeling import register_classes
from moesaic.nn.layer import LayerConfig
from moesaic.nn.losses._table import LOSSES


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """A decoder as data.

    Attributes:
        dim: Width of the model; `num_heads` divides it.
        num_layers: Decoder layers.
        num_heads: Attention heads.
        num_kv_heads: Heads that hold keys and values; it divides `num_heads`, as many are usual in
            a small model.
        width: Neurons of the dense network that a layer stands in for. Active fractions are shares
            of it, and a model without `layers` has such networks.
        vocab_size: Tokens; 257 are those of `byte_tokenizer`.
        positions: Longest text in tokens.
        tie_embeddings: Whether the head is the embedding.
        layers: One layer for all, or one for each; none for dense networks.
        losses: By registered name, the settings of each loss and its weight `coef`; the model's
            loss contains them.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    width: int = 512
    vocab_size: int = 257
    positions: int = 512
    tie_embeddings: bool = True
    layers: tuple[LayerConfig, ...] = ()
    losses: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "width",
            "vocab_size",
            "positions",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if self.dim % (2 * self.num_heads):
            raise InputError(
                f"dim must be an even multiple of num_heads={self.num_heads}, got {self.dim}; "
                f"{2 * self.num_heads * max(1, self.dim // (2 * self.num_heads))} works"
            )
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}; "
                f"{self.num_heads} is usual"
            )
        if len(self.layers) not in (0, 1, self.num_layers):
            raise InputError(
                f"layers must hold none, one or num_layers={self.num_layers}, got "
                f"{len(self.layers)}; give one for all or one for each"
            )
        for name, values in self.losses.items():
            if not isinstance(values, Mapping) or not isinstance(values.get("coef"), (int, float)):
                raise InputError(
                    f"losses.{name} must be a mapping with the number coef, got {values!r}; "
                    f"{{coef: 0.01}} is a start"
                )
            options = {key: value for key, value in values.items() if key != "coef"}
            build_config(LOSSES.load_config(name), options, where=f"losses.{name}")

    def layer(self, index: int) -> LayerConfig:
        """The layer at a place."""
        if not self.layers:
            return dense_layer(self.width)
        return self.layers[index if len(self.layers) > 1 else 0]


def dense_layer(width: int) -> LayerConfig:
    """A layer that is a dense network of so many neurons."""
    return LayerConfig(num_experts=0, shared_width=width)


def build_mixture(config: MixtureConfig) -> PreTrainedModel:
    """Make a decoder with fresh weights, drawn from torch's global generator.

    Save it with `moesaic.save` or its own `save_pretrained`; `moesaic.load` and, after
    `import moesaic`, `AutoModelForCausalLM.from_pretrained` load it.

    Args:
        config: Its sizes, layers and losses.

    Returns:
        A model of the class `MoesaicLlamaForCausalLM`, float32, in training mode.

    Raises:
        InputError: If a router, an option or a size does not fit.
    """
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.positions,
        tie_word_embeddings=config.tie_embeddings,
        # The caller's tokenizer knows them.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    layers = [config.layer(index) for index in range(config.num_layers)]
    return fresh_mixture(llama, layers, config.losses)


def fresh_mixture(
    config: PreTrainedConfig, layers: Sequence[LayerConfig], losses: Mapping[str, Any]
) -> PreTrainedModel:
    """Make a model of any known architecture whose networks are MoE layers with fresh weights.

    Args:
        config: A dense config of transformers; the width of its networks is what active fractions
            are shares of.
        layers: One for each decoder layer.
        losses: By registered name, its settings and `coef`.

    Raises:
        InputError: If there are more or fewer layers, or one does not fit the model.
    """
    if len(layers) != config.num_hidden_layers:
        raise InputError(
            f"layers must hold one for each of the {config.num_hidden_layers} decoder layers, got "
            f"{len(layers)}; repeat a layer that stands for several"
        )
    config_class, model_class = register_classes(dense_architecture(config.model_type))
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    moesaic = {
        "layers": [to_plain(layer) for layer in layers],
        "losses": to_plain(losses),
        # With all experts on it is nobody's parent, so it is no teacher of itself.
        "exact": False,
    }
    made: PreTrainedModel = model_class(config_class(**{**values, "moesaic": moesaic}))
    return made
