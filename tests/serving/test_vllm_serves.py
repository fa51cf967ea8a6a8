"""vLLM runs our checkpoints through its own fused experts: the same tokens, as likely."""

import pytest
import torch
from model_cases import Case, decoder_layers, dense_model, layer_config, random_ids, read_all

from moesaic._config import to_plain
from moesaic._errors import RunError
from moesaic.inference.batching import Batch, Job
from moesaic.inference.plain_decoder import PlainDecoder
from moesaic.models.checkpoint import new_manifest, save
from moesaic.models.ffn import fill_experts, put_layer
from moesaic.models.modeling import adopt
from moesaic.nn.layer import MoELayer
from moesaic.serving.vllm.process import VllmProcess, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"vLLM is {why_not()}"),
]

# Heads that its attention has, and networks that its experts have without padding.
SIZES = {"head_dim": 32, "intermediate_size": 128}
ONES = {"value": "one", "normalize": "none", "bias": True}
NEW_TOKENS = 12


def mosaic(model_type, *layers, **options):
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


def ours(model, prompts):
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


GATES = {"router_options": {"bias": True}}
CASES = {
    "gates": ("llama", [GATES, {"num_experts": 2, "router_options": ONES}], {}),
    "parts": (
        "llama",
        [
            {"bypass_rank": 4, "output_bias": True, "router_options": {"threshold": 0.6, **ONES}},
            {"shared_width": 32, "num_experts": 3, "bypass_rank": 2},
            {"num_experts": 0, "router": "", "shared_width": 128},
            {"shared_width": 64, "router": "sigmoid-top-k", "router_options": {"top_k": 2}},
            # Blocks of 8 neurons, fewer than its kernels take at a time.
            {"num_experts": 16, "router": "topk-softmax", "router_options": {"top_k": 5}},
        ],
        {"tie_word_embeddings": True},
    ),
    "mistral": ("mistral", [GATES, GATES], {}),
    # Its heads have the size that its width gives them.
    "qwen2": ("qwen2", [GATES, GATES], {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", [GATES, {"bypass_rank": 4}], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_the_same_and_as_likely(name, tmp_path):
    model_type, layers, options = CASES[name]
    model = mosaic(model_type, *layers, **options)
    save(model, tmp_path / "mosaic", new_manifest("none", model))
    prompts = random_ids(6, 9).tolist()
    tokens, logprobs = ours(model, prompts)
    with VllmProcess(tmp_path / "mosaic", dtype="float32", length=64) as vllm:
        found = vllm.write(prompts, NEW_TOKENS, logprobs=True)
    assert [text.tokens for text in found] == tokens
    got = torch.tensor([text.logprobs for text in found])
    torch.testing.assert_close(got, torch.tensor(logprobs), rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_fit_is_refused_with_the_reason(tmp_path):
    model = mosaic("llama", GATES, GATES)
    for layer in model.config.moesaic["layers"]:
        layer["experts"] = "thresholded-gated"
    model.save_pretrained(tmp_path)
    words = r"cannot hold experts of the kind 'thresholded-gated' \(layer 0\)"
    with pytest.raises(RunError, match=words):
        VllmProcess(tmp_path, dtype="float32", length=64)
