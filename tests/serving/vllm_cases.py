"""Converted models that vLLM can hold, and what our own batches write with them."""

from __future__ import annotations

from typing import Any

import torch
from model_cases import Case, decoder_layers, dense_model, layer_config, read_all
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic.inference.batching import Batch, Job
from moesaic.inference.plain_decoder import PlainDecoder
from moesaic.models.ffn import fill_experts, put_layer
from moesaic.models.modeling import adopt
from moesaic.nn.layer import MoELayer

# Heads that its attention has, and networks that its experts have without padding.
SIZES = {"head_dim": 32, "intermediate_size": 128}
GATES = {"router_options": {"bias": True}}
ONES = {"value": "one", "normalize": "none", "bias": True}
NEW_TOKENS = 12


def mosaic(model_type: str, *layers: dict[str, Any], **options: Any) -> PreTrainedModel:
    """A converted model whose layers differ, none of whose parts is zero."""
    case = Case(model_type, {**SIZES, "num_hidden_layers": len(layers), **options})
    dense = dense_model(case)
    ffns = read_all(dense)
    configs = [
        layer_config(case.row, ffn, **values) for ffn, values in zip(ffns, layers, strict=True)
    ]
    model = adopt(dense, {"layers": [to_plain(config) for config in configs]})
    draw = torch.Generator().manual_seed(4)
    for layer, ffn, config in zip(decoder_layers(model), ffns, configs, strict=True):
        moe = MoELayer(model.config.hidden_size, config)
        fill_experts(moe, ffn)
        with torch.no_grad():
            for part in (moe.router, moe.bypass):
                for parameter in () if part is None else part.parameters():
                    parameter.normal_(std=0.4, generator=draw)
            if moe.output_bias is not None:
                moe.output_bias.normal_(std=0.4, generator=draw)
        put_layer(layer, case.row, moe)
    return model.eval()


def ours(
    model: PreTrainedModel, prompts: list[list[int]]
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities that our batches give."""
    batch = Batch(PlainDecoder(model, length=64, slots=len(prompts)))
    for key, ids in enumerate(prompts):
        batch.add(key, Job(prompt_T=ids, max_new_tokens=NEW_TOKENS, num_likely=0))
    tokens = [[] for _ in prompts]
    logprobs = [[] for _ in prompts]
    while (step := batch.step()) is not None:
        for each in step.written:
            tokens[each.key].append(each.token)
            logprobs[each.key].append(each.logprob)
    return tokens, logprobs
