"""`bench gguf`: what it writes, how files take turns, and what it refuses."""

from __future__ import annotations

import sys

import pytest
import torch

from moesaic._errors import InputError, RunError
from moesaic.evaluation.bench import gguf as bench
from moesaic.evaluation.bench import llama_cpp
from moesaic.evaluation.bench.gguf import GgufConfig, bench_gguf, gguf_bench_cost
from moesaic.models.export._base import FormatConfig
from moesaic.models.export.gguf import Gguf

pytest.importorskip("gguf")

# In the place of `llama-bench`: reads the file as it would and says how many weights it holds; a
# mosaic takes half as long as its dense parent.
PROGRAM = """
import gguf, json, sys
arguments = sys.argv[1:]
reader = gguf.GGUFReader(arguments[arguments.index("-m") + 1])
moe = reader.fields["general.architecture"].contents() == "glm4moe"
numbers = sum(int(tensor.n_elements) for tensor in reader.tensors) + EXTRA
tests = [a.split(",") for flag, a in zip(arguments, arguments[1:]) if flag == "-pg"]
repeats = int(arguments[arguments.index("-r") + 1])
print(json.dumps([
    {"n_prompt": int(p), "n_gen": int(n), "model_n_params": numbers,
     "samples_ns": [(1 if moe else 2) * 10**6 * (i + 1) for i in range(repeats)]}
    for p, n in tests
]))
open(LOG, "a").write("moe " if moe else "dense ")
"""
TINY = {"model": "llama-tiny", "prompt_tokens": 8, "tokens": 4, "rounds": 2, "repeats": 3}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program that counts, and the file in which it notes what it was given."""

    def make(extra=0):
        path, log = tmp_path / "llama-bench", tmp_path / "log"
        code = PROGRAM.replace("EXTRA", str(extra)).replace("LOG", repr(str(log)))
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)
        monkeypatch.setenv(llama_cpp.VARIABLE, str(path))
        return log

    return make


def test_files_take_turns_and_every_test_is_a_cell(program):
    log = program()
    result = bench_gguf(GgufConfig(**TINY, weights=("BF16", "Q8_0")))
    assert log.read_text() == "dense moe moe dense " * 2
    assert [(cell["weights"], cell["test"], cell["tokens"]) for cell in result["cells"]] == [
        ("BF16", "decode", 4),
        ("BF16", "prefill", 8),
        ("Q8_0", "decode", 4),
        ("Q8_0", "prefill", 8),
    ]
    dense, ours = result["cells"][0]["rows"]
    assert (dense["method"], ours["method"]) == ("dense", "moesaic")
    assert (dense["median_ms"], ours["median_ms"], ours["samples"]) == (4.0, 2.0, 6)
    assert ours["faster_than_dense"] == 2.0
    assert ours["tokens_per_s"] == pytest.approx(2000.0)


def test_no_speed_of_a_file_that_is_read_otherwise(program):
    program(extra=1)
    with pytest.raises(RunError, match=r"weights of the dense file and \d+ were written; no speed"):
        bench_gguf(GgufConfig(**TINY, weights=("F32",)))


def test_the_mosaic_has_a_shared_block_and_uses_as_many_as_asked(tmp_path):
    config = GgufConfig(model="llama-tiny", experts=8, active=0.5)
    torch.manual_seed(0)
    bench.write_mosaic(bench._mosaic(config), tmp_path / "model.gguf", "F32")
    stock = Gguf(FormatConfig(weights="F32")).read(tmp_path).config
    sizes = (stock.n_shared_experts, stock.n_routed_experts, stock.num_experts_per_tok)
    assert sizes == (1, 7, 3)
    assert stock.moe_intermediate_size * 8 == 256


def test_without_llama_cpp_nothing_is_made(monkeypatch):
    monkeypatch.setattr(llama_cpp, "find", lambda: None)
    with pytest.raises(InputError, match=r"needs llama.cpp, which is left out: not installed; pip"):
        bench_gguf(GgufConfig(**TINY))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "gpt"}, "model must be one of llama-1.1b, llama-tiny, got 'gpt'"),
        ({"weights": ("Q5_0",)}, "weights must be some of F32, BF16, Q8_0, Q4_0"),
        ({"weights": ()}, "weights must be some of"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"active": 0.3}, "whole number from 2 to experts - 1, got 0.3 of 8"),
        ({"active": 0.125}, "whole number from 2"),
        ({"active": 1.0}, "whole number from 2"),
        ({"model": "llama-tiny", "experts": 16, "active": 0.5}, "groups of 32"),
    ],
)
def test_settings_that_cannot_work(values, message):
    with pytest.raises(InputError, match=message):
        GgufConfig(**values)


def test_cost_grows_with_the_model():
    small, large = (gguf_bench_cost(GgufConfig(model=m)) for m in ("llama-tiny", "llama-1.1b"))
    assert small["cells"] == large["cells"] == 6
    assert large["seconds"] > 100 * small["seconds"]
    assert large["memory_bytes"] > 8e9
