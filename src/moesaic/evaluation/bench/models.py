"""Whole models: reading a prompt, and decoding greedily, dense and as a mosaic.

The mosaic is the dense model cut into blocks whose gates are constants, so that exactly the wanted
fraction is active and bfloat16 cannot change which: every token uses the same blocks of a layer.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesaic._errors import InputError, RunError
from moesaic._progress import SILENT, Progress
from moesaic.evaluation.bench import llama_cpp
from moesaic.evaluation.bench.cell import (
    DENSE,
    MODEL_TOLERANCE,
    OURS,
    Method,
    Methods,
    document,
    require_memory,
    time_cell,
    use_threads,
)
from moesaic.evaluation.bench.ours import our_engine, why_no_engine
from moesaic.evaluation.bench.roof import BUFFER_BYTES, Limits
from moesaic.evaluation.cost import model_cost
from moesaic.inference.engine import Engine
from moesaic.models.architectures import architecture_of
from moesaic.models.checkpoint import dtype_of, load_dense, read_config
from moesaic.models.ffn import decoder_layers, fill_experts, put_layer, read_ffn
from moesaic.models.modeling import adopt
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold
from moesaic.ops.cpu.packed import Format

# Shapes that stand for a model of which only the sizes matter; their weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    },
    "llama-tiny": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
# Bias of a constant gate: far from the threshold.
_GATE = 8.0
MOSAIC = "transformers mosaic"
# The parent in our engine: what the engine alone brings, without a mosaic.
OURS_DENSE = "moesaic dense"
OURS_INT8 = "moesaic int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is measured.

    Attributes:
        model: `llama-1.1b` or `llama-tiny` for random weights of that shape, or a dense model: a
            directory, hub name or `package:NAME`.
        active: Fraction of the blocks of every layer that is active.
        experts: Blocks of a layer.
        prompt_tokens: Length of the prompt; 0 for 512 where its reading is timed, else 8.
        tokens: Tokens decoded after it.
        dtype: Of the weights.
        threads: Of torch; 0 leaves what it has.
        seconds: Budget of the timing.
        roof_mb: Size of what is read to measure the bandwidth of memory.
        seed: Of weights and prompt.
    """

    model: str = "llama-1.1b"
    active: float = 0.375
    experts: int = 8
    prompt_tokens: int = 0
    tokens: int = 32
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int = 0
    seconds: float = 60.0
    roof_mb: int = BUFFER_BYTES >> 20
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.experts, self.tokens, self.roof_mb) < 1:
            raise InputError(
                "experts, tokens and roof_mb must be at least 1, got "
                f"{self.experts}, {self.tokens} and {self.roof_mb}"
            )
        if self.prompt_tokens < 0 or self.threads < 0 or self.seconds <= 0:
            raise InputError(
                "prompt_tokens and threads must be at least 0 and seconds above 0, got "
                f"{self.prompt_tokens}, {self.threads} and {self.seconds}"
            )
        num_active = self.active * self.experts
        if not 0.0 < self.active <= 1.0 or num_active < 1 or not num_active.is_integer():
            raise InputError(
                "active must be in (0, 1] and give a whole number of experts, got "
                f"{self.active} of {self.experts}"
            )

    def to_plain(self) -> dict[str, Any]:
        """The `config` section of the document."""
        return asdict(self)


def model_bench_cost(config: ModelConfig) -> dict[str, float]:
    """Estimate what a run takes: cells, seconds and bytes of memory."""
    values = LlamaConfig(**SHAPES[config.model]) if config.model in SHAPES else None
    with torch.device("meta"):
        if values is not None:
            model: Any = LlamaForCausalLM(values)
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(read_config(config.model))
    numbers = sum(p.numel() for p in model.parameters())
    # Both models, the copies of the engine and of llama.cpp; the float32 references are gone then.
    itemsize = dtype_of(config.dtype).itemsize
    copies = 4 if llama_cpp.find() is None else 5
    needed = numbers * max(copies * itemsize + 1, 2 * itemsize + 4)
    return {
        "cells": 1,
        "seconds": 2.0 * config.seconds + 4.0,
        "memory_bytes": max(needed + (config.roof_mb << 20), 2 * (config.roof_mb << 20)),
    }


