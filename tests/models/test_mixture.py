"""A language model made of parts: what its config says is built, trained, saved and read."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

import moesaic as mo
from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic.evaluation.cost import model_cost
from moesaic.models import add_step, byte_tokenizer, fresh_mixture, load_tokenizer, new_manifest
from moesaic.models.checkpoint import read_manifest
from moesaic.models.mixture import dense_layer
from moesaic.nn.layer import end_step, moe_layers

SIZES = {"dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 48}
TOP2 = mo.LayerConfig(
    num_experts=6,
    width=16,
    shared_width=8,
    router="topk-softmax",
    router_options={"top_k": 2},
)
LOSSES = {"load-balance": {"coef": 0.01, "share_of": "choices"}}


def build(**options):
    torch.manual_seed(0)
    return mo.build_mixture(mo.MixtureConfig(**SIZES, **options))


def ids(length=24):
    return torch.randint(257, (2, length), generator=torch.Generator().manual_seed(1))


def test_one_layer_stands_for_all_and_several_stand_where_they_are():
    every = moe_layers(build(layers=(TOP2,)))
    assert [layer.config for layer in every] == [TOP2, TOP2]
    each = moe_layers(build(layers=(dense_layer(48), TOP2)))
    assert [layer.config for layer in each] == [dense_layer(48), TOP2]
    assert [layer.config for layer in moe_layers(build())] == [dense_layer(48)] * 2


def test_sizes_are_those_of_the_config():
    model = build(layers=(TOP2,), tie_embeddings=False, vocab_size=70, positions=30)
    # Embedding and head; two norms of 32 and attention with half as many keys and values; 6
    # experts of 16 and 8 shared neurons, three matrices each; the router; the last norm.
    attention = 32 * 32 * 2 + 32 * 16 * 2
    layer = 2 * 32 + attention + 3 * 32 * (6 * 16 + 8) + 6 * 32
    assert sum(p.numel() for p in model.parameters()) == 2 * 70 * 32 + 2 * layer + 32
    assert model.config.max_position_embeddings == 30
    # 2 of 6 experts: 2 * 16 + 8 neurons of the 48 that the config says.
    active = (2 * 16 + 8) / 48
    cost = model_cost(model, [active, active], context=24)
    assert cost.active_ffn_fraction == pytest.approx(active)


def test_dense_networks_are_the_decoder_of_transformers():
    model = build()
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    plain = LlamaForCausalLM(config).eval()
    state = dict(model.state_dict())
    for index in range(2):
        place = f"model.layers.{index}.mlp"
        gate, up = state.pop(f"{place}.shared.gate_up_proj")[0].chunk(2)
        state[f"{place}.gate_proj.weight"], state[f"{place}.up_proj.weight"] = gate, up
        state[f"{place}.down_proj.weight"] = state.pop(f"{place}.shared.down_proj")[0]
    plain.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids()).logits, plain(ids()).logits)


def test_a_seed_gives_the_same_model():
    first, second = build(layers=(TOP2,)), build(layers=(TOP2,))
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_it_saves_and_loads_as_everything_does(tmp_path):
    config = mo.MixtureConfig(**SIZES, layers=(TOP2,), losses=LOSSES)
    model = mo.build_mixture(config).eval()
    manifest = add_step(new_manifest("random weights", model), "build", to_plain(config))
    mo.save(model, tmp_path, manifest, byte_tokenizer())
    with torch.no_grad():
        want = model(ids()).logits
        for load in (mo.load, AutoModelForCausalLM.from_pretrained):
            loaded = load(tmp_path).eval()
            assert type(loaded) is type(model)
            assert torch.equal(loaded(ids()).logits, want)
            assert loaded.config.moesaic["losses"] == LOSSES
    (step,) = read_manifest(tmp_path)["steps"]
    assert build_config(mo.MixtureConfig, step["config"], where="step") == config
    assert step["versions"]["transformers"] == transformers_version
    assert (tmp_path / "model.safetensors").is_file()
    text = "Zwei Zeilen\nund \u00fc."
    for tokenizer in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_few_steps_lower_the_loss_that_contains_its_losses():
    torch.manual_seed(0)
    model = build(layers=(TOP2,), losses=LOSSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(8):
        out = model(input_ids=ids(), labels=ids())
        assert out.aux_loss > 0
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        end_step(model)
        seen.append(float(out.loss.detach()))
    assert seen[-1] < 0.8 * seen[0]


def test_generation_works():
    model = build(layers=(TOP2,)).eval()
    out = model.generate(ids(5), max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)


def test_any_known_architecture_can_be_made_of_parts():
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=70,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = fresh_mixture(config, [TOP2, dense_layer(48)], {})
    assert model.config.model_type == "moesaic_qwen3"
    assert [layer.config for layer in moe_layers(model)] == [TOP2, dense_layer(48)]
    with pytest.raises(InputError, match="one for each of the 2 decoder layers, got 1; repeat"):
        fresh_mixture(config, [TOP2], {})


def test_it_is_no_teacher_of_itself(tmp_path):
    from moesaic.training.teacher import is_own_teacher

    assert not is_own_teacher(build(layers=(TOP2,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 36}, r"dim must be an even multiple of num_heads=4, got 36; 32 works"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads=4, got 3; 4 is usual"),
        ({"num_layers": 0}, r"num_layers must be at least 1, got 0; raise it"),
        ({"layers": (TOP2,) * 3}, r"layers must hold none, one or num_layers=2, got 3"),
        ({"losses": {"load-balance": {}}}, r"losses.load-balance must be a mapping with the num"),
        ({"losses": {"load-balanc": {"coef": 1}}}, r"'load-balanc' is unknown; did you mean load"),
        (
            {"losses": {"load-balance": {"coef": 1, "scop": "batch"}}},
            r"losses.load-balance option 'scop' is unknown; did you mean scope",
        ),
    ],
)
def test_what_cannot_be_built_is_said(options, message):
    with pytest.raises(InputError, match=message):
        mo.MixtureConfig(**(SIZES | options))
