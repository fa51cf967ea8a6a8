"""The decode engine against transformers, on every architecture and router it takes.

Shapes: T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

import pytest
import torch
from model_cases import CASES, VOCAB, Case, converted, dense_model, random_ids
from transformers import MixtralConfig, MixtralForCausalLM

from moesaic._errors import InputError
from moesaic.evaluation import threshold_at
from moesaic.inference import Decoder, Engine, Sampling, pack_experts
from moesaic.inference import _layout as layouts
from moesaic.inference.engine import choose
from moesaic.nn.layer import all_experts_on, moe_layers, record_routing
from moesaic.ops.cpu import library
from moesaic.ops.cpu.ffn import PackedFfn
from moesaic.ops.cpu.packed import PackedExperts, format_of

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())

NATIVE = [case for case in CASES if case.model_type in layouts._LAYOUTS]
OTHER = [case for case in CASES if case.model_type not in layouts._LAYOUTS]
LLAMA = Case("llama", {})
# Longer than the sliding windows of the tiny models.
PROMPT = random_ids(1, 12)[0]
ROUTERS = [
    {"router_options": {"value": "gate", "normalize": "count"}},
    {"router_options": {"value": "one", "normalize": "none", "bias": True}},
    {"router_options": {"threshold": 0.8}},
    {"router_options": {"threshold": 0.2, "normalize": "none"}, "shared_width": 16},
    {"router": "topk-softmax", "router_options": {"top_k": 2}},
    {"router": "top-p", "router_options": {"threshold": 0.6}},
    {"router": "null-experts", "router_options": {"top_k": 2, "num_null": 2}},
    {"num_experts": 0, "shared_width": 48, "router": "", "width": 0},
]


def with_drawn_norms(model):
    """Norms other than one, which would hide a norm that is left out."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def logits_of(model, ids_T):
    with torch.no_grad():
        return model(ids_T.unsqueeze(0)).logits[0].float()


def read(decoder, ids_T, slot=0, start=0):
    """Logits after every token."""
    position_T = torch.arange(start, start + len(ids_T))
    return decoder.step(ids_T, torch.full_like(ids_T, slot), position_T, range(len(ids_T)))


@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_logits_and_text_are_those_of_transformers(case):
    model = with_drawn_norms(dense_model(case))
    # In some versions the other implementations leave out the cap of Gemma 2's scores.
    model.set_attn_implementation("eager")
    engine = Engine(model, length=64)
    torch.testing.assert_close(
        read(engine.decoder, PROMPT), logits_of(model, PROMPT), rtol=1e-4, atol=1e-4
    )
    expected = model.generate(PROMPT.unsqueeze(0), max_new_tokens=20, do_sample=False)
    assert engine.generate(PROMPT.tolist(), 20) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("case", OTHER, ids=str)
def test_another_architecture_is_refused_by_name(case):
    with pytest.raises(InputError, match=rf"{case.model_type} has no native decoder; .*llama"):
        Engine(dense_model(case), length=64)


@pytest.mark.parametrize("options", ROUTERS, ids=str)
def test_every_router_routes_as_in_transformers(options):
    model = converted(LLAMA, **options)
    decoder = Decoder(model, length=64)
    used_LTE = torch.full((2, len(PROMPT), decoder.num_experts), 7, dtype=torch.uint8)
    position_T = torch.arange(len(PROMPT))
    slot_T = torch.zeros_like(position_T)
    logits_TV = decoder.step(PROMPT, slot_T, position_T, range(12), used_LTE=used_LTE)
    with record_routing(model) as routings:
        expected = logits_of(model, PROMPT)
    torch.testing.assert_close(logits_TV, expected, rtol=1e-4, atol=1e-4)
    if routings:
        expected_LTE = torch.stack([routing.active_TE() for routing in routings])
        assert torch.equal(used_LTE.bool(), expected_LTE)
        assert 0 < expected_LTE.float().mean() < 1


