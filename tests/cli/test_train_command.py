"""`moesaic train` on what is no mixture: a pruned model, with its dense parent as teacher."""

import json

from recipe_cases import write_model, write_text

from moesaic.cli.main import main
from moesaic.models import load


def test_a_pruned_model_trains_against_its_parent(tmp_path, capsys):
    dense, pruned, out = (str(tmp_path / name) for name in ("dense", "pruned", "trained"))
    write_model(tmp_path / "dense")
    text = ["--data.sources", f"notes={write_text(tmp_path / 'text')}", "--data.block", "32"]
    argv = ["compress", dense, pruned, "--active", "0.5", "--calibration.tokens", "128"]
    assert main([*argv, *text]) == 0
    train = ["train", pruned, out, *text, "--train.tokens", "128", "--train.active", "0"]
    capsys.readouterr()
    assert main(train) == 2
    assert "cannot be its own teacher" in capsys.readouterr().err
    assert main([*train, "--teacher", dense, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["steps"], result["active"]) == (4, 1.0)
    assert load(out).config.moesaic["layers"] == load(pruned).config.moesaic["layers"]
