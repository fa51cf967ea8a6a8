"""Any mixture of experts of transformers computes the same on our paths as on its own.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from model_cases import Case, converted, random_ids, same_state
from packaging import version
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moesaic.models import experts_function
from moesaic.models.experts_function import expert_weights, experts_forward
from moesaic.ops.weights import ACTIVATIONS

T, K, E, F, D = 23, 3, 6, 8, 16

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SIGMOID = {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "Olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "DeepseekV3": {
        **SIGMOID,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "Glm4Moe": {**SIGMOID, "n_routed_experts": 8, "num_experts_per_tok": 3},
    # Weights in x out, gate and up neurons in turn, biases, a clamped gate of its own.
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
each_model = pytest.mark.parametrize("name", MODELS)


def tiny(name, dtype=torch.float32):
    """A random model whose weights are far from zero, so that errors show."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter += torch.randn(parameter.shape, generator=draw) * scale
    return model.to(dtype).eval()


def logits_and_gradients(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(random_ids()).logits
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(probe.to(logits.dtype))
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert sum("experts" in name for name in gradients) >= 2
    return {"logits": logits.detach(), **gradients}


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of our paths."""
    made = []
    apply = experts_function.apply_experts
    monkeypatch.setattr(
        experts_function, "apply_experts", lambda *a: made.append(a[0].shape[0]) or apply(*a)
    )
    return made


@each_model
def test_logits_and_every_gradient_equal_eager(name, calls):
    model = tiny(name)
    expected = logits_and_gradients(model, "eager")
    assert not calls
    actual = logits_and_gradients(model, "moesaic")
    assert calls
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        # Sums in another order, relative to the largest entry of a whole gradient.
        bound = 2e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            actual[key], value, rtol=1e-4, atol=bound, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_bfloat16_is_as_close_to_float32_as_eager_is(name):
    def errors(implementation):
        # The experts alone: a router that flips on a rounding says nothing about our paths.
        torch.manual_seed(0)
        layer = tiny(name).model.layers[0].mlp.experts
        h_TD = torch.randn(257, 32)
        ids_TK = torch.rand(257, 4).argsort(1)[:, :2]
        weights_TK = torch.rand(257, 2)

        def run(dtype, implementation):
            layer.to(dtype).config._experts_implementation = implementation
            layer.zero_grad()
            h = h_TD.to(torch.bfloat16).to(dtype).requires_grad_()
            out_TD = layer(h, ids_TK, weights_TK)
            assert out_TD.dtype == dtype
            out_TD.backward(torch.ones(257, 32, dtype=dtype) + h_TD.to(dtype))
            return [out_TD, h.grad, *(p.grad for p in layer.parameters())]

        layer.to(torch.bfloat16)
        values = run(torch.bfloat16, implementation)
        exact = run(torch.float32, "eager")
        return [
            ((a.double() - b.double()).norm() / b.double().norm()).item()
            for a, b in zip(values, exact, strict=True)
        ]

    for ours, eager in zip(errors("moesaic"), errors("eager"), strict=True):
        assert 1e-4 < ours <= max(1.1 * eager, 6e-3)


@each_model
def test_generation_with_a_cache_equals_eager_without(name, calls):
    model = tiny(name)
    options = {"max_new_tokens": 8, "do_sample": False}
    model.set_experts_implementation("eager")
    expected = model.generate(random_ids(), use_cache=False, **options)
    assert not calls
    model.set_experts_implementation("moesaic")
    assert torch.equal(model.generate(random_ids(), use_cache=True, **options), expected)
    # The prompts at once, then one token of each of the two sequences.
    assert max(calls) == 22
    assert min(calls) == 2
    assert model.config._experts_implementation == "moesaic"


def test_switching_back_and_forth_changes_nothing(calls):
    model = tiny("Qwen3Moe")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = {}
    for implementation in ("eager", "moesaic", "grouped_mm", "moesaic", "eager"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            logits = model(random_ids()).logits
        assert bool(calls) == (implementation == "moesaic")
        calls.clear()
        assert torch.equal(seen.setdefault(implementation, logits), logits)
        torch.testing.assert_close(logits, seen["eager"], rtol=1e-4, atol=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_loading_with_our_name_uses_our_paths(tmp_path, calls):
    model = tiny("Olmoe")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moesaic"
    )
    same_state(loaded, model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(random_ids()).logits, model(random_ids()).logits)
    assert calls


def test_converted_models_keep_their_own_experts(calls):
    model = converted(Case("llama", {}))
    with torch.no_grad():
        before = model(random_ids()).logits
        model.set_experts_implementation("moesaic")
        assert torch.equal(model(random_ids()).logits, before)
    assert not calls


# Every class of experts in transformers, and what is not as in Mixtral: weights out x in, gate rows
# before up rows, no biases, `act(gate) * up` with an activation that our ops know by name.
ODD = {
    "AriaExperts": {"in x out"},
    "BeamExperts": {"own gate"},
    "DeepseekV4Experts": {"own gate"},
    "Glm5NextTextExperts": {"own gate"},
    "GptOssExperts": {"in x out", "biases", "own gate"},
    "HYV4Experts": {"own gate"},
    "Inkling2Experts": {"own gate"},
    "MiniMaxM3VLExperts": {"own gate"},
    "MuseSparkExperts": {"norm of each expert"},
    "NemotronHExperts": {"no gate"},
    "OpenAIPrivacyFilterExperts": {"in x out", "biases", "own gate"},
}


def decorated():
    """Name every decorated class of the installed transformers, and the module it is in."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        pattern = r"^@use_experts_implementation\b.*\n(?:@.*\n)*class (\w+)"
        for name in re.findall(pattern, path.read_text("utf-8"), re.M):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


DECORATED = decorated()
FEW = ["MixtralExperts", "GptOssExperts"]
if version.parse(transformers.__version__) >= version.parse("5.23"):
    FEW.append("MuseSparkExperts")


def config():
    """The sizes under every name that an experts class reads."""
    values = dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E
    )
    values |= dict.fromkeys(("hidden_size", "moe_hidden_size"), D)
    values |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), F)
    values |= dict.fromkeys(("hidden_act", "hidden_activation", "mlp_hidden_act"), "silu")
    # Limits within the range of the values, so that they matter.
    values |= dict.fromkeys(("swiglu_limit", "mlp_gate_softcap", "mlp_up_softcap"), 0.7)
    values |= {"swiglu_alpha": 1.702, "moe_latent_size": None, "post_norm_eps": 1e-6}
    return SimpleNamespace(**values, _experts_implementation="eager")


