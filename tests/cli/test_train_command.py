"""`moesaic train` on what does not hold its dense parent, which is then its teacher."""

import json
import shutil

import torch
from recipe_cases import write_model, write_text

from moesaic.cli.main import main
from moesaic.models import load
from moesaic.models.checkpoint import load_dense


def test_a_pruned_model_trains_against_its_parent(tmp_path, capsys):
    dense, pruned, out = (str(tmp_path / name) for name in ("dense", "pruned", "trained"))
    write_model(tmp_path / "dense")
    text = ["--data.sources", f"notes={write_text(tmp_path / 'text')}", "--data.block", "32"]
    argv = ["compress", dense, pruned, "--active", "0.5", "--calibration.tokens", "128"]
    assert main([*argv, *text]) == 0
    train = ["train", pruned, out, *text, "--train.tokens", "128", "--train.active", "0", "--json"]
    capsys.readouterr()
    assert main(train) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["steps"], found["active"]) == (4, 1.0)
    assert load(out).config.moesaic["layers"] == load(pruned).config.moesaic["layers"]

    # The parent that was named in the manifest is gone, then another.
    shutil.move(dense, f"{dense}-moved")
    shutil.rmtree(out)
    assert main(train) != 0
    other = load_dense(f"{dense}-moved")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(dense)
    assert main(train) == 2
    assert "is not, in float32, the model that the checkpoint was made" in capsys.readouterr().err
    assert main([*train, "--teacher", f"{dense}-moved"]) == 0
    given = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert given["loss"] == found["loss"]