def bench_decode(config: ModelConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Time greedy decoding with the cache at batch size 1, the short prompt's reading included.

    Args:
        config: What is measured.
        progress: Told of the stages.

    Returns:
        The document: machine, commit, roof, and a row per method.

    Raises:
        InputError: If the model cannot be cut so, or does not fit into memory.
        RunError: If the logits of a method are wrong; nothing is reported then.
    """
    return _run("decode", config, config.prompt_tokens or 8, config.tokens, progress)


def bench_prefill(config: ModelConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Time the reading of a prompt; arguments, result and errors as `bench_decode`."""
    return _run("prefill", config, config.prompt_tokens or 512, 0, progress)


def _run(
    kind: str, config: ModelConfig, prompt_tokens: int, new_tokens: int, progress: Progress | None
) -> dict[str, Any]:
    require_memory(model_bench_cost(config)["memory_bytes"], config.model)
    use_threads(config.threads)
    torch.manual_seed(config.seed)
    with (progress or SILENT).stage(f"bench {kind}", 3, "steps") as stage:
        dense = _dense(config)
        mosaic = make_mosaic(dense, config.experts, round(config.active * config.experts))
        ids_BS = torch.randint(0, dense.config.vocab_size, (1, prompt_tokens))
        stage.advance()
        limits = Limits(
            (config.dtype,), seconds=min(2.0, config.seconds), buffer_bytes=config.roof_mb << 20
        )
        stage.advance()
        with torch.inference_mode():
            methods = _methods(dense, mosaic, ids_BS, new_tokens)
            num_bytes, flops = model_work(mosaic, config, prompt_tokens, new_tokens)
            roof_s, rows = llama_cpp.around(
                lambda: time_cell(
                    methods,
                    config.dtype,
                    seconds=config.seconds,
                    probes=limits.probes(num_bytes, flops, config.dtype),
                    tolerance=MODEL_TOLERANCE,
                ),
                dense,
                config.dtype,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
            )
        stage.advance()
    for row in rows:
        if "median_ms" in row:
            row["tokens_per_s"] = 1e3 * (new_tokens or prompt_tokens) / row["median_ms"]
    cell = {
        "shape": config.model,
        "experts": config.experts,
        "active": config.active,
        "tokens": new_tokens or prompt_tokens,
        "dtype": config.dtype,
        "bytes": num_bytes,
        "flops": flops,
        "roof_ms": 1e3 * roof_s,
        "rows": rows,
    }
    return document(kind, config, [cell], dtype=config.dtype, roof=limits.roof)


def _dense(config: ModelConfig) -> PreTrainedModel:
    if config.model not in SHAPES:
        loaded: PreTrainedModel = load_dense(config.model, dtype=config.dtype).eval()
        return loaded
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[config.model], tie_word_embeddings=False))
    made: PreTrainedModel = model.to(dtype_of(config.dtype)).eval()
    return made


def make_mosaic(dense: PreTrainedModel, num_experts: int, num_active: int) -> PreTrainedModel:
    """Cut a copy of a dense model into blocks of which a constant set is active in each layer.

    Raises:
        InputError: If its neurons do not divide by the number of experts.
    """
    row = architecture_of(dense.config.model_type)
    act = getattr(dense.config, row.activation)
    model = copy.deepcopy(dense).eval()
    layers = []
    configs = []
    for i, layer in enumerate(decoder_layers(model)):
        ffn = read_ffn(layer, row, act)
        if ffn.width % num_experts:
            raise InputError(
                f"experts must divide the {ffn.width} neurons of a layer, got {num_experts}"
            )
        config = LayerConfig(
            num_experts=num_experts,
            width=ffn.width // num_experts,
            router="sigmoid-threshold",
            router_options={"bias": True, "value": "one", "normalize": "none"},
            experts="gated" if row.gated else "plain",
            activation=act,
            bias=ffn.up_bias_F is not None,
            output_bias=ffn.down_bias_D is not None,
        )
        moe = MoELayer(model.config.hidden_size, config).to(model.dtype).eval()
        fill_experts(moe, ffn)
        router = moe.router
        assert isinstance(router, SigmoidThreshold)
        assert router.bias is not None
        with torch.no_grad():
            router.weight.zero_()
            router.bias.fill_(-_GATE)
            # Another set in every layer.
            router.bias[(torch.arange(num_active) + i) % num_experts] = _GATE
        layers.append(moe)
        configs.append(asdict(config))
    model = adopt(model, {"layers": configs})
    for layer, moe in zip(decoder_layers(model), layers, strict=True):
        put_layer(layer, row, moe)
    return model


