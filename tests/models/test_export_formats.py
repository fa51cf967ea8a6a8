"""What every export format owes a user; a new one is tested the moment it is listed."""

import copy
import importlib.util
import json

import pytest
import torch
import transformers
from export_cases import (
    ONES,
    PARENTS,
    WIDE,
    dsmoe,
    export_format,
    fitting,
    merging_tokenizer,
    read_elsewhere,
    softmax,
    stock_formats,
)
from model_cases import LAYERS, Case, converted, dense_config, random_ids
from safetensors.torch import load_file, save_file

from moesaic._errors import InputError, RunError
from moesaic.conversion.fix_k import FixK, fix_k
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.export import FORMATS
from moesaic.models.export._directory import DTYPES
from moesaic.models.export.check import check_model
from moesaic.models.export.verify import near_ties, verify
from moesaic.nn.layer import moe_layers

each_format = pytest.mark.parametrize("name", FORMATS)
each_fixed = pytest.mark.parametrize(
    "name", [name for name, info in FORMATS.items() if "fixed-k" in info.abilities]
)
GGUF = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
KINDS = [(name, kind) for name in FORMATS for kind in (GGUF if name == "gguf" else DTYPES)]
F32 = torch.float32


@pytest.fixture(autouse=True)
def _gguf(request):
    if "gguf" in request.node.name:
        pytest.importorskip("gguf")


def logits(model):
    with torch.no_grad():
        return model(random_ids()).logits


# What was written is the model.


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_it_holds_the_model_as_rounded(name, kind, tmp_path):
    made, model = export_format(name, kind), fitting(name)
    before = copy.deepcopy(model)
    changed = made.round(model, F32)
    assert changed == (kind not in ("float32", "F32"))
    assert not made.round(model, F32), "rounding what is rounded changes nothing"
    made.write(model, None, tmp_path, F32)
    found = verify(made.read(tmp_path), model, random_ids(4, 9))
    assert found.difference < 1e-5
    assert (found.prompts, found.agreeing) == (4, 4)
    drift = (logits(model) - logits(before)).norm() / logits(before).norm()
    assert (drift == 0) != changed


@pytest.mark.parametrize("name", ["glm4_moe", "gguf"])
def test_gates_that_sum_to_one_are_held(name, tmp_path):
    """The router need not come from gates with a threshold; what it leaves to defaults counts."""
    if name == "gguf":
        pytest.importorskip("gguf")
    case = Case("llama", WIDE)
    options = {"top_k": 2, "normalize": True}
    shared = {"shared_width": 32, "num_experts": 3}
    model = converted(case, router="sigmoid-top-k", router_options=options, **shared)
    made = export_format(name)
    made.write(model, None, tmp_path, F32)
    assert verify(made.read(tmp_path), model, random_ids(4, 9)).difference < 1e-5


@each_format
def test_a_written_weight_that_is_wrong_is_found(name, tmp_path):
    made, model = export_format(name), fitting(name)
    made.write(model, None, tmp_path, F32)
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj[0] += 0.05
    with pytest.raises(RunError, match=r"logits differ by .* so it was not kept"):
        verify(made.read(tmp_path), model, random_ids(4, 9))


@torch.no_grad()
def test_experts_that_rounding_chooses_are_no_difference():
    """One token has two experts at the same place, and the written model takes the other."""
    case = Case("llama", WIDE)
    options = {"top_k": 2, "normalize": False}
    model = converted(case, router="sigmoid-top-k", router_options=options, num_experts=4)
    ids_BS, routings = random_ids(4, 9), []
    router = moe_layers(model)[-1].router
    handle = router.register_forward_hook(lambda router, args, out: routings.append(out))
    model(ids_BS[:1])
    handle.remove()
    # The last expert chosen for one token, and the first that is not.
    order_E = routings[0].scores_TE[6].sigmoid().argsort(descending=True)
    gates_E = routings[0].scores_TE[6].sigmoid()
    router.choice_bias[order_E[2]] = gates_E[order_E[1]] - gates_E[order_E[2]]
    assert near_ties(model, ids_BS[:1])[6]
    written, found = copy.deepcopy(model), []
    for step, message in ((2e-7, ""), (-2e-7, ""), (0.2, "logits differ by"), (-0.2, "differ by")):
        moe_layers(written)[-1].router.choice_bias.copy_(router.choice_bias)
        moe_layers(written)[-1].router.choice_bias[order_E[2]] += step
        if message:
            with pytest.raises(RunError, match=message):
                verify(written, model, ids_BS, new_tokens=1)
        else:
            found.append(verify(written, model, ids_BS, new_tokens=1))
    assert sorted(each.tied for each in found) == [0, 3]
    assert all(each.difference < 1e-6 for each in found)