def build(name):
    """An experts module with random weights."""
    module = getattr(importlib.import_module(DECORATED[name]), name)(config())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4, generator=draw)
    return module


def slots():
    """Inputs and slots, some of them empty in every way that occurs."""
    draw = torch.Generator().manual_seed(4)
    h_TD = torch.randn(T, D, generator=draw)
    ids_TK = torch.rand(T, E, generator=draw).argsort(1)[:, :K]
    # Expert 2 has no token at all.
    ids_TK[ids_TK == 2] = E
    ids_TK[::2, 0] = E
    ids_TK[::3, 1] = -1
    ids_TK[::5, 2] = E + 3
    ids_TK[4] = E
    return h_TD, ids_TK, torch.rand(T, K, generator=draw) + 0.1


def run(module, implementation, h_TD, ids_TK, weights_TK, empty_TK=None):
    """Give the output and every gradient by name."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    h_TD, weights_TK = (x.clone().requires_grad_() for x in (h_TD, weights_TK))
    used_TK = weights_TK if empty_TK is None else weights_TK.masked_fill(empty_TK, 0.0)
    out_TD = module(h_TD, ids_TK, used_TK)
    probe = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(5))
    out_TD.backward(probe)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return {"out": out_TD.detach(), "h": h_TD.grad, "weights": weights_TK.grad, **gradients}


@pytest.fixture
def poisoned():
    """Fill what torch leaves uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", DECORATED)
def test_every_class_of_experts_equals_eager_with_empty_slots(name, poisoned):
    module = build(name)
    h_TD, ids_TK, weights_TK = slots()
    empty_TK = (ids_TK < 0) | (ids_TK >= E)
    # Not every class knows empty slots: to its own forward they are expert 0 with weight 0.
    expected = run(module, "eager", h_TD, ids_TK.masked_fill(empty_TK, 0), weights_TK, empty_TK)
    actual = run(module, "moesaic", h_TD, ids_TK, weights_TK)
    assert actual.keys() == expected.keys()
    assert len(actual) >= 5
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("training", [True, False])
def test_ids_past_the_experts_are_empty_on_every_path(training):
    module = build("MixtralExperts")
    h_TD, _, _ = slots()
    # As many slots as experts: with gradients the path that computes all experts is taken.
    ids_TK = torch.arange(E).repeat(T, 1)
    weights_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(6))
    empty_TK = weights_TK < 0.4
    past_TK = torch.where(empty_TK, E + 7, ids_TK)
    with torch.set_grad_enabled(training):
        out_TD = experts_forward(module, h_TD.requires_grad_(), past_TK, weights_TK)
        module.config._experts_implementation = "eager"
        expected_TD = module(h_TD, ids_TK, weights_TK.masked_fill(empty_TK, 0.0))
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-4, atol=1e-5)


