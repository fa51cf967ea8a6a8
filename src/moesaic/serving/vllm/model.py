"""Converted models in vLLM: its own class of the dense parent, with our layers.

Attention, embeddings, pipeline stages and everything else are vLLM's; each network is taken out and
a `FusedMoELayer` put in its place, one after another, so that no two are in memory at a time.

Shapes: D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from moesaic.models.export._obstacles import read_layers
from moesaic.serving.vllm.layer import FusedMoELayer

_PLACE = ".mlp."


class _Converted:
    """What a conversion changes of a model; stands before the parent's class among the bases."""

    model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        start = f"{prefix}.model" if prefix else "model"
        pairs = zip(self.model.layers, read_layers(config), strict=True)
        for index, (layer, values) in enumerate(pairs):
            if isinstance(layer, PPMissingLayer):
                continue
            # The dense network is given up before its blocks take memory.
            del layer.mlp
            layer.mlp = FusedMoELayer(
                config.hidden_size,
                values,
                vllm_config.quant_config,
                prefix=f"{start}.layers.{index}.mlp",
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of ours: layers here, since the parent would rename their tensors."""
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                place, found, rest = name.partition(_PLACE)
                if not found:
                    yield name, tensor
                    continue
                layer = self.model.layers[int(place.rpartition(".")[2])]
                if not isinstance(layer, PPMissingLayer):
                    for each in layer.mlp.load_weights([(rest, tensor)]):
                        loaded.add(f"{place}{_PLACE}{each}")

        return super().load_weights(others()) | loaded  # type: ignore[misc, no-any-return]


class MoesaicLlamaForCausalLM(_Converted, LlamaForCausalLM):
    """A converted Llama."""


class MoesaicMistralForCausalLM(_Converted, MistralForCausalLM):
    """A converted Mistral."""


class MoesaicQwen2ForCausalLM(_Converted, Qwen2ForCausalLM):
    """A converted Qwen 2."""


class MoesaicQwen3ForCausalLM(_Converted, Qwen3ForCausalLM):
    """A converted Qwen 3."""
