import pytest
import torch
from evaluation_cases import LAYERS, VOCAB, convert, dense_model
from torch.utils.flop_counter import FlopCounterMode

from moesaic._errors import InputError
from moesaic.evaluation import model_cost
from moesaic.evaluation.activity import ActivityMeter
from moesaic.evaluation.cost import matrix_flops
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.ffn import dense_ffn_width
from moesaic.models.mixture import MixtureConfig, build_mixture
from moesaic.nn.layer import LayerConfig, moe_layers

TOKENS = 19


def grouped_flops(x_shape, w_shape, *_, out_shape=None, **__):
    return 2 * x_shape[0] * w_shape[1] * w_shape[2]


def run(model, attention="eager", backend="grouped"):
    """Count a real forward: FLOPs of all products, FLOPs of attention scores, active fractions."""
    model.set_attn_implementation(attention)
    for layer in moe_layers(model):
        if layer.experts is not None:
            layer.experts.backend = backend
    ids = torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops}
    )
    meter = ActivityMeter(model, dense_ffn_width(model.config))
    with torch.no_grad(), meter.reading("docs", TOKENS), counter:
        model(input_ids=ids, use_cache=False)
    by_module = counter.get_flop_counts()
    # Some versions make the rotary angles by a product; it does not grow with the model.
    angles = sum(
        sum(kinds.values()) for name, kinds in by_module.items() if name.endswith("rotary_emb")
    )
    # Eager attention is the only other batched product of these models.
    scores = sum(v for k, v in by_module["Global"].items() if "bmm" in str(k)) - angles
    return counter.get_total_flops() - angles, scores, meter.result()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_dense_flops_are_those_of_a_forward(model_type):
    model = dense_model(model_type)
    total, scores, _ = run(model)
    cost = model_cost(model, context=TOKENS)
    assert TOKENS * cost.flops_per_token == total - scores
    assert TOKENS * cost.attention_flops_per_token == scores
    assert cost.active_ffn_fraction == 1.0
    assert cost.active_parameters == cost.total_parameters


@pytest.mark.parametrize("shared", [0, 8], ids=["routed", "shared"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_routed_flops_are_those_of_a_forward(model_type, shared):
    model = convert(dense_model(model_type), shared=shared)
    total, scores, activation = run(model)
    assert 0.1 < activation.mean() < 0.9
    cost = model_cost(model, activation.mean_per_layer(), context=TOKENS)
    # The number per token is rounded.
    assert abs(TOKENS * cost.flops_per_token - (total - scores)) <= TOKENS / 2
    assert TOKENS * cost.attention_flops_per_token == scores
    assert cost.active_ffn_fraction == pytest.approx(activation.mean())


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("topk-softmax", {"top_k": 3}),
        ("top-p", {"threshold": 0.5}),
        ("null-experts", {"num_null": 3, "top_k": 3}),
        ("noisy-top-k", {"top_k": 3}),
    ],
)
def test_flops_with_every_router(router, options):
    model = convert(dense_model(), experts=6, router=router, **options)
    total, scores, activation = run(model)
    cost = model_cost(model, activation.mean_per_layer())
    assert abs(TOKENS * cost.flops_per_token - (total - scores)) <= TOKENS / 2


@pytest.mark.parametrize("group_size", [6, 2], ids=["one group", "three groups"])
@pytest.mark.parametrize("reuse", [1, 2], ids=["own", "reused"])
def test_flops_of_experts_with_weights_in_common(group_size, reuse):
    """One projection for all is what every token uses; of several groups it may use fewer."""
    layer = LayerConfig(
        num_experts=6,
        width=10,
        shared_width=4,
        router="topk-softmax",
        router_options={"top_k": 6 * reuse},
        experts="latent-gated",
        experts_options={"group_size": group_size, "latent_width": 7},
        reuse=reuse,
    )
    config = MixtureConfig(dim=16, num_layers=2, width=48, vocab_size=VOCAB, layers=(layer,))
    model = build_mixture(config)
    total, _, activation = run(model, backend="auto")
    cost = model_cost(model, activation.mean_per_layer(), context=TOKENS)
    assert TOKENS * (cost.flops_per_token + cost.attention_flops_per_token) == total
    assert cost.flops_per_token == matrix_flops(model, activation.mean_per_layer())
    # By hand: gate and up from 7 numbers and down, 7 numbers of every group, 4 shared neurons.
    dense, own, common = 3 * 48 * 16, 2 * 10 * 7 + 10 * 16, 6 // group_size * 2 * 7 * 16
    fraction = (reuse * (6 * own + common) + 3 * 4 * 16) / dense
    assert cost.active_ffn_fraction == pytest.approx(fraction)


