"""The command line: what it prints where, its exit codes, and one sentence for bad input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from recipe_cases import write_model, write_recipe, write_text
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TextStreamer

from moesaic.cli import doctor
from moesaic.cli import main as main_file
from moesaic.cli.main import COMMANDS, main
from moesaic.models import load
from moesaic.models.checkpoint import read_manifest
from moesaic.ops.cpu import library


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    write_model(root / "dense")
    write_text(root / "text")
    return root


def fails(capsys, argv, code=2):
    """Run a command that must fail; return its one line."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("moesaic: ")]
    assert out == ""
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("argv", [["--help"], ["ls", "routers"], ["ls", "systems", "--json"]])
def test_light_commands_do_not_import_torch(argv):
    code = (
        "import sys; from moesaic.cli.main import main; assert main(sys.argv[1:]) == 0; "
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True)


def test_help_tells_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert name in text
        assert summary in text
    assert main([]) == 2
    assert "did you mean convert" in fails_after_clear(capsys, ["convrt"])


def fails_after_clear(capsys, argv, code=2):
    capsys.readouterr()
    return fails(capsys, argv, code)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: moesaic {command}" in capsys.readouterr().out


def test_ls(capsys):
    assert main(["ls", "systems", "--json"]) == 0
    systems = json.loads(capsys.readouterr().out)
    assert len(systems) == 81
    assert main(["ls", "losses", "--json"]) == 0
    assert {row["family"] for row in json.loads(capsys.readouterr().out)} == {"loss"}
    assert main(["ls", "partition"]) == 0
    assert "coactivation" in capsys.readouterr().out
    assert "did you mean router" in fails(capsys, ["ls", "ruters"])