def model_work(
    mosaic: PreTrainedModel, config: ModelConfig, prompt_tokens: int, new_tokens: int
) -> tuple[float, float]:
    """Bytes and FLOPs of the decoded tokens, or of the prompt where there are none.

    The active weights are read once per decoded token or once for the prompt; of the table of
    embeddings, unless it is the head too, only rows are read. Attention scores and the cache are
    left out, and so is the short prompt before decoding: the limit is a little too low.
    """
    cost = model_cost(mosaic, [config.active] * len(moe_layers(mosaic)))
    table: Any = mosaic.get_input_embeddings()
    head: Any = mosaic.get_output_embeddings()
    unread = 0 if head.weight is table.weight else table.weight.numel()
    num_bytes = (cost.active_parameters - unread) * dtype_of(config.dtype).itemsize
    if new_tokens:
        return new_tokens * num_bytes, new_tokens * cost.flops_per_token
    head_flops = 2 * head.weight.numel()
    return num_bytes, prompt_tokens * (cost.flops_per_token - head_flops) + head_flops


def _methods(
    dense: PreTrainedModel, mosaic: PreTrainedModel, ids_BS: Tensor, new_tokens: int
) -> Methods:
    found = Methods()
    for name, model in ((DENSE, dense), (MOSAIC, mosaic)):
        read = _reading(model, ids_BS)
        timed = _generating(model, ids_BS, new_tokens) if new_tokens else read
        found.running[name] = Method([timed], _reference(model, ids_BS), read)
    if why := why_no_engine():
        found.skipped.update(dict.fromkeys((OURS, OURS_DENSE, OURS_INT8), why))
        return found
    ids = ids_BS[0].tolist()
    ours: tuple[tuple[str, PreTrainedModel, str, Format | None], ...] = (
        (OURS, mosaic, MOSAIC, None),
        (OURS_DENSE, dense, DENSE, None),
        (OURS_INT8, mosaic, MOSAIC, "int8"),
    )
    for name, model, parent, weights in ours:
        engine = our_engine(model, len(ids) + new_tokens, weights)
        read = partial(engine.prefill, ids)
        timed = partial(engine.generate, ids, new_tokens) if new_tokens else read
        checked = partial(_checked, name, engine, ids, new_tokens)
        expected = found.running[parent].expected
        found.running[name] = Method([timed], expected, checked, weights or "")
    return found


def _checked(name: str, engine: Engine, ids: list[int], new_tokens: int) -> Tensor:
    """Logits after the prompt, once all tokens that are timed were seen to come."""
    if new_tokens and (count := len(engine.generate(ids, new_tokens))) != new_tokens:
        raise RunError(
            f"{name} gave {count} tokens of {new_tokens}; no speed is reported until it is right"
        )
    return engine.prefill(ids)


def _reference(model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
    """Logits of the last position, in float32 and with the plain path of experts."""
    wide: Any = copy.deepcopy(model).float()
    for layer in moe_layers(wide):
        assert layer.experts is not None
        layer.experts.backend = "reference"
    return _reading(wide, ids_BS)()


def _reading(model: Any, ids_BS: Tensor) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids_BS, use_cache=True, logits_to_keep=1).logits[0, -1]


def _generating(model: Any, ids_BS: Tensor, new_tokens: int) -> Callable[[], object]:
    return lambda: model.generate(
        input_ids=ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
