"""The axis of every weight that runs over the channels, and models that lost some."""

import pytest
import torch
from model_cases import DIM, Case, dense_config, dense_model, random_ids
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from moesaic._errors import CheckpointError, InputError
from moesaic.models import checkpoint
from moesaic.models.channels import NARROWABLE, channel_axes, check_narrowable, keep_channels

LLAMA_AXES = {
    "embed_tokens.weight": 1,
    "lm_head.weight": 1,
    "norm.weight": 0,
    "input_layernorm.weight": 0,
    "post_attention_layernorm.weight": 0,
    "q_proj.weight": 1,
    "k_proj.weight": 1,
    "v_proj.weight": 1,
    "o_proj.weight": 0,
    "gate_proj.weight": 1,
    "up_proj.weight": 1,
    "down_proj.weight": 0,
}


def test_axes_of_a_llama():
    axes = channel_axes(dense_model(Case("llama", {})))
    for name in dense_model(Case("llama", {})).state_dict():
        key = ".".join(name.split(".")[-2:])
        assert axes[name] == LLAMA_AXES[key], name


def test_norms_of_heads_are_no_channels():
    """As large as the width, or not: they belong to the heads."""
    axes = channel_axes(dense_model(Case("olmo2", {})))
    assert not any("q_norm" in name or "k_norm" in name for name in axes)
    model = dense_model(Case("olmo2", {}))
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (DIM,)


@pytest.mark.parametrize("model_type", NARROWABLE)
def test_finding_axes_changes_nothing(model_type):
    model = dense_model(Case(model_type, {}))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    channel_axes(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.hidden_size == DIM
    assert not any(p.is_meta for p in model.parameters())


def test_check_names_what_works():
    check_narrowable(dense_model(Case("llama", {})).config, by="anyone")
    with pytest.raises(
        InputError, match=r"anyone cannot remove channels of gpt2, whose config .*; llama, .* work"
    ):
        check_narrowable(dense_model(Case("gpt2", {})).config, by="anyone")


def test_narrow_model_loads_by_its_record(tmp_path):
    """It is dense still, so what was done to it stands in its record alone."""
    model = dense_model(Case("llama", {}))
    manifest = checkpoint.new_manifest("tiny", model)
    keep_channels(model, torch.arange(8, 24))
    checkpoint.save(model, tmp_path / "bare", manifest)
    with pytest.raises(InputError, match="is a dense model; convert it first"):
        checkpoint.load(tmp_path / "bare")
    checkpoint.save(model, tmp_path / "made", checkpoint.add_step(manifest, "compress", {}))
    loaded = checkpoint.load(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    weights = tmp_path / "made" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"it was cut short or edited, restore it"):
        checkpoint.load(tmp_path / "made")


def test_size_of_heads_is_written_down_where_the_config_leaves_it_out(tmp_path):
    config = dense_config(Case("qwen2", {}))
    del config.head_dim
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    keep_channels(model, torch.arange(8, 24))
    assert model.config.head_dim == 8
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
