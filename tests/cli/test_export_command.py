"""`moesaic export`: from a converted directory to another one, in one command."""

import json

import pytest
from export_cases import WIDE, dsmoe, merging_tokenizer
from model_cases import Case, dense_model
from recipe_cases import write_text

from moesaic.cli.main import main
from moesaic.models import new_manifest, save


@pytest.fixture
def argv(tmp_path):
    options = {"vocab_size": 260, "max_position_embeddings": 512}
    parent = dense_model(Case("llama", WIDE | options))
    parent.save_pretrained(tmp_path / "dense")
    manifest = new_manifest(str(tmp_path / "dense"), parent)
    save(dsmoe(**options), tmp_path / "mosaic", manifest, merging_tokenizer())
    text = ["--data.sources", f"notes={write_text(tmp_path / 'text')}", "--data.block", "32"]
    out = ["--out", str(tmp_path / "out"), "--calibration-tokens", "128"]
    return ["export", str(tmp_path / "mosaic"), *out, "--blocks-per-domain", "2", *text]


def test_it_writes_and_says_what_was_lost(argv, tmp_path, capsys):
    assert main([*argv, "--format", "glm4_moe", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (planned["format"], planned["fixes_k"], planned["documents"]) == ("glm4_moe", True, 12)
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--format", "glm4_moe", "--fix-k.k", "3"]) == 0
    said = capsys.readouterr().out
    for line in ("k: 3", "shared: 1", "prompts: 20", "agreeing: 20"):
        assert f"\n{line}\n" in said
    assert "\nperplexity fixed: " in said
    assert "x of dense (" in said
    assert "x of variable (" in said
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "glm4_moe"
    assert main([*argv, "--format", "glm4_moe"]) == 2
    assert "exists; delete it or choose another" in capsys.readouterr().err


def test_json_and_no_measurement(argv, tmp_path, capsys):
    pytest.importorskip("gguf")
    more = ["--format", "gguf", "--weights", "Q8_0", "--no-measure", "--json"]
    assert main([*argv, *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "quality" not in result
    assert result["agreeing"] == 20
    assert (tmp_path / "out" / "model-Q8_0.gguf").is_file()


def test_a_wrong_name_is_one_sentence(argv, capsys):
    assert main([*argv, "--format", "mixtrl"]) == 2
    assert "format 'mixtrl' is unknown; did you mean mixtral" in capsys.readouterr().err


def test_formats_are_listed(capsys):
    assert main(["ls", "formats", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [
        "gguf",
        "glm4_moe",
        "mixtral",
        "qwen3_moe",
        "remote-code",
    ]