def test_a_norm_does_not_fill_empty_slots():
    """Of nothing, a norm with a bias makes its bias."""
    module = build("MixtralExperts")
    module.has_post_expert_norm = True
    module.post_expert_norm = torch.nn.LayerNorm(D)
    torch.nn.init.ones_(module.post_expert_norm.bias)
    h_TD, ids_TK, weights_TK = slots()
    actual = run(module, "moesaic", h_TD, ids_TK, weights_TK)
    weights = expert_weights(module)
    for t in range(T):
        used = [(int(e), w) for e, w in zip(ids_TK[t], weights_TK[t], strict=True) if 0 <= e < E]
        expected_D = torch.zeros(D)
        for e, w in used:
            y_D = weights.down[e] @ weights.activate(weights.up[e] @ h_TD[t])
            expected_D = expected_D + w * module.post_expert_norm(y_D)
        torch.testing.assert_close(actual["out"][t], expected_D.detach(), rtol=1e-4, atol=1e-5)
    assert (actual["weights"][(ids_TK < 0) | (ids_TK >= E)] == 0).all()


@pytest.mark.parametrize("name", DECORATED)
def test_every_class_of_experts_is_read_as_it_is(name):
    module = build(name)
    weights, odd = expert_weights(module), ODD.get(name, set())
    assert weights.gated == ("no gate" not in odd)
    rows = 2 * F if weights.gated else F
    assert weights.up.shape == (E, rows, D)
    assert weights.down.shape == (E, D, F)
    assert weights.up.is_contiguous() == ("in x out" not in odd)
    # Views: no weight is copied.
    kept = {parameter.data_ptr() for parameter in module.parameters()}
    tensors = [x for x in weights if isinstance(x, torch.Tensor)]
    assert {x.data_ptr() for x in tensors} <= kept
    assert len(tensors) == (4 if "biases" in odd else 2)
    assert (weights.glu is not None) == ("own gate" in odd)
    assert weights.activation == ("" if "own gate" in odd else "silu")
    assert hasattr(module, "post_expert_norm") == ("norm of each expert" in odd)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("name", FEW)
def test_few_tokens_and_tokens_without_experts(name, tokens, poisoned):
    module = build(name)
    h_TD = torch.randn(tokens, D)
    ids_TK = torch.full((tokens, K), E)
    module.config._experts_implementation = "moesaic"
    out_TD = module(h_TD, ids_TK, torch.ones(tokens, K))
    assert torch.equal(out_TD, torch.zeros(tokens, D))


@pytest.mark.parametrize("act", ACT2FN)
def test_activations_go_by_name_where_one_is_known(act):
    module = build("MixtralExperts")
    module.act_fn = ACT2FN[act]
    weights = expert_weights(module)
    named = act in ACTIVATIONS or act in {"gelu_python", "gelu_python_tanh"}
    assert (weights.glu is None) == bool(weights.activation) == named
    z = torch.linspace(-12, 12, 2 * F)
    torch.testing.assert_close(weights.activate(z), module._apply_gate(z))


def test_a_gate_that_was_replaced_on_the_instance_is_used():
    module = build("MixtralExperts")
    module._apply_gate = lambda z: z[..., :F]
    weights = expert_weights(module)
    assert weights.glu is module._apply_gate


class _Odd(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = E
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(E, 2 * F, D))
        self.down_proj = torch.nn.Parameter(torch.zeros(E, D, F))
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError


def test_what_we_cannot_compute_is_one_sentence():
    arguments = slots()
    module = use_experts_implementation(_Odd, is_concatenated=False)(config())
    with pytest.raises(
        ValueError, match=r"^_Odd .*is_concatenated=False.* must define _apply_gate"
    ):
        experts_forward(module, *arguments)
    module.is_concatenated = True
    module.num_experts = 3
    with pytest.raises(ValueError, match=r"^gate_up_proj of _Odd must hold num_experts=3 .* got 6"):
        experts_forward(module, *arguments)
    module.num_experts = E
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        module.down_proj = torch.nn.Parameter(torch.zeros(E, D, F).to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf"^down_proj of _Odd must be .* got {dtype}; load"):
            experts_forward(module, *arguments)
