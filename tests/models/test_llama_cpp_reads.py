"""llama.cpp itself reads our files: its server writes the tokens that our model writes."""

import pytest
import torch
from export_cases import export_format, fitting, merging_tokenizer, softmax
from llama_cpp_cases import needs, our_perplexity
from model_cases import random_ids

from moesaic.evaluation.bench.runtimes.llama_cpp import ask, continued, perplexities, server
from moesaic.models.export.verify import greedy

KINDS = ("F32", "BF16", "Q8_0", "Q4_0")


@needs("llama-server")
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_same(kind, tmp_path):
    pytest.importorskip("gguf")
    made = export_format("gguf", kind)
    model = fitting("gguf", vocab_size=260, tie_word_embeddings=True, max_position_embeddings=256)
    made.round(model, torch.float32)
    tokenizer = merging_tokenizer()
    made.write(model, tokenizer, tmp_path, torch.float32)
    file = tmp_path / f"model-{kind}.gguf"
    with server(file, tmp_path / "log", "-c", "256", "-np", "1", "-t", "1") as address:
        text = "the cloth of that mother"
        assert ask(address, "tokenize", content=text)["tokens"] == tokenizer(text)["input_ids"]
        template = ask(address, "apply-template", messages=[{"role": "user", "content": "the end"}])
        assert template["prompt"].startswith("the end<end>")
        # Its products round inputs as well where weights are few bits, so that tokens may change.
        same = sum(
            continued(address, ids.tolist(), 8) == greedy(model, ids[None], 8)
            for ids in random_ids(6, 12)
        )
    assert same == 6 if kind in ("F32", "BF16") else same >= 3


@needs("llama-server")
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_tokens_of_softmax_weights_are_the_same(tied, tmp_path):
    pytest.importorskip("gguf")
    model = softmax(vocab_size=260, tie_word_embeddings=tied, max_position_embeddings=256)
    export_format("gguf", "F32").write(model, merging_tokenizer(), tmp_path, torch.float32)
    file, log = tmp_path / "model-F32.gguf", tmp_path / "log"
    # Its fast attention rounds to float16, and one of these tokens is nearly as likely as another.
    exact = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
    with server(file, log, "-c", "256", "-np", "1", "-t", "1", *exact) as address:
        for ids in random_ids(6, 12):
            assert continued(address, ids.tolist(), 8) == greedy(model, ids[None], 8)


@needs("llama-perplexity")
@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-3), ("Q8_0", 1e-2)])
def test_perplexity_is_the_same(kind, bound, tmp_path):
    pytest.importorskip("gguf")
    made = export_format("gguf", kind)
    model = fitting("gguf", vocab_size=260, max_position_embeddings=256)
    made.round(model, torch.float32)
    tokenizer = merging_tokenizer()
    made.write(model, tokenizer, tmp_path, torch.float32)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"the {i * i % 97}th thing" for i in range(40)))
    found = perplexities(tmp_path / f"model-{kind}.gguf", text, 64, "-t", "1")
    chunks, theirs = max(found.items())
    assert chunks > 4
    ours = our_perplexity(model, tokenizer(text.read_text())["input_ids"], 64, chunks)
    assert theirs == pytest.approx(ours, rel=bound)
