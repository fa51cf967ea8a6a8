"""The forms of one model that are compared: dense, its DSMoE, and that at a fixed number of blocks.

Shapes: N chunks, S tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moesaic._errors import InputError
from moesaic.conversion.fix_k import FixK, fix_k
from moesaic.data import TokenBlocks
from moesaic.evaluation.bench import llama_cpp
from moesaic.evaluation.bench.runtimes._base import SPARE_CHUNKS
from moesaic.models.checkpoint import dtype_of, load, load_dense, read_config, verify_files
from moesaic.models.export._base import Format, FormatConfig
from moesaic.models.export._obstacles import THRESHOLD, read_layers
from moesaic.models.export.check import make_format

DENSE, FIXED, VARIABLE = "dense", "fixed k", "variable k"
GGUF_KINDS = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form of the model, in memory and as the files that runtimes read.

    Attributes:
        name: `dense`, `fixed k` or `variable k`.
        model: What our engine runs.
        stock: What transformers runs: of its own classes where the form has some.
        directory: What vLLM reads.
        gguf: What llama.cpp reads, or why there is no such file.
    """

    name: str
    model: PreTrainedModel
    stock: PreTrainedModel
    directory: Path
    gguf: Path | str


def make_forms(
    mosaic: str,
    dtype: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    calibration_NS: Tensor,
    fixing: FixK,
) -> tuple[list[Form], dict[str, str]]:
    """Make the forms of a converted checkpoint.

    Args:
        mosaic: The checkpoint.
        dtype: Of the weights.
        folder: Where files are written.
        tokenizer: Of the model.
        calibration_NS: Text that a fixed number of blocks is chosen on.
        fixing: How it is chosen.

    Returns:
        The forms, and why others are missing, by name.
    """
    source = verify_files(Path(mosaic))["parent"]["source"]
    dense = load_dense(source, dtype=dtype)
    forms = [_dense_form(dense, dtype, folder, tokenizer)]
    missing: dict[str, str] = {}
    if why := why_not_fixed(read_config(mosaic)):
        missing[FIXED] = why
    else:
        forms.append(_fixed_form(mosaic, dtype, folder, tokenizer, calibration_NS, fixing))
    variable = load(mosaic, dtype=dtype, verify=False)
    why = "llama.cpp knows one number of blocks for all tokens"
    forms.append(
        Form(name=VARIABLE, model=variable, stock=variable, directory=Path(mosaic), gguf=why)
    )
    return forms, missing


def why_not_fixed(config: Any) -> str:
    """Say why there is no form of a fixed number of blocks; empty if there is one."""
    if {layer.router for layer in read_layers(config)} != {THRESHOLD}:
        return "its gates have no threshold, so no number of blocks varies"
    found = make_format("glm4_moe", FormatConfig()).obstacle(config)
    return f"no stock software can hold {found}" if found else ""


def chunks_of(
    heldout: TokenBlocks, tokenizer: PreTrainedTokenizerBase, num_chunks: int, length: int
) -> tuple[str, Tensor]:
    """Give text, and the chunks of tokens that it begins with, [N, S].

    Raises:
        InputError: If there is less text.
    """
    # Decoded once more, because llama.cpp is given text.
    decode: Any = tokenizer.decode
    text = decode(heldout.ids_NS.flatten().tolist(), skip_special_tokens=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < (num_chunks + SPARE_CHUNKS) * length:
        raise InputError(
            f"held-out text must give chunks + {SPARE_CHUNKS} = {num_chunks + SPARE_CHUNKS} times "
            f"chunk_tokens={length} tokens, got {len(ids)}; lower one of them or raise "
            "data.heldout_tokens_per_domain"
        )
    kept = ids[: (num_chunks + SPARE_CHUNKS) * length]
    return decode(kept), torch.tensor(kept).view(-1, length)[:num_chunks]


def _dense_form(
    model: PreTrainedModel, dtype: str, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Form:
    directory = folder / "dense"
    model.save_pretrained(directory)
    gguf: Path | str = llama_cpp.why_not(llama_cpp.find("llama-server"), model, dtype)
    if not gguf:
        gguf = folder / "dense.gguf"
        llama_cpp.write_gguf(model, gguf, GGUF_KINDS[dtype], tokenizer)
    return Form(name=DENSE, model=model, stock=model, directory=directory, gguf=gguf)


def _fixed_form(
    mosaic: str,
    dtype: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    calibration_NS: Tensor,
    fixing: FixK,
) -> Form:
    made = make_format("glm4_moe", FormatConfig(weights=dtype))
    assert made.layout is not None
    model, _ = fix_k(load(mosaic, dtype="float32"), calibration_NS, made.layout, fixing)
    directory = folder / "fixed"
    made.write(model, None, directory, dtype_of(dtype))
    gguf = _fixed_gguf(model, dtype, folder / "gguf", tokenizer)
    stock: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype_of(dtype))
    model = model.to(dtype_of(dtype))  # type: ignore[arg-type]
    return Form(name=FIXED, model=model, stock=stock.eval(), directory=directory, gguf=gguf)


def _fixed_gguf(
    model: PreTrainedModel, dtype: str, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Path | str:
    kind = GGUF_KINDS[dtype]
    made: Format = make_format("gguf", FormatConfig(weights=kind))
    found = made.obstacle(model.config) or made.tokenizer_obstacle(tokenizer) or made.missing()
    if found:
        return f"its file cannot hold {found}"
    folder.mkdir()
    made.write(model, tokenizer, folder, dtype_of(dtype))
    return folder / f"model-{kind}.gguf"