@each_format
def test_writing_leaves_the_model_as_it_is(name, tmp_path):
    kind = "BF16" if name == "gguf" else "bfloat16"
    made, model = export_format(name, kind), fitting(name)
    state = copy.deepcopy(model.state_dict())
    made.write(model, None, tmp_path, F32)
    for key, value in model.state_dict().items():
        assert value.dtype == state[key].dtype
        assert torch.equal(value, state[key]), key


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Directories, tied and not, and what a process without moesaic computed with them."""
    root = tmp_path_factory.mktemp("stock")
    fitted = {}
    for name in stock_formats():
        for tied in (False, True):
            model = fitting(name, tie_word_embeddings=tied)
            fitted[f"{name}-{tied}"] = model
            export_format(name).write(model, None, root / f"{name}-{tied}", F32)
    return read_elsewhere(root, list(fitted)), fitted


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", stock_formats())
def test_stock_transformers_reads_it_without_moesaic(elsewhere, name, tied):
    out, fitted = elsewhere
    found, model = out[f"{name}-{tied}"], fitted[f"{name}-{tied}"]
    assert found["class"] == f"transformers.models.{name}.modeling_{name}"
    torch.testing.assert_close(found["logits"], logits(model), rtol=1e-4, atol=1e-5)
    ids = random_ids()
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    assert torch.equal(found["text"], text)


PLAIN = {"sliding_window": None}
TAKEN = [
    *(("glm4_moe", parent) for parent in ("llama", "mistral", "qwen2", "qwen3")),
    *(("gguf", parent) for parent in ("llama", "mistral", "qwen2", "qwen3")),
    *(("mixtral", parent) for parent in ("llama", "mistral")),
    ("qwen3_moe", "qwen3"),
]


@pytest.mark.parametrize(("name", "model_type"), TAKEN)
def test_parents_it_takes_keep_their_attention(name, model_type, tmp_path):
    made = export_format(name)
    model = fitting(name, model_type, **(PLAIN if model_type == "mistral" else {}))
    made.write(model, None, tmp_path, F32)
    verify(made.read(tmp_path), model, random_ids(3, 9))


@each_fixed
def test_it_takes_no_other_parents(name):
    for model_type in ARCHITECTURES:
        config = dense_config(Case(model_type, PLAIN if model_type == "mistral" else {}))
        config.moesaic = dsmoe().config.moesaic
        assert ((name, model_type) in TAKEN) == (not export_format(name).obstacle(config))


def test_a_sliding_window_of_all_layers_stays(tmp_path):
    model = fitting("mixtral", "mistral")
    export_format("mixtral").write(model, None, tmp_path, F32)
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == 8
    verify(export_format("mixtral").read(tmp_path), model, random_ids(2, 20))


def test_layers_without_a_router_are_plain_networks(tmp_path):
    model, made = dsmoe("qwen3"), export_format("qwen3_moe")
    with torch.no_grad():
        moe_layers(model)[1].router.bias.fill_(40.0)
    fix_k(model, random_ids(6), made.layout, FixK(k=2))
    assert not made.obstacle(model.config)
    made.write(model, None, tmp_path, F32)
    assert json.loads((tmp_path / "config.json").read_text())["mlp_only_layers"] == [1]
    verify(made.read(tmp_path), model, random_ids(3, 9))
    assert "without a router" in export_format("mixtral").obstacle(
        converted(Case("llama", {}), num_experts=0, shared_width=48).config
    )


def test_the_router_is_glm4s():
    """Ids and weights of the class that the exported weights are for."""
    model = fitting("glm4_moe")
    router = moe_layers(model)[0].router
    config = transformers.Glm4MoeConfig(
        hidden_size=32,
        n_routed_experts=3,
        num_experts_per_tok=router.config.top_k,
        routed_scaling_factor=router.config.scale,
        norm_topk_prob=False,
    )
    stock = transformers.models.glm4_moe.modeling_glm4_moe.Glm4MoeTopkRouter(config)
    with torch.no_grad():
        stock.weight.copy_(router.weight)
        stock.e_score_correction_bias.copy_(router.choice_bias)
        h_TD = torch.randn(63, 32, generator=torch.Generator().manual_seed(0))
        _, weights_TK, ids_TK = stock(h_TD)
        routing = router(h_TD)
    assert torch.equal(ids_TK, routing.ids_TK)
    torch.testing.assert_close(weights_TK, routing.weights_TK)


@pytest.mark.parametrize("name", ["mixtral", "gguf"])
@pytest.mark.parametrize("tied", [False, True])
def test_softmax_weights_are_held(name, tied, tmp_path):
    if name == "gguf":
        pytest.importorskip("gguf")
    model = softmax(tie_word_embeddings=tied)
    made = export_format(name)
    check_model(made, model.config)
    made.write(model, None, tmp_path, F32)
    assert verify(made.read(tmp_path), model, random_ids(4, 9)).difference < 1e-5


def test_a_file_of_softmax_weights_is_one_of_mixtral(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = softmax()
    export_format("gguf", "F32").write(model, None, tmp_path, F32)
    reader = gguf.GGUFReader(tmp_path / "model-F32.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    # The width of one expert.
    assert fields["llama.feed_forward_length"] == 32
    assert (fields["llama.expert_count"], fields["llama.expert_used_count"]) == (4, 2)
    held = {each.name: each for each in reader.tensors}
    assert list(held["blk.0.ffn_gate_exps.weight"].data.shape) == [4, 32, 32]
    # Neighbours are rotated there, halves here: row 1 of the first head is its row 4.
    want = model.model.layers[0].self_attn.q_proj.weight[4].tolist()
    assert held["blk.0.attn_q.weight"].data[1].tolist() == want


def test_softmax_weights_that_do_not_fit_are_refused():
    config = with_layers(softmax().config, router_options={"renormalize": False})
    with pytest.raises(InputError, match=r"^gguf cannot hold weights that do not sum to one"):
        check_model(export_format("gguf"), config)
    config = with_layers(softmax().config, shared_width=32)
    with pytest.raises(InputError, match=r"^gguf cannot hold a shared part beside the routed"):
        check_model(export_format("gguf"), config)
    case = Case("mistral", WIDE)
    config = converted(case, router="topk-softmax", router_options={"top_k": 2}).config
    with pytest.raises(InputError, match=r"^gguf cannot hold attention in a sliding window"):
        check_model(export_format("gguf"), config)


# What it cannot hold is said.


def with_layers(config, **values):
    """The same config with other values in every layer."""
    changed = copy.deepcopy(config)
    for layer in changed.moesaic["layers"]:
        options = {**layer["router_options"], **values.get("router_options", {})}
        layer.update({**values, "router_options": options})
    return changed


REFUSED = [
    ({"bypass_rank": 3}, r"a bypass, here of rank 3: .* leaves out with bypass=0 \(layer 0\)"),
    ({"output_bias": True}, r"biases in the network \(output_bias\) \(layer 0\)"),
    ({"expert_bias": True}, r"biases in the network \(expert_bias\)"),
    ({"bias": True}, r"biases in the network \(bias\)"),
    ({"activation": "gelu"}, r"the activation 'gelu'"),
    ({"experts": "thresholded-gated"}, r"experts of the kind 'thresholded-gated'"),
    ({"router": "top-p"}, r"the router 'top-p'"),
    ({"shared_width": 12}, r"a shared part beside gates"),
    ({"router_options": {"value": "gate"}}, r"gates that weigh their blocks"),
]


@each_fixed
@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_a_layer_has_that_it_lacks(name, values, message):
    config = with_layers(dsmoe(PARENTS.get(name, "llama")).config, **values)
    with pytest.raises(InputError, match=rf"^{name} cannot hold {message}.*remote-code can$"):
        check_model(export_format(name), config)
    check_model(export_format("remote-code"), config)


@pytest.mark.parametrize("name", ["glm4_moe", "gguf"])
def test_groups_of_experts_are_refused(name):
    config = with_layers(fitting("glm4_moe").config, router_options={"num_groups": 2})
    with pytest.raises(InputError, match=rf"^{name} cannot hold groups of experts to choose from"):
        check_model(export_format(name), config)


@each_fixed
def test_layers_that_differ_are_refused(name):
    model = fitting(name)
    for key, value, message in (
        ("num_experts", 7, "numbers of blocks that differ between layers"),
        ("router_options", {"top_k": 3}, "numbers of blocks per token .* that differ"),
    ):
        config = copy.deepcopy(model.config)
        config.moesaic["layers"][1][key] = (
            {**config.moesaic["layers"][1][key], **value} if isinstance(value, dict) else value
        )
        with pytest.raises(InputError, match=message):
            check_model(export_format(name), config)


def test_gates_in_some_layers_alone_are_refused():
    config = copy.deepcopy(dsmoe("qwen3").config)
    config.moesaic["layers"][1].update(num_experts=0, shared_width=128, router="")
    with pytest.raises(InputError, match=r"^qwen3_moe cannot hold gates in some layers"):
        check_model(export_format("qwen3_moe"), config)


@pytest.mark.parametrize(
    ("name", "model_type", "options", "message"),
    [
        ("qwen3_moe", "llama", {}, r"attention without norms .*; gguf and glm4_moe and mixtral"),
        ("mixtral", "qwen3", {}, r"norms of queries and keys; gguf and glm4_moe and qwen3_moe"),
        ("mixtral", "qwen2", {}, r"biases of attention; gguf and glm4_moe and remote-code can"),
        ("glm4_moe", "mistral", {}, r"attention in a sliding window; mixtral and remote-code can"),
        ("glm4_moe", "llama", {"attention_bias": True}, r"a bias of the output of attention"),
        ("glm4_moe", "gemma2", {}, r"gemma2, which has norms after .*; remote-code can"),
        ("mixtral", "gpt2", {}, r"gpt2, which has learned positions"),
        (
            "gguf",
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                }
            },
            r"rotary positions of the type 'linear'; glm4_moe and mixtral and remote-code can",
        ),
    ],
)
def test_parents_that_do_not_fit(name, model_type, options, message):
    model = converted(Case(model_type, options), router_options=ONES)
    with pytest.raises(InputError, match=rf"^{name} cannot hold {message}"):
        check_model(export_format(name), model.config)


def test_blocks_that_no_group_of_numbers_fills():
    config = converted(Case("llama", {}), router_options=ONES).config
    with pytest.raises(InputError, match=r"rows of 12 numbers in Q8_0, which groups 32"):
        check_model(export_format("gguf", "Q8_0"), config)
    check_model(export_format("gguf", "BF16"), config)


def test_a_dense_model_is_refused():
    with pytest.raises(InputError, match=r"^the model is dense, so its own tools export it"):
        check_model(export_format("glm4_moe"), dense_config(Case("llama", {})))


@each_format
def test_unknown_weights_are_refused(name):
    with pytest.raises(InputError, match=rf"^weights of {name} must be one of auto, .* got 'q4'"):
        export_format(name, "q4")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"gguf needs gguf, .* pip install 'moesaic\[gguf\]'"):
        check_model(export_format("gguf"), dsmoe().config)


# Files.


def test_a_directory_has_names_that_other_software_knows(tmp_path):
    """Expert by expert, as vLLM and converters read them."""
    export_format("glm4_moe", "bfloat16").write(fitting("glm4_moe"), None, tmp_path, F32)
    state = load_file(tmp_path / "model.safetensors")
    place = "model.layers.1.mlp"
    for name in (
        f"{place}.experts.2.gate_proj.weight",
        f"{place}.experts.0.down_proj.weight",
        f"{place}.shared_experts.up_proj.weight",
        f"{place}.gate.weight",
        "lm_head.weight",
    ):
        assert state[name].dtype == torch.bfloat16, name
    assert state[f"{place}.gate.e_score_correction_bias"].dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Glm4MoeForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "moesaic" not in json.dumps(config)
    # A changed file is a changed model: it is these weights that are loaded.
    state["lm_head.weight"] *= 2
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    read = export_format("glm4_moe").read(tmp_path)
    assert torch.equal(read.lm_head.weight, state["lm_head.weight"].float())


def test_a_gguf_file_has_all_that_llama_cpp_asks_for(tmp_path):
    import gguf

    model = fitting("gguf", vocab_size=260, tie_word_embeddings=True)
    tokenizer = merging_tokenizer()
    export_format("gguf", "Q4_0").write(model, tokenizer, tmp_path, F32)
    reader = gguf.GGUFReader(tmp_path / "model-Q4_0.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    router = model.config.moesaic["layers"][0]["router_options"]
    for name, value in {
        "general.architecture": "glm4moe",
        "glm4moe.block_count": LAYERS,
        "glm4moe.expert_count": 3,
        "glm4moe.expert_used_count": router["top_k"],
        "glm4moe.expert_shared_count": 1,
        "glm4moe.expert_feed_forward_length": 32,
        "glm4moe.expert_weights_scale": router["scale"],
        "glm4moe.expert_weights_norm": False,
        "glm4moe.expert_gating_func": 2,
        "glm4moe.leading_dense_block_count": 0,
        "glm4moe.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }.items():
        assert values[name] == value, name
    assert values["tokenizer.ggml.tokens"][256:] == ["th", "<end>", "[PAD258]", "[PAD259]"]
    kinds = {each.name: each.tensor_type.name for each in reader.tensors}
    assert "output.weight" not in kinds
    for name, kind in {
        "token_embd.weight": "Q8_0",
        "blk.1.ffn_gate_exps.weight": "Q4_0",
        "blk.1.ffn_up_shexp.weight": "Q4_0",
        "blk.0.attn_q.weight": "Q4_0",
        "blk.0.ffn_gate_inp.weight": "F32",
        "blk.0.exp_probs_b.bias": "F32",
        "blk.0.post_attention_norm.weight": "F32",
    }.items():
        assert kinds[name] == kind, name
