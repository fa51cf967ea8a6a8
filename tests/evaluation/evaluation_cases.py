"""Tiny models of every kind, text and a tokenizer, for the tests of evaluation."""

import dataclasses

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from moesaic.data import Provenance, TokenBlocks
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.ffn import decoder_layers, fill_experts, put_layer, read_ffn
from moesaic.models.modeling import adopt
from moesaic.nn.layer import LayerConfig, MoELayer

VOCAB, DIM, WIDTH, LAYERS, POSITIONS = 61, 16, 24, 2, 64

SIZES = {
    "gpt2": {"n_embd": DIM, "n_layer": LAYERS, "n_head": 2, "n_inner": WIDTH, "n_positions": 64},
    "opt": {"hidden_size": DIM, "ffn_dim": WIDTH, "word_embed_proj_dim": DIM},
    "gpt_neox": {"hidden_size": DIM, "intermediate_size": WIDTH},
}
COMMON = {
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {
    "hidden_size": DIM,
    "intermediate_size": WIDTH,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def dense_model(model_type="llama", seed=0, **options):
    row = ARCHITECTURES[model_type]
    sizes = SIZES.get(model_type, GATED)
    common = {k: v for k, v in COMMON.items() if not (model_type == "gpt2" and k[:4] == "num_")}
    config = getattr(transformers, row.name + row.config)(**common, **sizes, **options)
    torch.manual_seed(seed)
    model = getattr(transformers, row.name + row.head)(config)
    with torch.no_grad():
        # Larger than the usual initialisation, so that models and experts differ visibly.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return model.eval()


def convert(model, *, experts=4, shared=0, router="sigmoid-threshold", spread=1.0, **options):
    """Cut every network of a dense model, in place, into equal experts and a shared part."""
    row = ARCHITECTURES[model.config.model_type]
    ffns = [
        read_ffn(layer, row, "silu" if row.gated else "relu") for layer in decoder_layers(model)
    ]
    ffns = [ffn._replace(**{k: v.clone() for k, v in tensors(ffn)}) for ffn in ffns]
    layers = [
        LayerConfig(
            num_experts=experts,
            width=(ffn.width - shared) // experts if experts else 0,
            shared_width=shared,
            output_bias=ffn.down_bias_D is not None,
            router=router if experts else "",
            router_options=options if experts else {},
            experts="gated" if row.gated else "plain",
            activation=ffn.activation,
            bias=ffn.up_bias_F is not None,
        )
        for ffn in ffns
    ]
    model = adopt(model, {"layers": [dataclasses.asdict(layer) for layer in layers]})
    for layer, ffn, config in zip(decoder_layers(model), ffns, layers, strict=True):
        moe = MoELayer(model.config.hidden_size, config)
        width = config.shared_width + config.num_experts * config.width
        fill_experts(moe, ffn.keep(torch.arange(width)))
        if moe.router is not None:
            torch.nn.init.normal_(moe.router.weight, std=spread)
        put_layer(layer, row, moe)
    return model.eval()


def tensors(ffn):
    return [(k, v) for k, v in ffn._asdict().items() if isinstance(v, torch.Tensor)]


def make_blocks(documents, *, length=17, vocab=VOCAB, seed=0):
    """Random text; `documents` gives, by domain, the number of blocks of each document."""
    rng = np.random.default_rng(seed)
    domain_N, document_N = [], []
    for index, counts in enumerate(documents.values()):
        for count in counts:
            document_N += [max(document_N, default=-1) + 1] * count
            domain_N += [index] * count
    return blocks_of(
        rng.integers(3, vocab, (len(domain_N), length)), domain_N, document_N, tuple(documents)
    )


def blocks_of(ids_NS, domain_N, document_N, domains):
    return TokenBlocks(
        ids_NS=np.asarray(ids_NS, np.int32),
        domain_N=np.asarray(domain_N, np.int16),
        document_N=np.asarray(document_N, np.int32),
        domains=domains,
        provenance=tuple(
            Provenance(
                source=f"source of {name}",
                domain=name,
                licence="CC0-1.0",
                sha256="0" * 64,
                documents=1,
                characters=1,
                tokens=1,
            )
            for name in domains
        ),
    )


class Letters:
    """A tokenizer without files: token i is one character."""

    pad_token_id = 0

    def __call__(self, text):
        return {"input_ids": [3 + ord(c) % (VOCAB - 3) for c in text]}

    def decode(self, ids, **_):
        return "".join(chr(48 + i) for i in ids)
