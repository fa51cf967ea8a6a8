"""A checkpoint carries the package's own files and loads where moesaic is not installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import Case, converted, random_ids, same_state
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.models.remote import write_code
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.experts.thresholded import Thresholded
from moesaic.nn.layer import moe_layers
from moesaic.nn.losses._table import LOSSES
from moesaic.nn.routers._table import ROUTERS

PACKAGE = Path(moesaic.__file__).parent
CASES = [
    (Case("llama", {}), {"router": "sigmoid-threshold"}),
    (Case("gpt2", {}), {"router": "topk-softmax", "router_options": {"top_k": 2}}),
    (Case("gemma3_text", {}), {"router": "top-p", "experts": "thresholded-gated"}),
]
LOSSES_USED = {"sparsity": {"coef": 0.5}, "z-loss": {"coef": 0.1}}

# Runs where `import moesaic` fails.
ELSEWHERE = """
import json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moesaic":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
root = Path(sys.argv[1])
for name in json.loads(sys.argv[2]):
    ids = torch.load(root / "ids.pt")
    model = AutoModelForCausalLM.from_pretrained(root / name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    out = {}
    for turn in ("first", "again"):
        with torch.no_grad():
            result = model(ids, labels=ids, output_router_logits=True)
            out[turn] = {"logits": result.logits, "loss": result.loss, "aux": result.aux_loss}
        out[turn]["text"] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        model.save_pretrained(root / f"{name}-{turn}")
        model = AutoModelForCausalLM.from_pretrained(
            root / f"{name}-{turn}", trust_remote_code=True
        )
    model.train()(ids, labels=ids).loss.backward()
    out["gradients"] = {k: p.grad for k, p in model.named_parameters()}
    torch.save(out, root / f"{name}.pt")
assert "moesaic" not in sys.modules
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Checkpoints, and what a process without moesaic computed with them."""
    root = tmp_path_factory.mktemp("remote")
    torch.save(random_ids(), root / "ids.pt")
    models = {}
    for case, options in CASES:
        model = converted(case, losses=LOSSES_USED, **options)
        for layer in moe_layers(model):
            if isinstance(layer.experts, Thresholded):
                layer.experts.set_thresholds(0.3, 0.1)
        model.save_pretrained(root / case.model_type)
        models[case.model_type] = model
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(root), json.dumps(list(models))],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return root, models


@pytest.mark.parametrize("name", [case.model_type for case, _ in CASES])
def test_results_are_the_same_bits_without_moesaic(elsewhere, name):
    root, models = elsewhere
    model, ids = models[name], random_ids()
    out = torch.load(root / f"{name}.pt")
    with torch.no_grad():
        want = model(ids, labels=ids)
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    for turn in ("first", "again"):
        assert torch.equal(out[turn]["logits"], want.logits)
        assert torch.equal(out[turn]["loss"], want.loss)
        assert torch.equal(out[turn]["aux"], want.aux_loss)
        assert torch.equal(out[turn]["text"], text)
    assert want.aux_loss > 0
    names = {key for key, _ in model.named_parameters()}
    assert out["gradients"].keys() == names
    assert all(gradient.isfinite().all() for gradient in out["gradients"].values())


@pytest.mark.parametrize("name", [case.model_type for case, _ in CASES])
def test_what_was_saved_there_is_an_equal_checkpoint(elsewhere, name):
    root, models = elsewhere
    first, again = root / name, root / f"{name}-again"
    same_state(AutoModelForCausalLM.from_pretrained(again), models[name])
    code = {file.name for file in first.glob("*.py")}
    assert code == {file.name for file in again.glob("*.py")}
    for file in code:
        assert (first / file).read_bytes() == (again / file).read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (first, again)]
    assert configs[0] == configs[1]


def flat_modules():
    """Every module of the package by its name in a checkpoint."""
    files = [file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py")]
    names = [".".join(("moesaic", *file.parts)) for file in files]
    return {name.replace(".", "_"): name for name in names}


def test_code_is_the_packages_with_other_module_names(tmp_path):
    write_code(tmp_path)
    modules = flat_modules()
    names = sorted(modules, key=len, reverse=True)
    relative = re.compile(rf"\.({'|'.join(names)})\b")
    written = {file.stem: file.read_text() for file in tmp_path.iterdir()}
    entry = written.pop("modeling_moesaic")
    assert len(written) > 20
    for flat, text in written.items():
        source = PACKAGE.joinpath(*modules[flat].split(".")[1:]).with_suffix(".py").read_text()
        assert relative.sub(lambda match: modules[match.group(1)], text) == source
        if "import moesaic" not in source:
            assert not re.search(r"(from|import) moesaic\b", text)
    # transformers copies the files that the entry names.
    assert set(re.findall(r"from \.(\w+) import __doc__", entry)) == written.keys()


@pytest.mark.parametrize("table", [EXPERTS, LOSSES, ROUTERS], ids=lambda table: table.family)
def test_code_covers_every_method(table, tmp_path):
    write_code(tmp_path)
    for record in table.values():
        for target in (record.target, record.config):
            flat = target.partition(":")[0].replace(".", "_")
            assert (tmp_path / f"{flat}.py").is_file()


def test_code_needs_nothing_of_the_package_that_is_heavy(tmp_path):
    write_code(tmp_path)
    floors = {file.name.split("_")[1] for file in tmp_path.glob("moesaic_[a-z]*.py")}
    assert floors == {"models", "nn", "ops"}
    assert not (tmp_path / "moesaic_models_checkpoint.py").exists()
