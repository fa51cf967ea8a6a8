"""The command line: what it prints where, its exit codes, and one sentence for bad input."""

import errno
import json
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from recipe_cases import write_model, write_recipe, write_text

from moesaic.cli import main as main_file
from moesaic.cli.main import COMMANDS, main
from moesaic.models import load


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


def fails_after_clear(capsys, argv):
    capsys.readouterr()
    return fails(capsys, argv)


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
    ],
)
def test_bad_input_is_one_sentence_and_loads_no_model(argv, message, root, capsys, monkeypatch):
    (root / "empty.txt").write_text("")
    (root / "binary.txt").write_bytes(bytes(range(256)) * 9)
    files = {"EMPTY": str(root / "empty.txt"), "BINARY": str(root / "binary.txt")}
    argv = [files.get(word, word) for word in argv]
    monkeypatch.setattr(
        "moesaic.recipes.run.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
    )
    if "--set" not in argv:
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
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_failures_that_are_not_bugs_have_a_sentence(error, code, message, capsys, monkeypatch):
    def raises(name):
        raise error

    monkeypatch.setattr(main_file.importlib, "import_module", raises)
    assert message in fails(capsys, ["doctor"], code)


def test_bugs_keep_their_traceback(monkeypatch):
    def raises(name):
        raise RuntimeError("a bug")

    monkeypatch.setattr(main_file.importlib, "import_module", raises)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


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
        "moesaic.cli.generate.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
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