@pytest.mark.parametrize("router", ["sigmoid-threshold", "topk-softmax"])
def test_a_bypass_stands_in_for_experts_that_are_off_alone(router):
    options = {"top_k": 2} if router == "topk-softmax" else {}
    model = converted(LLAMA, router=router, router_options=options, bypass_rank=5)
    with torch.no_grad():
        for layer in moe_layers(model):
            for parameter in layer.bypass.parameters():
                parameter.normal_(std=0.3)
    decoder = Decoder(model, length=64)
    expected = logits_of(model, PROMPT)
    torch.testing.assert_close(read(decoder, PROMPT), expected, rtol=1e-4, atol=1e-4)
    position_T = torch.arange(len(PROMPT))
    slot_T = torch.zeros_like(position_T)
    dense_TV = decoder.step(PROMPT, slot_T, position_T, range(12), all_on=True)
    with all_experts_on(model):
        torch.testing.assert_close(dense_TV, logits_of(model, PROMPT), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dense_TV, expected, atol=0.1)


def test_layers_with_different_routers_each_ask_their_own():
    model = converted(LLAMA)
    other = converted(LLAMA, router="topk-softmax", router_options={"top_k": 2})
    model.model.layers[1].mlp = other.model.layers[1].mlp
    decoder = Decoder(model, length=64)
    used_LTE = torch.zeros(2, len(PROMPT), 4, dtype=torch.uint8)
    position_T = torch.arange(len(PROMPT))
    slot_T = torch.zeros_like(position_T)
    logits_TV = decoder.step(PROMPT, slot_T, position_T, range(12), used_LTE=used_LTE)
    with record_routing(model) as routings:
        expected = logits_of(model, PROMPT)
    torch.testing.assert_close(logits_TV, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(used_LTE.bool(), torch.stack([r.active_TE() for r in routings]))


def test_a_token_has_a_threshold_of_its_own():
    model = converted(LLAMA)
    decoder = Decoder(model, length=64, slots=3)
    ids_T = PROMPT.repeat(3)
    slot_T = torch.arange(3).repeat_interleave(len(PROMPT))
    position_T = torch.arange(len(PROMPT)).repeat(3)
    thresholds = torch.tensor([0.3, torch.nan, 0.8], dtype=torch.float64)
    threshold_T = thresholds.repeat_interleave(len(PROMPT))
    logits_TV = decoder.step(ids_T, slot_T, position_T, range(36), threshold_T=threshold_T)
    for part, threshold in zip(logits_TV.split(len(PROMPT)), (0.3, 0.5, 0.8), strict=True):
        with threshold_at(model, threshold):
            expected = logits_of(model, PROMPT)
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_TV[:12], logits_TV[24:], atol=0.1)


