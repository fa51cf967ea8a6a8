"""GGUF files for llama.cpp: that of GLM-4.5 (arXiv 2508.06471), or for softmax weights Mixtral's.

Tried against llama.cpp: the router and the bias of the choice stay in F32; the bias has to be
there, and so has a shared block; a tied head may be left out. The file is what the stock model of
transformers holds, under the names that the `gguf` package has for it (`gguf_architectures.py`),
with the tokenizer and its chat template.

Shapes: E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.models.export._base import AUTO, Format, FormatConfig, check_kind
from moesaic.models.export._obstacles import read_layers
from moesaic.models.export._stock import empty_model
from moesaic.models.export.gguf_architectures import (
    add_decoder,
    architecture_for,
    num_rotated,
    pair_halves,
    part_pairs,
    pieces,
    stock_values,
)
from moesaic.models.export.gguf_vocab import add_tokenizer, pre_tokenizer
from moesaic.models.export.glm4_moe import LAYOUT

_KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
_OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Numbers that share a scale.
_GROUP = 32


class Gguf(Format):
    """Writes a directory with one file, `model-KIND.gguf`.

    Args:
        config: Settings.
    """

    name = "gguf"
    layout = LAYOUT

    def __init__(self, config: FormatConfig) -> None:
        check_kind(self.name, config, _KINDS)
        self.config = config

    def obstacle(self, config: Any) -> str:
        """Say what of a model it cannot hold."""
        if found := architecture_for(config).obstacle(config):
            return found
        rope = (config.rope_parameters or {}).get("rope_type", "default")
        if rope != "default":
            return f"rotary positions of the type {rope!r}"
        if self.config.weights in ("Q8_0", "Q4_0"):
            widths = [config.hidden_size, *(layer.width for layer in read_layers(config))]
            odd = [width for width in widths if width % _GROUP]
            if odd:
                return (
                    f"rows of {odd[0]} numbers in {self.config.weights}, which groups {_GROUP}; "
                    "other weights or another number of blocks fit"
                )
        return ""

    def tokenizer_obstacle(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Say what of a tokenizer it cannot hold."""
        if pre_tokenizer(tokenizer):
            return ""
        return "a tokenizer that is no byte-level BPE with a cut that llama.cpp has a name for"

    def missing(self) -> str:
        """Name the package if it is not installed."""
        return "" if importlib.util.find_spec("gguf") else "gguf"

    @torch.no_grad()
    def round(self, model: PreTrainedModel, dtype: torch.dtype) -> bool:
        """Quantise every matrix and dequantise it."""
        changed = False
        for name, parameter in model.named_parameters():
            kind = self._kind(name, parameter, dtype)
            rounded = _dequantized(*_quantized(parameter, kind)).to(parameter.device)
            changed = changed or not torch.equal(rounded, parameter)
            parameter.copy_(rounded)
        return changed

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        directory: Path,
        dtype: torch.dtype,
    ) -> None:
        """Write the file, one tensor at a time."""
        import gguf

        architecture = architecture_for(model.config)
        stock = architecture.build(model)
        config = stock.config
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        kind = self._stored(dtype)
        writer = gguf.GGUFWriter(directory / f"model-{kind}.gguf", architecture.name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
        add_decoder(writer, config)
        architecture.describe(writer, config)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            add_tokenizer(writer, tokenizer, config.vocab_size)
        tensors = [
            (
                target,
                tensor,
                self._kind(name, tensor, dtype),
                num_rotated(architecture, name, config),
            )
            for name, value in stock.state_dict().items()
            if not (tied and name == "lm_head.weight")
            for target, tensor in pieces(architecture, name, value, config)
        ]
        for target, tensor, each, _ in tensors:
            number = gguf.GGMLQuantizationType[each]
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), number)
            num_bytes = int(np.prod(shape))
            writer.add_tensor_info(target, shape, np.dtype(np.uint8), num_bytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # One tensor at a time, so that no second model is held.
        for _, tensor, each, heads in tensors:
            ordered = pair_halves(tensor, heads) if heads else tensor
            writer.write_tensor_data(_quantized(ordered, each)[0].view(np.uint8))
        writer.close()

    def read(self, directory: Path) -> PreTrainedModel:
        """Build the stock model that the file describes, dequantised."""
        import gguf

        (file,) = directory.glob("*.gguf")
        reader = gguf.GGUFReader(file)
        architecture, values = stock_values(reader)
        stock = empty_model(architecture.stock, values)
        held = {each.name: each for each in reader.tensors}
        state = {}
        for name, empty in stock.state_dict().items():
            parts = []
            for target, _ in pieces(architecture, name, empty, stock.config):
                # A tied head is left out.
                found = held.get(target) or held["token_embd.weight"]
                parts.append(_dequantized(found.data, found.tensor_type.name))
            state[name] = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            if heads := num_rotated(architecture, name, stock.config):
                state[name] = part_pairs(state[name], heads)
        stock.load_state_dict(state, assign=True)
        loaded: PreTrainedModel = stock
        return loaded

    def _stored(self, dtype: torch.dtype) -> str:
        return _OF_DTYPE[dtype] if self.config.weights == AUTO else self.config.weights

    def _kind(self, name: str, tensor: Tensor, dtype: torch.dtype) -> str:
        """How one tensor is stored."""
        if tensor.dim() < 2 or ".router." in name or ".mlp.gate." in name:
            return "F32"
        kind = self._stored(dtype)
        # Four bits are too few for the rows that every token reads or is compared with.
        ends = name in ("model.embed_tokens.weight", "lm_head.weight")
        return "Q8_0" if kind == "Q4_0" and ends else kind


def _quantized(tensor: Tensor, kind: str) -> tuple[NDArray[Any], str]:
    import gguf

    wide = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
    data: NDArray[Any] = gguf.quantize(wide, gguf.GGMLQuantizationType[kind])
    return data, kind


def _dequantized(data: NDArray[Any], kind: str) -> Tensor:
    import gguf

    wide = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(wide, dtype=np.float32))
