"""LLM-Pruner by channels: a hand-sliced Llama, masking, and what cannot be expressed."""

import copy

import pytest
import torch
from compression_cases import LLAMA, logits, measure, state
from model_cases import DIM, Case, dense_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moesaic._errors import InputError
from moesaic.calibration.stats import pass_file
from moesaic.compression.pruning.llm_pruner_channel import (
    LLMPrunerChannel,
    kept_channels,
    prune_channels,
)
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.channels import NARROWABLE, channel_axes, keep_channels

COLLECTORS = LLMPrunerChannel().collectors()
KEPT = 16


def pruned(directory, case=LLAMA, dtype=torch.float32, **options):
    """A pruned model and the channels that stayed."""
    config = LLMPrunerChannel(active=0.5, **options)
    dense = dense_model(case, dtype)
    stats = measure(dense, directory, COLLECTORS)
    name = {"first": "channel_importance_D", "second": "channel_second_D"}[config.order]
    score_D = stats.whole()[f"gradients.{name}"]
    model, results = prune_channels(dense, stats, config)
    assert results == {"active": 0.5, "channels": KEPT}
    return model, score_D.topk(KEPT).indices.sort().values


def close(got, want):
    """Norms compute in float32 whatever the model, so another order of sums shows."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_sliced_by_hand(tied, order, tmp_path):
    case = Case("llama", {"tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True})
    model, kept = pruned(tmp_path, case, order=order)
    assert type(model) is LlamaForCausalLM
    columns = ("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight")
    columns += ("v_proj.weight", "gate_proj.weight", "up_proj.weight")
    rows = ("norm.weight", "o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
    want = {}
    for name, value in dense_model(case).state_dict().items():
        if name.endswith(columns):
            value = value[:, kept]
        elif name.endswith(rows):
            value = value[kept]
        want[name] = value
    values = {**dense_model(case).config.to_dict(), "hidden_size": KEPT, "head_dim": 8}
    reference = LlamaForCausalLM(LlamaConfig(**values)).eval()
    reference.load_state_dict(want)
    assert state(model).keys() == state(reference).keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(logits(model), logits(reference))


def test_orders_differ(tmp_path):
    first, second = (pruned(tmp_path / order, order=order)[1] for order in ("first", "second"))
    assert not torch.equal(first, second)


def test_cutting_is_setting_to_zero_but_for_the_mean_of_norms(tmp_path):
    """A norm of the masked model divides by D, of the pruned one by K."""
    case = Case("llama", {"rms_norm_eps": 1e-20})
    model, kept = pruned(tmp_path, case, torch.float64)
    masked = dense_model(case, torch.float64)
    gone = sorted(set(range(DIM)) - set(kept.tolist()))
    with torch.no_grad():
        for name, axis in channel_axes(masked).items():
            value = masked.state_dict()[name]
            value.index_fill_(axis, torch.tensor(gone), 0.0)
            if "norm" in name:
                value *= (KEPT / DIM) ** 0.5
    close(logits(model), logits(masked))


@pytest.mark.parametrize("model_type", NARROWABLE)
def test_every_narrowable_architecture(model_type, tmp_path):
    """Saved as an ordinary model of transformers, its heads as large as before."""
    model, _ = pruned(tmp_path / "stats", Case(model_type, {}))
    assert model.config.hidden_size == KEPT
    assert model.config.head_dim == 8
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.model_type == model_type
    assert torch.equal(logits(loaded), logits(model))
    assert repr(loaded) == repr(model)
    attention = loaded.model.layers[0].self_attn
    assert attention.o_proj.weight.shape == (KEPT, 4 * 8)
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - set(NARROWABLE)))
def test_other_architectures_are_refused_before_they_are_measured(model_type):
    dense = dense_model(Case(model_type, {}))
    message = (
        rf"llm-pruner-channel cannot remove channels of {model_type}, whose config ties .*; "
        r"llama, mistral, .* work"
    )
    with pytest.raises(InputError, match=message):
        LLMPrunerChannel().check_model(dense.config)
    with pytest.raises(InputError, match=message):
        prune_channels(dense, None, LLMPrunerChannel())


def test_a_fraction_that_does_not_fit_the_heads_is_refused_before_it_is_measured():
    # 32 channels and 4 heads: 0.7 leaves 22.
    message = r"active=0.7 leaves 22 of 32 channels, .* multiple of the 4 heads; use 0.625 or 0.75$"
    with pytest.raises(InputError, match=message):
        prune_channels(dense_model(LLAMA), None, LLMPrunerChannel(active=0.7))


def test_channels_may_change_places():
    """A permutation of all channels is the same model."""
    dense = dense_model(LLAMA, torch.float64)
    want = logits(dense)
    order = torch.randperm(DIM, generator=torch.Generator().manual_seed(0))
    close(logits(keep_channels(copy.deepcopy(dense), order)), want)


@pytest.mark.parametrize(
    ("active", "expected"), [(0.5, 288), (0.375, 216), (1.0, 576), (0.703125, 405)]
)
def test_fractions_that_work(active, expected):
    assert kept_channels(active, 576, 9) == expected


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (0.7, r"leaves 403 of 576 channels, .* multiple of the 9 heads; use 0.6875 or 0.703125$"),
        (0.001, r"leaves 1 of 576 channels, .* use 0.015625$"),
        (0.999, r"leaves 575 of 576 channels, .* use 0.984375 or 1$"),
    ],
    ids=str,
)
def test_fractions_that_do_not(active, message):
    with pytest.raises(InputError, match=message):
        kept_channels(active, 576, 9)


def test_statistics_of_another_width(tmp_path):
    stats = measure(dense_model(Case("llama", {"hidden_size": 64})), tmp_path, COLLECTORS)
    with pytest.raises(InputError, match=r"measured on 64 channels, the model has 32; calibrate"):
        prune_channels(dense_model(LLAMA), stats, LLMPrunerChannel())


def test_statistics_that_are_not_finite(tmp_path):
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path, COLLECTORS)
    file = pass_file(tmp_path, "gradients")
    tensors = load_file(file)
    tensors["whole.gradients.channel_importance_D"][5] = torch.inf
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"statistics of channels in .* are not finite; calibrate"):
        prune_channels(dense, stats, LLMPrunerChannel())