def test_a_token_uses_a_projection_whatever_its_experts():
    options = {"experts": "latent-gated", "experts_options": {"group_size": 6}}
    layer = LayerConfig(
        num_experts=6, width=5, router="topk-softmax", router_options={"top_k": 2}, **options
    )
    config = MixtureConfig(dim=16, num_layers=1, width=48, vocab_size=VOCAB, layers=(layer,))
    model = build_mixture(config)
    total, _, activation = run(model, backend="auto")
    cost = model_cost(model, activation.mean_per_layer(), context=TOKENS)
    assert TOKENS * (cost.flops_per_token + cost.attention_flops_per_token) == total
    assert cost.total_parameters - cost.active_parameters == 4 * (2 * 5 * 5 + 5 * 16)


def test_dense_cost_by_hand():
    # Embedding and tied head 61 x 16; per layer q and o 16 x 16, k and v 16 x 8, FFN 3 x 16 x 24,
    # two norms of 16; one last norm.
    model = dense_model(tie_word_embeddings=True)
    attention, ffn = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 24
    cost = model_cost(model, context=100)
    assert cost.total_parameters == 61 * 16 + LAYERS * (attention + ffn + 32) + 16
    assert cost.bytes == 4 * cost.total_parameters
    assert cost.flops_per_token == 2 * (61 * 16 + LAYERS * (attention + ffn))
    # Two heads of 8, two products, 100 positions.
    assert cost.attention_flops_per_token == LAYERS * 2 * 2 * 2 * 8 * 100
    untied = model_cost(dense_model(tie_word_embeddings=False))
    assert untied.total_parameters == cost.total_parameters + 61 * 16
    assert untied.flops_per_token == cost.flops_per_token
    assert model_cost(model.bfloat16()).bytes == 2 * cost.total_parameters


def test_routed_cost_is_linear_between_none_and_all():
    dense = model_cost(dense_model())
    model = convert(dense_model())
    routers = LAYERS * 4 * 16
    full, half, none = (model_cost(model, [a] * LAYERS) for a in (1.0, 0.5, 0.0))
    ffn = LAYERS * 3 * 16 * 24
    assert full.total_parameters == full.active_parameters == dense.total_parameters + routers
    assert full.flops_per_token == dense.flops_per_token + 2 * routers
    assert (dense.router_parameters, full.router_parameters) == (0, routers)
    assert none.active_parameters == full.active_parameters - ffn
    assert none.flops_per_token == full.flops_per_token - 2 * ffn
    assert half.active_parameters == full.active_parameters - ffn // 2
    assert (full.active_ffn_fraction, half.active_ffn_fraction) == (1.0, 0.5)
    assert half.total_parameters == full.total_parameters
    assert half.bytes == full.bytes


def test_pruned_model_needs_no_measurement():
    dense = model_cost(dense_model())
    pruned = model_cost(convert(dense_model(), experts=0, shared=6))
    gone = LAYERS * 3 * 16 * 18
    assert pruned.active_ffn_fraction == 0.25
    assert pruned.total_parameters == pruned.active_parameters == dense.total_parameters - gone
    assert pruned.flops_per_token == dense.flops_per_token - 2 * gone


def test_pruned_flops_are_those_of_a_forward():
    model = convert(dense_model(), experts=0, shared=6)
    total, scores, activation = run(model)
    cost = model_cost(model, activation.mean_per_layer())
    assert TOKENS * cost.flops_per_token == total - scores
    assert cost == model_cost(model)


def test_sliding_window_bounds_attention():
    options = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 10}
    cost = model_cost(dense_model("gemma2", **options), context=100)
    assert cost.attention_flops_per_token == 2 * 2 * 2 * 8 * (10 + 100)


def test_cost_refuses_fractions_that_do_not_fit():
    model = convert(dense_model(), shared=8)
    with pytest.raises(InputError, match="needs active_per_layer, measured on text; evaluate its"):
        model_cost(model)
    with pytest.raises(InputError, match="one fraction for each of the 2 MoE layers, got 3; pass"):
        model_cost(model, [0.5] * 3)
    with pytest.raises(
        InputError, match=r"active_per_layer\[1\] must be in \[0.3333, 1\], got 0.2"
    ):
        model_cost(model, [0.5, 0.2])


def test_dense_width_of_gpt2_default():
    config = type("Config", (), {"n_inner": None, "hidden_size": 16})
    assert dense_ffn_width(config) == 64


def test_biases_of_experts_that_are_off_are_not_active():
    model = convert(dense_model("llama"))
    half = [0.5] * LAYERS
    before = model_cost(model, half)
    added = 0
    for layer in moe_layers(model):
        bias_ED = torch.zeros(layer.experts.num_experts, layer.dim)
        layer.experts.down_proj_bias = torch.nn.Parameter(bias_ED)
        added += bias_ED.numel()
    after = model_cost(model, half)
    assert after.total_parameters - before.total_parameters == added
    assert after.active_parameters - before.active_parameters == added // 2
    assert after.flops_per_token == before.flops_per_token
