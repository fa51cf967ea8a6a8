"""Hash layers, arXiv 2106.04426: a fixed table, the token ids it needs, and who hands them on."""

import pytest
import torch
from nn_cases import tokens

import moesaic as mo
from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers, pass_state, record_routing
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routers.hash import Hash, HashConfig


def router_of(num_experts=6, **options):
    return Hash(17, num_experts, HashConfig(**options))


def look_up(router, ids):
    ids_T = torch.tensor(ids)
    return router(torch.zeros(len(ids), 17), RouterState(tokens_T=ids_T))


def test_a_token_has_the_experts_of_its_table():
    router = router_of(top_k=2)
    router.table_VK[7] = torch.tensor([5, 0])
    routing = look_up(router, [7, 7])
    assert routing.ids_TK.tolist() == [[5, 0]] * 2
    torch.testing.assert_close(routing.weights_TK, torch.full((2, 2), 0.5))
    assert routing.scores_TE.tolist() == [[1, 0, 0, 0, 0, 1]] * 2


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_the_table_is_even_and_its_experts_differ(top_k):
    table_VK = router_of(vocab_size=257, top_k=top_k).table_VK
    assert table_VK.shape == (257, top_k)
    for column_V in table_VK.T:
        counts_E = torch.bincount(column_V, minlength=6)
        assert counts_E.max() - counts_E.min() <= 1
    assert all(len(set(row)) == top_k for row in table_VK.tolist())
    # Drawn and not in the order of ids.
    assert table_VK[:12, 0].tolist() != [i % 6 for i in range(12)]


def test_a_seed_is_a_table():
    first, same, other = (router_of(seed=seed).table_VK for seed in (0, 0, 1))
    assert torch.equal(first, same)
    # Of random tables a sixth agrees.
    assert (first == other).float().mean() < 0.3


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"router hash needs the token ids of 3 tokens, got none; give the model input_ids"),
        (RouterState(), r"needs the token ids of 3 tokens, got none"),
        (RouterState(tokens_T=torch.arange(2)), r"ids of 3 tokens, got those of 2"),
        (
            RouterState(tokens_T=torch.tensor([0, 1, 257])),
            r"vocab_size must be above every token id, got 257 and token 257",
        ),
    ],
)
def test_without_ids_it_says_what_is_missing(state, message):
    with pytest.raises(InputError, match=message):
        router_of()(tokens(3), state)


def test_layers_of_ones_own_get_ids_from_pass_state():
    config = LayerConfig(num_experts=6, width=5, router="hash", router_options={"top_k": 2})
    moe = MoELayer(17, config)
    ids_BS = torch.randint(257, (2, 3), generator=torch.Generator().manual_seed(0))
    with pass_state(moe, ids_BS), record_routing(moe) as routings:
        moe(torch.zeros(2, 3, 17))
    assert torch.equal(routings[0].ids_TK, moe.router.table_VK[ids_BS.flatten()])
    with pytest.raises(InputError, match="needs the token ids"):
        moe(torch.zeros(2, 3, 17))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = tuple(
        LayerConfig(num_experts=4, width=8, router="hash", router_options={"seed": seed})
        for seed in (0, 1)
    )
    sizes = {"dim": 32, "num_layers": 2, "num_kv_heads": 2, "width": 16}
    return mo.build_mixture(mo.MixtureConfig(**sizes, layers=layers)).eval()


def test_a_model_hands_its_ids_on_and_decodes_with_a_cache(model):
    ids_BS = torch.randint(257, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record_routing(model) as routings:
        whole = model(ids_BS).logits
    for routing, layer in zip(routings, moe_layers(model), strict=True):
        assert torch.equal(routing.ids_TK, layer.router.table_VK[ids_BS[0]])
    with torch.no_grad():
        start = model(ids_BS[:, :5], use_cache=True)
        rest = model(ids_BS[:, 5:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 5:])
    with pytest.raises(InputError, match="give the model input_ids and not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


def test_the_table_is_saved(model, tmp_path):
    moe_layers(model)[0].router.table_VK[3] = 2
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for before, after in zip(moe_layers(model), moe_layers(loaded), strict=True):
        assert torch.equal(before.router.table_VK, after.router.table_VK)