def test_a_token_without_experts_keeps_its_residual():
    model = converted(LLAMA, router_options={"threshold": 0.999})
    used_LTE = torch.full((2, 1, 4), 7, dtype=torch.uint8)
    decoder = Decoder(model, length=64)
    zero = torch.zeros(1, dtype=torch.int64)
    logits = decoder.step(PROMPT[:1], zero, zero, [0], used_LTE=used_LTE)
    assert not used_LTE.any()
    torch.testing.assert_close(logits, logits_of(model, PROMPT[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "int8"])
def test_sequences_side_by_side_equal_each_alone_to_the_last_bit(weight_format):
    model = converted(LLAMA)
    prompts = [random_ids(1, n, seed=n)[0] for n in (3, 9, 14)]
    alone = []
    for prompt in prompts:
        decoder = Decoder(model, weight_format=weight_format, length=64)
        alone.append(
            torch.cat([read(decoder, prompt[:-1]), read(decoder, prompt[-1:], 0, len(prompt) - 1)])
        )
    decoder = Decoder(model, weight_format=weight_format, length=64, slots=3)
    # One call reads all prompts but their last tokens, another those.
    ids_T = torch.cat([prompt[:-1] for prompt in prompts])
    slot_T = torch.cat([torch.full((len(p) - 1,), i) for i, p in enumerate(prompts)])
    position_T = torch.cat([torch.arange(len(p) - 1) for p in prompts])
    first = decoder.step(ids_T, slot_T, position_T, range(len(ids_T)))
    last_T = torch.stack([prompt[-1] for prompt in prompts])
    position_T = torch.tensor([len(p) - 1 for p in prompts])
    second = decoder.step(last_T, torch.arange(3), position_T, range(3))
    for i, part in enumerate(first.split([len(p) - 1 for p in prompts])):
        assert torch.equal(part, alone[i][:-1])
        assert torch.equal(second[i], alone[i][-1])


def test_a_prompt_longer_than_a_step_is_read_in_parts(monkeypatch):
    from moesaic.inference import engine as module

    model = converted(LLAMA)
    whole = Engine(model, length=64)
    expected = whole.generate(PROMPT.tolist(), 8)
    monkeypatch.setattr(module, "MAX_ROWS", 5)
    assert Engine(model, length=64).generate(PROMPT.tolist(), 8) == expected


def test_a_slot_is_used_again_without_a_trace():
    decoder = Decoder(converted(LLAMA), length=64)
    expected = read(decoder, PROMPT[:5])
    read(decoder, random_ids(1, 30, seed=8)[0])
    assert torch.equal(read(decoder, PROMPT[:5]), expected)


def test_no_uninitialised_memory_is_read(monkeypatch):
    decoder = Decoder(converted(LLAMA), length=64)
    expected = read(decoder, PROMPT)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert torch.equal(read(decoder, PROMPT), expected)


def test_bfloat16_models_keep_their_weights_exactly():
    model = converted(LLAMA, torch.bfloat16)
    decoder, default = (
        Decoder(model, length=64, weight_format="bfloat16"),
        Decoder(model, length=64),
    )
    torchs = logits_of(model, PROMPT)
    # It rounds no activation: it equals the same weights in float32.
    expected = logits_of(model.float(), PROMPT)
    torch.testing.assert_close(read(decoder, PROMPT), expected, rtol=1e-4, atol=1e-4)
    # The format of the dtype may round what it multiplies, and torch rounds its sums too.
    assert default.weight_format == format_of(torch.bfloat16)
    off, torchs_off = (x.float() - expected for x in (read(default, PROMPT), torchs))
    assert off.square().mean() <= torchs_off.square().mean()


def test_released_models_hold_nothing_but_embeddings():
    model = converted(LLAMA, router="topk-softmax", router_options={"top_k": 2})
    expected = logits_of(model, PROMPT)
    decoder = Decoder(model, length=64, release=True)
    torch.testing.assert_close(read(decoder, PROMPT), expected, rtol=1e-4, atol=1e-4)
    left = {name for name, p in model.named_parameters() if p.numel()}
    assert left <= {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.{i}.mlp.router.weight" for i in range(2)),
    }


def test_a_decoder_that_differs_from_its_model_is_refused(monkeypatch):
    wrong = layouts.Layout(offset=0.5)
    monkeypatch.setitem(layouts._LAYOUTS, "llama", wrong)
    with pytest.raises(InputError, match=r"differs from LlamaConfig's own logits by .*; generate"):
        Engine(dense_model(LLAMA), length=64)


def test_free_experts_are_refused():
    model = converted(LLAMA, router="zero-computation", router_options={"num_constant": 0})
    with pytest.raises(InputError, match=r"layer 0 has free experts \(zero, copy\), which have no"):
        Engine(model, length=64)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("data-selection", {}),
        ("expert-choice", {}),
        ("hash", {}),
        ("recurrent-top-k", {"first": False}),
        ("stochastic", {"evaluation": "sequence"}),
    ],
)
def test_routers_that_need_more_than_their_tokens_are_refused(router, options):
    model = converted(LLAMA, router=router, router_options=options)
    with pytest.raises(InputError, match=rf"layer 0 has the router '{router}', which needs more"):
        Engine(model, length=64)


