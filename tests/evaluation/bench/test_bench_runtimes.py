"""One table of runtimes: the same loss by every path, agreement, refusals, the whole command."""

import json
import math

import pytest
from export_cases import ONES, WIDE, merging_tokenizer
from llama_cpp_cases import needs, our_perplexity
from model_cases import Case, converted, dense_model, random_ids
from recipe_cases import write_text

from moesaic._errors import InputError, RunError
from moesaic.cli.main import main
from moesaic.evaluation.bench.runtimes.bench import (
    OURS,
    RUNTIMES,
    RuntimesConfig,
    agreement,
    check_losses,
)
from moesaic.evaluation.bench.runtimes.in_process import OurEngine, Transformers
from moesaic.models.checkpoint import new_manifest, save
from moesaic.models.export.verify import greedy
from moesaic.ops.cpu import library
from moesaic.serving.vllm import process

CASE = Case("llama", {})
needs_engine = pytest.mark.skipif(bool(library.why_not()), reason="native code cannot run here")


def models():
    return [dense_model(CASE), converted(CASE, router_options={"bias": True})]


@pytest.mark.parametrize("model", models(), ids=("dense", "converted"))
@pytest.mark.parametrize("length", [4, 11, 16])
def test_loss_is_that_of_the_second_halves(model, length):
    chunks = random_ids(3, length)
    want = math.log(our_perplexity(model, chunks.flatten().tolist(), length, 3))
    assert Transformers(model).nll(chunks) == pytest.approx(want, rel=1e-5)


@needs_engine
@pytest.mark.parametrize("model", models(), ids=("dense", "converted"))
def test_the_engine_gives_the_same_loss_and_text(model):
    chunks = random_ids(3, 12)
    engine, plain = OurEngine(model, length=24, requests=3), Transformers(model)
    assert engine.nll(chunks) == pytest.approx(plain.nll(chunks), rel=1e-4)
    want = [greedy(model, ids[None], 6) for ids in chunks]
    assert engine.write(chunks.tolist(), 6) == plain.write(chunks.tolist(), 6) == want


def test_agreement_counts_up_to_the_first_other_token():
    ours = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert agreement(ours, ours) == {"prompts": 1.0, "tokens": 1.0}
    # 1 of 4 and all 4 of 4; that later tokens are the same again says nothing.
    assert agreement([[1, 9, 3, 4], [5, 6, 7, 8]], ours) == {"prompts": 0.5, "tokens": 0.625}
    # From an end on, whatever was written is not compared.
    assert agreement([[1, 2, 9, 9], [9, 9, 9, 9]], ours, ends={3, 5}) == {
        "prompts": 1.0,
        "tokens": 1.0,
    }
    assert agreement(ours, None) is None


def test_a_wrong_loss_has_no_speed():
    losses = {("transformers", "dense"): 2.0, ("vllm", "dense"): 2.005, (OURS, "dense"): 2.0}
    check_losses(losses, "float32")
    losses["vllm", "dense"] = 2.02
    with pytest.raises(RunError, match=r"of dense in vllm differs by 0\.02 .* than the 0\.01 of"):
        check_losses(losses, "float32")
    check_losses(losses, "bfloat16")
    losses["vllm", "dense"] = math.nan
    with pytest.raises(RunError, match="of dense in vllm differs by nan"):
        check_losses(losses, "bfloat16")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"requests": 1}, "requests must be at least 2, got 1"),
        ({"chunk_tokens": 513}, r"chunk_tokens must be in \[4, 512\], got 513"),
        ({"prompt_tokens": 9, "chunk_tokens": 8}, "prompt_tokens must be at most chunk_tokens=8"),
        ({"seconds": 0.0}, "seconds above 0"),
    ],
)
def test_settings_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        RuntimesConfig(**options)


@pytest.fixture
def checkpoint(tmp_path):
    """A DSMoE that every runtime can hold, beside its dense parent."""
    options = {**WIDE, "vocab_size": 260, "max_position_embeddings": 256, "head_dim": 32}
    case = Case("llama", options)
    dense = dense_model(case)
    dense.save_pretrained(tmp_path / "dense")
    model = converted(case, router_options=ONES)
    manifest = new_manifest(str(tmp_path / "dense"), dense)
    save(model, tmp_path / "mosaic", manifest, merging_tokenizer())
    write_text(tmp_path / "text")
    return tmp_path


def bench(root, *options):
    """The rows of the command by runtime and model."""
    settings = {"prompts": 3, "requests": 3, "prompt-tokens": 6, "tokens": 5, "chunks": 2}
    settings |= {"chunk-tokens": 64, "calibration-tokens": 128, "data.block": 64, "threads": 1}
    settings |= {"mosaic": root / "mosaic", "data.sources": root / "text", "seconds": 0.1}
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert main(["bench", "runtimes", *argv, "--out", str(root / "out.json"), *options]) == 0
    (cell,) = json.loads((root / "out.json").read_text())["cells"]
    return {(row["runtime"], row["model"]): row for row in cell["rows"]}


def check_rows(rows, runtimes, form):
    """Rows of one form agree."""
    want = rows["transformers", form]["perplexity"]
    for runtime in runtimes:
        row = rows[runtime, form]
        assert row["perplexity"] == pytest.approx(want, rel=1e-2)
        assert row["same_as_ours"] == {"prompts": 1.0, "tokens": 1.0}
        assert all(rate["median"] > 0 for rate in row["tokens_per_s"].values())


def test_too_little_text_is_said(checkpoint, capsys):
    argv = ["--mosaic", str(checkpoint / "mosaic"), "--data.sources", str(checkpoint / "text")]
    assert main(["bench", "runtimes", *argv, "--data.block", "64", "--chunks", "4000"]) == 2
    assert "must give chunks + 2 = 4002 times chunk_tokens=256" in capsys.readouterr().err


@needs_engine
def test_what_is_not_installed_is_listed_with_the_reason(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv(process.VARIABLE, str(checkpoint / "no-vllm"))
    monkeypatch.setenv("LLAMA_BENCH", str(checkpoint / "no-llama"))
    rows = bench(checkpoint)
    assert len(rows) == len(RUNTIMES) * 3
    for form in ("dense", "fixed k", "variable k"):
        check_rows(rows, ("transformers", OURS), form)
        assert "make vllm-env" in rows["vllm", form]["skipped"]
    assert "is not a program" in rows["llama.cpp", "dense"]["skipped"]
    assert "one number of blocks" in rows["llama.cpp", "variable k"]["skipped"]
    table = capsys.readouterr().out
    assert "tokens as ours" in table
    assert "100%" in table


@needs_engine
@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_is_one_of_them(checkpoint, monkeypatch):
    monkeypatch.setenv("LLAMA_BENCH", str(checkpoint / "no-llama"))
    rows = bench(checkpoint)
    for form in ("dense", "fixed k", "variable k"):
        check_rows(rows, ("transformers", OURS, "vllm"), form)


@needs_engine
@needs("llama-server")
@needs("llama-perplexity")
def test_llama_cpp_is_one_of_them(checkpoint, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv(process.VARIABLE, str(checkpoint / "no-vllm"))
    rows = bench(checkpoint)
    for form in ("dense", "fixed k"):
        check_rows(rows, ("transformers", OURS, "llama.cpp"), form)
