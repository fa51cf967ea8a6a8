"""vLLM runs our checkpoints through its own fused experts: the same tokens, as likely."""

import pytest
import torch
from model_cases import random_ids
from vllm_cases import GATES, NEW_TOKENS, ONES, mosaic, ours

from moesaic._errors import RunError
from moesaic.models.checkpoint import new_manifest, save
from moesaic.serving.vllm.process import VllmProcess

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

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


def check(model, directory, **options):
    """vLLM writes what our batches write, with the same log-probabilities."""
    save(model, directory, new_manifest("none", model))
    prompts = random_ids(6, 9).tolist()
    tokens, logprobs = ours(model, prompts)
    with VllmProcess(directory, dtype="float32", length=64, **options) as vllm:
        found = vllm.write(prompts, NEW_TOKENS, logprobs=True)
    assert [text.tokens for text in found] == tokens
    got = torch.tensor([text.logprobs for text in found])
    torch.testing.assert_close(got, torch.tensor(logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_the_same_and_as_likely(name, tmp_path):
    model_type, layers, options = CASES[name]
    check(mosaic(model_type, *layers, **options), tmp_path / "mosaic")


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
def test_two_processes_write_the_same(expert_parallel, tmp_path):
    mixed = {"shared_width": 64, "num_experts": 2, "bypass_rank": 4, "output_bias": True}
    alone = {"num_experts": 0, "router": "", "shared_width": 128}
    model = mosaic("llama", GATES, {**mixed, "router_options": ONES}, alone)
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": expert_parallel}
    check(model, tmp_path / "mosaic", **parallel)


def test_a_model_that_does_not_fit_is_refused_with_the_reason(tmp_path):
    model = mosaic("llama", GATES, GATES)
    for layer in model.config.moesaic["layers"]:
        layer["experts"] = "thresholded-gated"
    model.save_pretrained(tmp_path)
    words = r"cannot hold experts of the kind 'thresholded-gated' \(layer 0\)"
    with pytest.raises(RunError, match=words):
        VllmProcess(tmp_path, dtype="float32", length=64)