def test_data_selection_with_room_for_all_reads_tokens_alone():
    model = converted(LLAMA, router="data-selection", router_options={"capacity": 1.0})
    expected = logits_of(model, PROMPT)
    torch.testing.assert_close(
        read(Decoder(model, length=64), PROMPT), expected, rtol=1e-4, atol=1e-4
    )


def test_rotary_angles_that_move_are_refused():
    model = dense_model(LLAMA)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(InputError, match="rope_type dynamic has no native decoder"):
        Engine(model, length=64)


@pytest.mark.parametrize(
    ("ids", "slot", "position", "message"),
    [
        ([], [], [], "a step reads 1 to 512 tokens, got 0"),
        ([3], [1], [0], r"slots must be in \[0, 1\), got \[1\]"),
        ([3], [-1], [0], r"slots must be in \[0, 1\)"),
        ([3], [0], [64], r"positions must be in \[0, 64\), got 64; make the decoder with a larger"),
        ([3], [0], [-1], r"positions must be in \[0, 64\)"),
        ([3, 4], [0], [0, 1], "one per token"),
    ],
)
def test_steps_outside_of_the_cache_are_refused(ids, slot, position, message):
    decoder = Decoder(dense_model(LLAMA), length=64)
    with pytest.raises(InputError, match=message):
        decoder.step(*(torch.tensor(x, dtype=torch.int64) for x in (ids, slot, position)), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [1]}, r"rows must be in \[0, 1\), got \[1\]"),
        ({"rows": [-1]}, r"rows must be in \[0, 1\)"),
        ({"used_LTE": torch.zeros(2, 2, 1, dtype=torch.uint8)}, r"of shape \(2, 1, 1\) and"),
        ({"used_LTE": torch.zeros(2, 1, 1)}, r"uint8 of shape \(2, 1, 1\) .* got torch.float32"),
        ({"threshold_T": torch.zeros(2, dtype=torch.float64)}, r"threshold_T must be .* \(1,\)"),
        ({"threshold_T": torch.zeros(1)}, r"threshold_T must be torch.float64 of shape \(1,\)"),
    ],
)
def test_answers_that_do_not_fit_are_refused(options, message):
    decoder = Decoder(dense_model(LLAMA), length=64)
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        decoder.step(PROMPT[:1], zero, zero, **{"rows": [0], **options})


