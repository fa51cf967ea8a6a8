"""Exports end to end on a tiny checkpoint: fix, write, verify, measure, record."""

import json

import pytest
import torch
from calibration_cases import make_text
from export_cases import WIDE, dsmoe, export_format, fitting, merging_tokenizer
from model_cases import VOCAB, Case, dense_model, random_ids

import moesaic
from moesaic._errors import CheckpointError, InputError, RunError
from moesaic.conversion.fix_k import FixK
from moesaic.models import new_manifest, save
from moesaic.models.checkpoint import verify_files
from moesaic.models.export import FORMATS, _directory
from moesaic.models.export.verify import near_ties, verify
from moesaic.nn.layer import moe_layers
from moesaic.recipes.exporting import ExportConfig, export, plan_export

LLAMA = [name for name in FORMATS if name != "qwen3_moe"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A DSMoE of 4 blocks, and its parent beside it."""
    root = tmp_path_factory.mktemp("exporting")
    parent = dense_model(Case("llama", WIDE))
    parent.save_pretrained(root / "dense")
    save(dsmoe(), root / "mosaic", new_manifest(str(root / "dense"), parent))
    return root / "mosaic"


@pytest.fixture(scope="module")
def texts():
    """Training and held-out text."""
    return make_text(seed=1), make_text(seed=2)


@pytest.mark.parametrize("name", LLAMA)
def test_an_export_is_verified_and_recorded(name, checkpoint, texts, tmp_path):
    if name == "gguf":
        pytest.importorskip("gguf")
    text, heldout = texts
    out = tmp_path / "out"
    before = verify_files(checkpoint)
    results = export(checkpoint, out, name, text=text, heldout=heldout)
    assert verify_files(checkpoint) == before
    manifest = verify_files(out)
    step = manifest["steps"][-1]
    assert manifest["parent"] == before["parent"]
    assert (step["step"], step["config"]["format"]) == (f"export {name}", name)
    assert step["results"] == json.loads(json.dumps(results))
    assert results["difference"] <= 1e-5
    assert results["prompts"] == results["agreeing"] > 4
    fixed = "fixed-k" in FORMATS[name].abilities
    stages = ["dense", "variable", "fixed"] if fixed else ["dense", "checkpoint"]
    assert list(results["quality"]) == stages
    assert list(results["quality"][stages[-1]]["ratio"]) == stages[:-1]
    for found in results["quality"].values():
        assert 1.0 < found["perplexity"] < 1e4
    # What is read back loses what was said.
    model = export_format(name).read(out)
    ids = torch.from_numpy(heldout.ids_NS).long()
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert float(loss.exp()) == pytest.approx(
        results["quality"][stages[-1]]["perplexity"], rel=1e-4
    )


def test_training_recovers_what_fixing_lost(checkpoint, texts, tmp_path):
    text, heldout = texts
    # A rate at which blocks this small move within a few steps.
    config = ExportConfig(recovery_tokens=40 * text.block, recovery_rate=3e-3, fix_k=FixK(k=2))
    out = tmp_path / "out"
    results = export(checkpoint, out, "glm4_moe", config, text=text, heldout=heldout)
    found = verify_files(out)["steps"][-1]["results"]["recovery"]
    assert (found["steps"], found["tokens"]) == (40, 40 * text.block)
    assert found["last_loss"] < found["first_loss"]
    assert list(results["quality"]) == ["dense", "variable", "fixed", "recovered"]
    assert results["agreeing"] == results["prompts"]
    # What was written is what was trained; its routers are those that were fixed.
    plain = ExportConfig(fix_k=FixK(k=2))
    export(checkpoint, tmp_path / "plain", "glm4_moe", plain, text=text)
    trained, fixed = (
        export_format("glm4_moe").read(path).state_dict() for path in (out, tmp_path / "plain")
    )
    changed = {name for name, value in trained.items() if not torch.equal(value, fixed[name])}
    assert changed
    assert all("experts" in name for name in changed)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith("tmp")] == []


def test_recovery_is_refused_where_there_is_none(checkpoint, texts, tmp_path):
    config = ExportConfig(recovery_tokens=64)
    with pytest.raises(InputError, match="recovery_tokens must be 0 for remote-code, got 64"):
        plan_export(checkpoint, "remote-code", config)
    with pytest.raises(InputError, match="recovery_tokens must be at least 0"):
        ExportConfig(recovery_tokens=-1)
    model = dsmoe()
    save(model, tmp_path / "mosaic", new_manifest(str(tmp_path / "gone"), model))
    with pytest.raises(InputError, match="gone does not exist"):
        export(tmp_path / "mosaic", tmp_path / "out", "glm4_moe", config, text=texts[0])


def test_rounding_is_a_loss_of_its_own(checkpoint, texts, tmp_path):
    text, heldout = texts
    config = ExportConfig(weights="bfloat16", fix_k=FixK(k=3))
    results = export(checkpoint, tmp_path / "out", "glm4_moe", config, text=text, heldout=heldout)
    assert list(results["quality"]) == ["dense", "variable", "fixed", "exported"]
    assert set(results["quality"]["exported"]["ratio"]) == {"dense", "variable", "fixed"}
    assert results["k"] == 3
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["dtype"], stored["num_experts_per_tok"]) == ("bfloat16", 2)


def test_a_parent_that_is_gone_is_said(texts, tmp_path, caplog):
    model = dsmoe()
    save(model, tmp_path / "mosaic", new_manifest(str(tmp_path / "dense"), model))
    text, heldout = texts
    results = export(tmp_path / "mosaic", tmp_path / "out", "mixtral", text=text, heldout=heldout)
    assert list(results["quality"]) == ["variable", "fixed"]
    assert f"{tmp_path / 'dense'} does not exist" in caplog.text


def test_a_checkpoint_keeps_its_dtype(texts, tmp_path):
    model = dsmoe(dtype=torch.bfloat16)
    save(model, tmp_path / "half", new_manifest("tiny", model))
    export(tmp_path / "half", tmp_path / "out", "mixtral", text=texts[0])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_fixed_needs_no_text(tmp_path):
    model = fitting("glm4_moe")
    save(model, tmp_path / "fixed", new_manifest("tiny", model))
    results = export(tmp_path / "fixed", tmp_path / "out", "glm4_moe")
    assert "k" not in results
    assert "quality" not in results
    assert (results["prompts"], results["agreeing"]) == (20, 20)


def test_a_tokenizer_goes_along(texts, tmp_path):
    pytest.importorskip("gguf")
    model = dsmoe(vocab_size=260)
    save(model, tmp_path / "mosaic", new_manifest("tiny", model), merging_tokenizer())
    for name in ("glm4_moe", "gguf"):
        export(tmp_path / "mosaic", tmp_path / name, name, text=texts[0])
    assert (tmp_path / "glm4_moe" / "tokenizer.json").is_file()
    assert [file.suffix for file in sorted((tmp_path / "gguf").iterdir())] == [".gguf", ".json"]


def test_a_tokenizer_that_does_not_fit_is_said(texts, tmp_path):
    pytest.importorskip("gguf")
    from recipe_cases import byte_tokenizer

    model = dsmoe(vocab_size=260)
    save(model, tmp_path / "mosaic", new_manifest("tiny", model), byte_tokenizer())
    with pytest.raises(InputError, match=r"^gguf cannot hold a tokenizer that .*; glm4_moe takes"):
        export(tmp_path / "mosaic", tmp_path / "out", "gguf", text=texts[0])


def test_what_is_wrong_is_said_before_the_model_is_read(checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("moesaic.recipes.exporting.load", None)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"^format 'glm4' is unknown; did you mean glm4_moe\?"):
        export(checkpoint, out, "glm4", text=texts[0])
    with pytest.raises(InputError, match=r"^glm4_moe needs the same number of blocks for every"):
        export(checkpoint, out, "glm4_moe")
    with pytest.raises(InputError, match=r"^qwen3_moe cannot hold attention without norms"):
        export(checkpoint, out, "qwen3_moe", text=texts[0])
    with pytest.raises(InputError, match="exists; delete it or choose another"):
        export(checkpoint, tmp_path, "glm4_moe", text=texts[0])
    with pytest.raises(InputError, match=r"^weights of glm4_moe must be one of auto, float32"):
        export(checkpoint, out, "glm4_moe", ExportConfig(weights="Q8_0"), text=texts[0])


@pytest.mark.parametrize("name", ["calibration_tokens", "blocks_per_domain"])
def test_settings_out_of_range(name):
    with pytest.raises(InputError, match=rf"{name} must be at least 1, got 0"):
        ExportConfig(**{name: 0})


def test_a_damaged_checkpoint_is_named(texts, tmp_path):
    model = dsmoe()
    save(model, tmp_path / "mosaic", new_manifest("tiny", model))
    with (tmp_path / "mosaic" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        export(tmp_path / "mosaic", tmp_path / "out", "glm4_moe", text=texts[0])


def test_a_wrong_export_leaves_nothing(checkpoint, texts, tmp_path, monkeypatch):
    read = _directory.DirectoryFormat.read

    def wrong(self, directory):
        model = read(self, directory)
        with torch.no_grad():
            model.lm_head.weight[3] += 1.0
        return model

    monkeypatch.setattr(_directory.DirectoryFormat, "read", wrong)
    with pytest.raises(RunError, match="so it was not kept"):
        export(checkpoint, tmp_path / "out", "glm4_moe", text=texts[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_text_that_differs_is_found(tied):
    """Same logits on the prompts, another continuation: what only generation shows.

    Ties of experts everywhere are no excuse for every prompt.
    """
    model = fitting("glm4_moe")
    if tied:
        with torch.no_grad():
            for layer in moe_layers(model):
                layer.router.weight.zero_()
                layer.router.choice_bias.zero_()
        assert near_ties(model, random_ids(1, 9)).all()

    class Other:
        def __call__(self, **inputs):
            return model(**inputs)

        def generate(self, ids, **options):
            out = model.generate(ids, **options)
            return torch.cat([out[:, :-1], (out[:, -1:] + 7) % VOCAB], dim=1)

    with pytest.raises(RunError, match="continues a prompt in another way"):
        verify(Other(), model, random_ids(2, 9))


def test_plan_tells_whether_blocks_are_fixed(checkpoint):
    config = ExportConfig()
    assert plan_export(checkpoint, "glm4_moe", config)[1] is True
    assert plan_export(checkpoint, "remote-code", config)[1] is False


def test_it_is_public():
    assert moesaic.export is export