def test_convert_train_generate(root, capsys):
    text = ["--data.sources", f"notes={root / 'text'}", "--data.block", "32"]
    dense, mosaic, trained = (str(root / name) for name in ("dense", "mosaic", "trained"))
    argv = ["convert", dense, mosaic, "--set", "experts=4", "active=0.6", "fit_steps=3", "--json"]
    assert main([*argv, *text, "--calibration.tokens", "128"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["output"] == mosaic
    assert load(mosaic).config.moesaic["layers"][0]["num_experts"] == 4
    assert not (root / "mosaic.partial").exists()

    argv = ["train", mosaic, trained, "--train.tokens", "128", "--train.active", "0.6", "--json"]
    assert main([*argv, *text]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 4

    assert main(["generate", trained, "--prompt", "word1", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 3

    record = root / "record.json"
    argv = ["eval", dense, trained, "--output", str(record), "--evaluation.blocks-per-domain", "2"]
    argv += ["--evaluation.no-measure-speed", "--evaluation.generate-tokens", "2", "--json"]
    assert main([*argv, *text]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["record"] == str(record)
    assert main(["report", str(record), "--output", str(root / "again.html")]) == 0
    assert (root / "again.html").read_text() == (root / "record.html").read_text()
    assert "exists; delete it" in fails_after_clear(capsys, ["convert", dense, mosaic])


def test_a_mixture_is_compressed(root, capsys):
    dense, mosaic, latent = (str(root / name) for name in ("dense", "to-compress", "latent"))
    method = ["--method", "latent-experts", "--group-size", "4", "--json"]
    assert main(["convert", dense, mosaic, "--preset", "paper", "--set", "experts=4"]) == 0
    assert main(["compress", mosaic, latent, *method]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["output"], result["method"]) == (latent, "latent-experts")
    assert 0 < result["error"] < 1
    assert result["weights"] < 1
    steps = [step["step"] for step in read_manifest(root / "latent")["steps"]]
    assert steps == ["convert dsmoe", "compress latent-experts"]
    parent = [read_manifest(root / name)["parent"] for name in ("to-compress", "latent")]
    assert parent[0] == parent[1]
    assert main(["generate", latent, "--prompt", "word1", "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 3
    other = str(root / "other")
    message = "group_size must divide num_experts=4, got 3; choose a divisor"
    assert message in fails(capsys, ["compress", mosaic, other, *method, "--group-size", "3"])
    assert "is dense, latent-experts changes" in fails(capsys, ["compress", dense, other, *method])
    assert "is converted already" in fails(capsys, ["compress", mosaic, other])


def test_settings_of_a_method_are_options(root, capsys):
    out = root / "options"
    argv = ["convert", str(root / "dense"), str(out), "--preset=paper", "--router.threshold", "0.4"]
    assert main([*argv, "--experts", "6", "--set", "experts=4", "--set", "seed=3"]) == 0
    capsys.readouterr()
    config = read_manifest(out)["steps"][0]["config"]
    # The path wins over the option, the option over the preset, and no --set is lost.
    assert (config["experts"], config["seed"], config["partition"]) == (4, 3, "contiguous")
    assert config["router"]["threshold"] == 0.4
    assert config["router"]["normalize"] == "count"


def test_lists_that_are_repeated_add_up(root, capsys):
    argv = ["run", str(write_recipe(root)), "--dry-run", "--json"]
    assert main([*argv, "--set", f"output={root / 'z'}", "--set=train.tokens=64"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["output"], facts["train_tokens"]) == (str(root / "z"), 64)


def test_a_command_needs_its_arguments(capsys):
    line = fails(capsys, ["convert", "somewhere"])
    assert "output is missing; name a directory for the checkpoint after the model" in line


def kill_at(argv, file):
    """Run a command until a file appears, and kill it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moesaic.cli.main", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not file.exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the command was over before it could be killed"


def same_weights(a, b):
    left, right = (load_file(path / "model.safetensors") for path in (a, b))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.equal(right[name]), name


@pytest.mark.parametrize("moment", ["calibration/layer_000", "01-convert/layers/layer_000"])
def test_killed_convert_ends_the_same(moment, root, tmp_path, capsys):
    text = ["--data.sources", f"notes={root / 'text'}", "--data.block", "32"]
    rest = ["--experts", "4", "--fit-steps", "3", "--calibration.tokens", "128", *text]
    if not (root / "undisturbed").exists():
        assert main(["convert", str(root / "dense"), str(root / "undisturbed"), *rest]) == 0
    argv = ["convert", str(root / "dense"), str(tmp_path / "out"), *rest]
    kill_at(argv, tmp_path / "out.partial" / f"{moment}.safetensors")
    assert main(argv) == 0
    same_weights(tmp_path / "out", root / "undisturbed")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_train_ends_the_same(root, tmp_path, capsys):
    start = root / "start"
    argv = ["convert", str(root / "dense"), str(start), "--init", "open", "--experts", "4"]
    assert main([*argv, "--partition", "weights"]) == 0
    text = ["--data.sources", f"notes={root / 'text'}", "--data.block", "32"]
    rest = ["--train.tokens", "256", "--train.checkpoint-every", "2", *text]
    assert main(["train", str(start), str(tmp_path / "whole"), *rest]) == 0
    argv = ["train", str(start), str(tmp_path / "out"), *rest]
    checkpoint = tmp_path / "out.partial" / "train" / "checkpoint-2"
    kill_at(argv, checkpoint / "trainer_state.json")
    other = ["train", str(start), str(tmp_path / "out"), *rest, "--train.seed", "1"]
    assert "another training.train.seed (0, not 1)" in fails_after_clear(capsys, other)
    assert main(argv) == 0
    same_weights(tmp_path / "out", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_commands_cut_after_their_result_only_tidy_up(root, tmp_path, capsys, monkeypatch):
    rest = ["--preset", "paper", "--experts", "4"]
    convert = ["convert", str(root / "dense"), str(tmp_path / "a"), *rest]
    text = ["--data.sources", f"notes={root / 'text'}", "--data.block", "32"]
    train = ["train", str(tmp_path / "a"), str(tmp_path / "b"), "--train.tokens", "64", *text]
    train += ["--train.active", "0"]
    for module, argv in (("_method", convert), ("train", train)):
        with monkeypatch.context() as patch:

            def cut(path, **_):
                raise KeyboardInterrupt

            fake = SimpleNamespace(**{**vars(shutil), "rmtree": cut})
            patch.setattr(f"moesaic.cli.{module}.shutil", fake)
            assert "the same command goes on" in fails_after_clear(capsys, argv, 130)
        assert main([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["output"] == argv[2]
        assert not list(tmp_path.glob("*.partial"))
        assert "exists; delete it" in fails_after_clear(capsys, argv)


def test_train_is_checked_first(root, tmp_path, capsys, monkeypatch):
    argv = ["convert", str(root / "dense"), str(tmp_path / "m"), "--preset=paper", "--experts=4"]
    assert main(argv) == 0
    monkeypatch.setattr("moesaic.cli.train.load", lambda *a, **k: pytest.fail("a model was loaded"))
    argv = ["train", str(tmp_path / "m"), str(tmp_path / "t"), "--data.block", "32"]
    line = fails_after_clear(capsys, [*argv, "--train.tokens", "16"])
    assert "train.tokens must be at least one step of 32, got 16" in line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = fails(capsys, [*argv, "--train.trains", "lora"])
    assert "train.trains lora needs peft, which is not installed; pip install" in line


def test_eval_reads_text_before_models(root, tmp_path, capsys, monkeypatch):
    argv = ["convert", str(root / "dense"), str(tmp_path / "m"), "--preset=paper", "--experts=4"]
    assert main(argv) == 0
    monkeypatch.setattr(
        "moesaic.cli.eval.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
    )
    argv = ["eval", str(root / "dense"), str(tmp_path / "m"), "--output", str(tmp_path / "r.json")]
    line = fails_after_clear(capsys, [*argv, "--data.sources", "nowhere.txt"])
    assert "nowhere.txt" in line


def test_generate_says_what_it_lacks(root, capsys):
    dense = str(root / "dense")
    assert "no chat template" in fails(capsys, ["generate", dense, "--prompt", "x", "--chat"])
    assert "prompt must not be empty" in fails(capsys, ["generate", dense, "--prompt", ""])


def _generated(capsys, *argv):
    assert main(["generate", *argv, "--max-new-tokens", "6", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
def test_both_engines_write_the_same(root, capsys):
    argv = [str(root / "dense"), "--prompt", "word1 word2"]
    native = _generated(capsys, *argv)
    theirs = _generated(capsys, *argv, "--engine", "transformers")
    assert (native["engine"], theirs["engine"]) == ("native", "transformers")
    assert native["text"] == theirs["text"]
    assert native["tokens"] == theirs["tokens"] > 0
    for engine in ("native", "transformers"):
        hot = [*argv, "--engine", engine, "--temperature", "2", "--seed", "3"]
        assert _generated(capsys, *hot)["text"] == _generated(capsys, *hot)["text"]
    assert _generated(capsys, *argv, "--weights", "int8")["engine"] == "native"


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_text_is_written_as_it_comes(root, capsys, monkeypatch, engine):
    argv = [str(root / "dense"), "--prompt", "word1 word2", "--engine", engine]
    expected = _generated(capsys, *argv)
    put = []
    own = TextStreamer.put
    monkeypatch.setattr(
        TextStreamer, "put", lambda self, ids: put.append(ids.numel()) or own(self, ids)
    )
    assert main(["generate", *argv, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.strip() == expected["text"].strip()
    # The prompt, which is not shown, and then a token at a time.
    assert put == [put[0]] + [1] * expected["tokens"]


def test_without_native_code_transformers_generates_and_says_why(root, capsys, monkeypatch):
    monkeypatch.setattr(library, "why_not", lambda: "there is no compiler")
    library.library.cache_clear()
    argv = ["generate", str(root / "dense"), "--prompt", "word1", "--max-new-tokens", "3"]
    assert main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["engine"] == "transformers"
    assert "generating with transformers: there is no compiler" in err
    assert main([*argv, "--engine", "native"]) == 1
    assert "there is no compiler" in capsys.readouterr().err
    library.library.cache_clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "transformers", "--weights", "int8"], "weights 'int8' are of the native"),
        (["--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_wrong_ways_to_generate_are_refused_before_loading(
    root, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(
        "moesaic.cli.generate.load_any", lambda *a, **k: pytest.fail("a model was loaded")
    )
    argv = ["generate", str(root / "dense"), "--prompt", "word1", *options]
    assert message in fails(capsys, argv)


def test_paper_preset_needs_no_text(root, capsys):
    out = root / "paper"
    argv = ["convert", str(root / "dense"), str(out), "--preset", "paper", "--set", "experts=4"]
    assert main(argv) == 0
    layer = load(out).config.moesaic["layers"][0]
    assert layer["router_options"]["normalize"] == "count"
    assert not (root / "paper.partial").exists()


def test_dry_run_writes_nothing(root, capsys):
    recipe = write_recipe(root)
    before = sorted(root.rglob("*"))
    assert main(["run", str(recipe), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [
        "convert",
        "compress",
        "train",
        "evaluate",
    ]
    argv = ["convert", str(root / "dense"), str(root / "x"), "--set", "experts=4", "--dry-run"]
    assert main(argv) == 0
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "experts=7"], "experts=7 does not divide the FFN width"),
        (["--set", "expert=4"], "did you mean experts"),
        (["--set", "active=0"], "active must be in (0, 1], got 0"),
        (["--set", "partition=contigous"], "did you mean contiguous"),
        (["--set", "experts=7", "--set", "active=0.5"], "experts=7 does not divide the FFN width"),
        (["--set", "router=1", "router.threshold=0.4"], "does not lead to an option"),
        (["--method", "dsmo"], "did you mean dsmoe"),
        (["--preset", "papr"], "did you mean paper"),
        (["--data.sources", "nowhere.txt"], "nowhere.txt"),
        (["--data.sources", "EMPTY"], "empty"),
        (["--data.sources", "BINARY"], "not UTF-8 text"),
        (["--data.sources", "builtin:dcos"], "did you mean docs"),
        (["--experts", "7"], "experts=7 does not divide the FFN width"),
        (["--active", "1.5"], "active must be in (0, 1], got 1.5"),
        (["--partition", "contigous"], "did you mean contiguous"),
        (["--exprts", "4"], "option '--exprts' is unknown; did you mean --experts"),
        (["--init", "opn"], "invalid choice 'opn'"),
        (["--data.block", "many"], "--data.block: invalid literal for int() with base 10: 'many'"),
        (["--data.block", "1024"], "data.block must be at most the 512 positions of the model"),
        (["--method"], "Missing value for argument '--method'"),
        (["more"], "has no use for 'more'"),
        (["--set", "experts=4", "--set", "seed=-1"], "seed must be at least 0, got -1"),
        (["--set", "router=1", "router.bias=true"], "does not lead to an option"),
        (["--data.block", "32", "--calibration.tokens", "16"], "at least one block of 32, got 16"),
    ],
)
def test_bad_input_is_one_sentence_and_loads_no_model(argv, message, root, capsys, monkeypatch):
    (root / "empty.txt").write_text("")
    (root / "binary.txt").write_bytes(bytes(range(256)) * 9)
    files = {"EMPTY": str(root / "empty.txt"), "BINARY": str(root / "binary.txt")}
    argv = [files.get(word, word) for word in argv]
    monkeypatch.setattr(
        "moesaic.recipes.parent.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
    )
    if "--set" not in argv and "--experts" not in argv:
        argv += ["--set", "experts=4"]
    assert message in fails(capsys, ["convert", str(root / "dense"), str(root / "bad"), *argv])
    assert not (root / "bad.partial").exists()


def test_bad_models(root, capsys, tmp_path):
    out = str(tmp_path / "out")
    assert "does not exist" in fails(capsys, ["convert", "./nowhere", out])
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bloom", "vocab_size": 8}))
    line = fails(capsys, ["convert", str(other), out])
    assert "supported are" in line
    assert "llama" in line
    cut = write_model(tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    argv = ["convert", str(cut), out, "--preset", "paper", "--set", "experts=4"]
    assert "model.safetensors" in fails(capsys, argv)
    argv = ["convert", str(root / "dense"), out, "--preset", "paper", "--set", "experts=4"]
    assert main(argv) == 0
    capsys.readouterr()
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"gelu"'))
    assert "config.json" in fails(capsys, ["train", out, str(tmp_path / "t")])


def test_full_disk_is_said_before_any_work(root, capsys, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    argv = ["--preset", "paper", "--set", "experts=4"]
    line = fails(capsys, ["convert", str(root / "dense"), str(tmp_path / "o"), *argv])
    assert "free some space" in line


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 1, "out of memory; lower train.batch_blocks"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: tried"), 1, "out of memory; lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 1, "out of memory; lower"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . x"), 1, "free some space"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory; lower"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "the disk is full (x)"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 1, "the disk is"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_failures_that_are_not_bugs_have_a_sentence(error, code, message, capsys, monkeypatch):
    def raises(name):
        raise error

    monkeypatch.setattr(main_file.importlib, "import_module", raises)
    assert message in fails(capsys, ["doctor"], code)


def test_bugs_keep_their_traceback(capsys, monkeypatch):
    def raises(name):
        raise RuntimeError("a bug")

    monkeypatch.setattr(main_file.importlib, "import_module", raises)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])
    assert "moesaic doctor may tell" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] >= 1
    assert "measured" in facts["fastest_dtype"]


def test_the_allocator_of_this_system_is_understood(monkeypatch, capsys):
    def asks_for_too_much(name):
        torch.empty(10**15)

    monkeypatch.setattr(main_file.importlib, "import_module", asks_for_too_much)
    assert "out of memory; lower" in fails(capsys, ["doctor"], 1)


def test_one_router_setting_keeps_the_others(root, capsys):
    argv = ["convert", str(root / "dense"), str(root / "threshold"), "--dry-run"]
    text = ["--data.sources", f"notes={root / 'text'}", "--data.block", "32"]
    assert main([*argv, *text, "--set", "experts=4", "router.threshold=0.4"]) == 0


def test_chat_without_a_template(root, capsys, monkeypatch):
    monkeypatch.setattr(
        "moesaic.cli.generate.load_any", lambda *a, **k: pytest.fail("a model was loaded")
    )
    argv = ["generate", str(root / "dense"), "--prompt", "a", "--chat"]
    assert "has no chat template; leave out --chat" in fails(capsys, argv)


def test_wrong_tasks_are_refused_before_a_model_is_loaded(root, capsys, monkeypatch):
    monkeypatch.setattr(
        "moesaic.cli.eval.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
    )
    dense, record = str(root / "dense"), str(root / "tasks.json")
    argv = ["eval", dense, "--output", record, "--tasks", str(root / "none.jsonl")]
    assert "none.jsonl" in fails(capsys, argv)


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("moesaic.cli.doctor.requires", lambda name: ["nopackage>=1", "torch>=2"])
    assert main(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["missing"] == ["nopackage"]
    assert facts["remedy"] == "pip install nopackage"


def test_doctor_marks_versions_that_are_not_tested(capsys, monkeypatch):
    monkeypatch.setitem(doctor._TESTED, "torch", ("1.0", "1.13"))
    assert "NOT tested, only 1.0 to 1.13" in doctor.examine()["torch"]