@pytest.mark.parametrize("options", [{}, ROUTERS[4]], ids=["native", "in-python"])
def test_every_expert_on_is_the_dense_parent(options):
    model = converted(LLAMA, **options)
    decoder = Decoder(model, length=64)
    position_T = torch.arange(len(PROMPT))
    slot_T = torch.zeros_like(position_T)
    logits_TV = decoder.step(PROMPT, slot_T, position_T, range(len(PROMPT)), all_on=True)
    expected = logits_of(dense_model(LLAMA), PROMPT)
    torch.testing.assert_close(logits_TV, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_unknown_tokens_raise(token):
    decoder = Decoder(dense_model(LLAMA), length=64)
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(IndexError):
        decoder.step(torch.tensor([token]), zero, zero, [0])


def test_text_that_does_not_fit_is_refused_before_it_starts():
    engine = Engine(dense_model(LLAMA), length=64)
    with pytest.raises(InputError, match="take 65 positions, more than the 64 of this engine"):
        engine.generate(PROMPT.tolist(), 54)
    assert len(engine.generate(PROMPT.tolist(), 53)) == 53
    with pytest.raises(InputError, match="at least 1 token"):
        engine.generate([], 3)
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
        engine.generate([3], 0)


def test_stop_ends_the_text_and_is_not_part_of_it():
    engine = Engine(dense_model(LLAMA), length=64)
    free = engine.generate(PROMPT.tolist(), 20)
    stop = free[5]
    assert engine.generate(PROMPT.tolist(), 20, stop={stop}) == free[: free.index(stop)]


def test_samples_repeat_with_their_seed_and_stay_in_the_mass():
    engine = Engine(dense_model(LLAMA), length=64)
    hot = Sampling(temperature=1.5, seed=4)
    first = engine.generate(PROMPT.tolist(), 20, sampling=hot)
    assert engine.generate(PROMPT.tolist(), 20, sampling=hot) == first
    other = Sampling(temperature=1.5, seed=5)
    assert engine.generate(PROMPT.tolist(), 20, sampling=other) != first
    # A mass that the likeliest token alone fills is greedy.
    narrow = Sampling(temperature=1.0, top_p=1e-6)
    assert engine.generate(PROMPT.tolist(), 20, sampling=narrow) == engine.generate(
        PROMPT.tolist(), 20
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ],
)
def test_sampling_is_checked(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_packed_experts_serve_models_that_stay_in_transformers(monkeypatch):
    calls = []
    experts, layer = PackedExperts.__call__, PackedFfn.__call__
    monkeypatch.setattr(PackedExperts, "__call__", lambda *a: calls.append(1) or experts(*a))
    monkeypatch.setattr(PackedFfn, "__call__", lambda *a: calls.append(2) or layer(*a))
    ours = converted(LLAMA)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(config).eval()
    theirs.set_experts_implementation("moesaic")
    for model in (ours, theirs):
        expected = logits_of(model, PROMPT)
        calls.clear()
        assert pack_experts(model) > 0
        torch.testing.assert_close(logits_of(model, PROMPT), expected, rtol=1e-4, atol=1e-4)
        # Of ours, the layers with their routers.
        assert calls == [2 if model is ours else 1] * 2
    assert len(moe_layers(ours)) == 2


def test_a_dense_model_has_no_experts_to_pack():
    with pytest.raises(InputError, match="has no experts to pack; convert it first"):
        pack_experts(dense_model(LLAMA))


def thresholded(**options):
    """A model whose experts leave out what is small."""
    model = converted(LLAMA, experts="thresholded-gated", **options)
    for layer in moe_layers(model):
        for part in (layer.experts, layer.shared):
            if part is not None:
                part.set_thresholds(0.0, 0.02, 0.01)
    return model


@pytest.mark.parametrize("options", [{}, {"shared_width": 16}], ids=["routed", "shared"])
def test_thresholds_of_gates_and_neurons_are_kept(options):
    model = thresholded(**options)
    want = logits_of(model, PROMPT)
    for layer in moe_layers(model):
        layer.experts.set_thresholds(0.0, 0.0)
    assert (logits_of(model, PROMPT) - want).abs().max() > 1e-3, "they make a difference"
    model = thresholded(**options)
    expected = model.generate(PROMPT.unsqueeze(0), max_new_tokens=20, do_sample=False)
    engine = Engine(model, length=64)
    assert engine.generate(PROMPT.tolist(), 20) == expected[0, len(PROMPT) :].tolist()
    assert pack_experts(model) > 0
    torch.testing.assert_close(logits_of(model, PROMPT), want, rtol=1e-4, atol=1e-4)


def test_thresholds_of_inputs_are_refused():
    model = thresholded()
    moe_layers(model)[0].experts.set_thresholds(0.5, 0.1)
    for weight_format in ("float32", "int8"):
        with pytest.raises(
            InputError, match=r"layer 0 leaves out inputs of its experts, which has no"
        ):
            Engine(model, weight_format=weight_format, length=64)
    with pytest.raises(InputError, match=r"an input threshold of 0.5 has no native code"):
        pack_experts(model)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=5e-324),
        Sampling(temperature=1e-40),
        Sampling(temperature=1, top_p=5e-324),
    ],
    ids=str,
)
def test_settings_at_their_bounds_choose_the_best_token(sampling):
    logits_V = torch.tensor([-3.0, 40.0, 7.0, 39.0])
    assert choose(logits_V, sampling, torch.Generator().manual_seed(0)) == 1
