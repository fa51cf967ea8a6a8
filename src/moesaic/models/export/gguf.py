"""GGUF files for llama.cpp: its architecture `glm4moe`, that of GLM-4.5 (arXiv 2508.06471).

Tried against llama.cpp: the router and the bias of the choice stay in F32; the bias has to be
there, and so has a shared block; queries and keys are not permuted; a tied head may be left out.
The file is what `Glm4MoeForCausalLM` holds, under the names that the `gguf` package has for it,
with the tokenizer and its chat template.

Shapes: E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
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
from moesaic.models.export.gguf_vocab import add_tokenizer, pre_tokenizer
from moesaic.models.export.glm4_moe import LAYOUT, build_glm4_moe, obstacle

_ARCH = "glm4moe"
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
        if found := obstacle(config):
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

        stock = build_glm4_moe(model)
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        kind = self._stored(dtype)
        writer = gguf.GGUFWriter(directory / f"model-{kind}.gguf", _ARCH)
        _add_metadata(writer, stock.config, kind)
        if tokenizer is None:
            writer.add_tokenizer_model("none")
        else:
            add_tokenizer(writer, tokenizer, stock.config.vocab_size)
        tensors = [
            (target, tensor, self._kind(name, tensor, dtype))
            for name, value in stock.state_dict().items()
            if not (tied and name == "lm_head.weight")
            for target, tensor in _pieces(name, value, stock.config.num_hidden_layers)
        ]
        for target, tensor, each in tensors:
            number = gguf.GGMLQuantizationType[each]
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), number)
            num_bytes = int(np.prod(shape))
            writer.add_tensor_info(target, shape, np.dtype(np.uint8), num_bytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor, each in tensors:
            writer.write_tensor_data(_quantized(tensor, each)[0].view(np.uint8))
        writer.close()

    def read(self, directory: Path) -> PreTrainedModel:
        """Build the stock model that the file describes, dequantised."""
        import gguf

        (file,) = directory.glob("*.gguf")
        reader = gguf.GGUFReader(file)
        stock = empty_model("Glm4Moe", _values(reader))
        held = {each.name: each for each in reader.tensors}
        state = {}
        for name, empty in stock.state_dict().items():
            pieces = []
            for target, _ in _pieces(name, empty, stock.config.num_hidden_layers):
                # A tied head is left out.
                found = held.get(target) or held["token_embd.weight"]
                pieces.append(_dequantized(found.data, found.tensor_type.name))
            state[name] = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
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


@functools.cache
def _names(num_layers: int) -> Any:
    """The names of tensors; making them takes a while."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM4_MOE, num_layers)


def _pieces(name: str, tensor: Tensor, num_layers: int) -> Iterator[tuple[str, Tensor]]:
    """Name a tensor of `Glm4MoeForCausalLM`, or its two halves, as GGUF does."""
    names = _names(num_layers)
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


def _quantized(tensor: Tensor, kind: str) -> tuple[NDArray[Any], str]:
    import gguf

    wide = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
    data: NDArray[Any] = gguf.quantize(wide, gguf.GGMLQuantizationType[kind])
    return data, kind


def _dequantized(data: NDArray[Any], kind: str) -> Tensor:
    import gguf

    wide = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(wide, dtype=np.float32))


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


def _add_metadata(writer: Any, config: Any, kind: str) -> None:
    import gguf

    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}" if kind != "F32" else "ALL_F32"])
    add_decoder(writer, config)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _values(reader: Any) -> dict[str, Any]:
    """Read the stock config out of a file's metadata."""

    def of(key: str) -> Any:
        return reader.fields[f"{_ARCH}.{key}"].contents()

    names = {each.name for each in reader.tensors}
    return {
        "vocab_size": of("vocab_size"),
        "num_hidden_layers": of("block_count"),
        "max_position_embeddings": of("context_length"),
        "hidden_size": of("embedding_length"),
        "intermediate_size": of("feed_forward_length"),
        "num_attention_heads": of("attention.head_count"),
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": of("attention.key_length"),
        "rope_parameters": {"rope_type": "default", "rope_theta": of("rope.freq_base")},
        "partial_rotary_factor": of("rope.dimension_count") / of("attention.key_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
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
        "tie_word_embeddings": False,
    }
