"""LLM-Pruner by neurons: which go, and that cutting them is setting them to zero."""

import pytest
import torch
from compression_cases import LLAMA, logits, measure, state
from model_cases import LAYERS, ROWS, WIDTH, Case, dense_model, read_all
from safetensors.torch import load_file, save_file

from moesaic._config import build_config
from moesaic._errors import InputError, UnknownNameError
from moesaic.calibration.stats import pass_file
from moesaic.compression.pruning.llm_pruner_block import LLMPrunerBlock, prune_block
from moesaic.nn.layer import moe_layers

COLLECTORS = LLMPrunerBlock().collectors()


def pruned(directory, case=LLAMA, dtype=torch.float32, **options):
    """A pruned model, what came out, and the importance that decided."""
    config = LLMPrunerBlock(**options)
    dense = dense_model(case, dtype)
    stats = measure(dense, directory, COLLECTORS)
    name = {"first": "weight_importance_F", "second": "weight_second_F"}[config.order]
    scores = [stats.layer(index)[f"gradients.{name}"] for index in range(LAYERS)]
    return (*prune_block(dense, stats, config), scores)


@pytest.mark.parametrize("structure", ["uniform", "together"])
@pytest.mark.parametrize("case", [*ROWS, Case("llama", {"mlp_bias": True})], ids=str)
def test_cutting_is_setting_to_zero(case, structure, tmp_path):
    """The card's check: slicing equals masking the neurons of the dense model."""
    model, results, scores = pruned(
        tmp_path, case, torch.float64, active=0.5, structure=structure, multiple=4
    )
    masked = dense_model(case, torch.float64)
    with torch.no_grad():
        for ffn, score_F, width in zip(read_all(masked), scores, results["widths"], strict=True):
            ffn.down_DF[:, score_F.argsort(descending=True)[width:]] = 0.0
    torch.testing.assert_close(logits(model), logits(masked))
    assert results["active"] == sum(results["widths"]) / (LAYERS * WIDTH) == 0.5


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_most_important_stay(order, tmp_path):
    model, results, scores = pruned(tmp_path, active=0.25, order=order, multiple=1)
    assert results["widths"] == [12, 12]
    for moe, ffn, score_F in zip(
        moe_layers(model), read_all(dense_model(LLAMA)), scores, strict=True
    ):
        best = sorted(score_F.topk(12).indices.tolist())
        assert torch.equal(
            moe.shared.weights().up[0],
            torch.cat([ffn.gate_FD, ffn.up_FD])[[*best, *(WIDTH + j for j in best)]],
        )
        assert torch.equal(moe.shared.weights().down[0], ffn.down_DF[:, best])


def test_the_orders_differ(tmp_path):
    """Otherwise the test above would not tell which one decides."""
    first, second = (
        pruned(tmp_path / order, active=0.25, order=order)[0] for order in ("first", "second")
    )
    assert not torch.equal(logits(first), logits(second))


def test_together_ranks_all_layers(tmp_path):
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path, COLLECTORS)
    file = pass_file(tmp_path, "gradients")
    tensors = load_file(file)
    # The first layer's neurons matter more, save for eight.
    tensors["000.gradients.weight_importance_F"] = torch.full((WIDTH,), 9.0)
    tensors["000.gradients.weight_importance_F"][:8] = 0.1
    tensors["001.gradients.weight_importance_F"] = torch.arange(WIDTH) / WIDTH
    save_file(tensors, file)
    before = dense.model.layers[1].mlp.up_proj.weight.clone()
    model, results = prune_block(dense, stats, LLMPrunerBlock(active=0.5, structure="together"))
    assert results["widths"] == [40, 8]
    # Of the second layer the last, which matter most.
    assert torch.equal(moe_layers(model)[1].shared.gate_up_proj[0, 8:], before[-8:])


def test_attention_and_embeddings_are_untouched(tmp_path):
    before = state(dense_model(LLAMA))
    model, _, _ = pruned(tmp_path, active=0.5)
    kept = {name for name in before if ".mlp." not in name}
    assert kept
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0.0}, r"active must be in \(0, 1\], got 0.0; 0.7 keeps 70%"),
        ({"multiple": 0}, r"multiple must be at least 1, got 0; 8 is usual"),
    ],
    ids=str,
)
def test_settings_out_of_bounds(options, message):
    with pytest.raises(InputError, match=message):
        LLMPrunerBlock(**options)


def test_unknown_structure():
    with pytest.raises(UnknownNameError, match=r"'togther' is unknown; did you mean together"):
        build_config(LLMPrunerBlock, {"structure": "togther"}, where="llm-pruner-block")


def test_too_few_neurons_for_every_layer(tmp_path):
    with pytest.raises(
        InputError, match=r"active=0.05 leaves fewer than multiple=8 .* raise it to 0.167 or lower"
    ):
        pruned(tmp_path, active=0.05)


def test_statistics_of_another_width(tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path, COLLECTORS)
    other = dense_model(Case("llama", {"intermediate_size": 32}))
    with pytest.raises(InputError, match=r"measured on 48 neurons, layer 0 has 32; calibrate"):
        prune_block(other, stats, LLMPrunerBlock())
    assert other.config.model_type == "llama"


def test_statistics_that_are_not_finite(tmp_path):
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path, COLLECTORS)
    file = pass_file(tmp_path, "gradients")
    tensors = load_file(file)
    tensors["001.gradients.weight_importance_F"][5] = torch.nan
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"statistics of layer 1 in .* are not finite; calibrate"):
        prune_block(dense, stats, LLMPrunerBlock())
