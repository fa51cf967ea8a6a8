"""Union of Experts, arXiv 2503.02495: an exact cut, shares of a sequence, causality, the gate."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import make_layer, make_router, set_scores, tokens

from moesaic._errors import InputError
from moesaic.nn.routers._base import RouterState
from moesaic.nn.selective_attention import SelectiveAttention

E, D, S = 4, 16, 12
# As published: a share of the sequence, summed at weight one.
PUBLISHED = {"capacity": 0.5, "weight": "none"}
EVERYTHING = {"top_k": E, "capacity": 1.0, "weight": "none"}


def selection(num_experts=E, **options):
    return make_router("data-selection", num_experts, D, **options)


def attention(dtype=torch.float64, heads=E, **options):
    module = SelectiveAttention(D, heads, selection(heads, **options)).to(dtype)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in (module.qkv_proj, module.o_proj):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * D**-0.5)
    return module


def layer(**options):
    return make_layer("data-selection", dim=D, num_experts=E, router_config=options)


def sequences(num=3, dtype=torch.float64):
    return tokens(num * S, D, dtype=dtype).unflatten(0, (num, S))


def test_everything_on_is_the_dense_network():
    moe, h_BSD = layer(**EVERYTHING), sequences()
    gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)
    gate, up = gate.flatten(0, 1), up.flatten(0, 1)
    down = moe.experts.down_proj.movedim(0, 1).flatten(1)
    expected = (torch.nn.functional.silu(h_BSD @ gate.T) * (h_BSD @ up.T)) @ down.T
    torch.testing.assert_close(moe(h_BSD), expected)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_everything_on_is_the_attention_of_transformers(kv_heads):
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=D,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=E,
        num_key_value_heads=kv_heads,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).eval()
    dense = model.layers[0].self_attn
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=D**-0.5)
    union = attention(torch.float32, **EVERYTHING)
    union.fill(*(getattr(dense, f"{name}_proj").weight for name in "qkvo"))
    h_BSD = sequences(dtype=torch.float32)
    rotary = model.rotary_emb(h_BSD, torch.arange(S)[None])
    mask_SS = torch.full((S, S), float("-inf")).triu(1)[None, None]
    expected, _ = dense(h_BSD, position_embeddings=rotary, attention_mask=mask_SS)
    torch.testing.assert_close(union(h_BSD, rotary), expected, rtol=1e-4, atol=1e-5)


def test_a_head_is_attention_over_its_own_tokens():
    module, h_BSD = attention(top_k=2), sequences(1)
    routing = module.router(h_BSD[0])
    expected = torch.zeros(S, D, dtype=torch.float64)
    for head in range(E):
        own = [t for t in range(S) if head in routing.ids_TK[t].tolist()]
        q, k, v = (matrix @ h_BSD[0, own].T for matrix in module.qkv_proj[:, head])
        scores = q.T @ k * (D // E) ** -0.5
        scores = scores.masked_fill(~torch.ones(len(own), len(own)).tril().bool(), -torch.inf)
        out = scores.softmax(1) @ v.T @ module.o_proj[head].T
        expected[own] += out * routing.weights_TE()[own, head, None]
    torch.testing.assert_close(module(h_BSD)[0], expected)
    assert (routing.ids_TK == E).any()


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 9),
    capacity=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.integers(1, E),
    seed=st.integers(0, 2**31),
    spread_out=st.floats(0.0, 10.0),
)
def test_experts_take_their_share_of_every_sequence(length, capacity, top_k, seed, spread_out):
    router = selection(top_k=top_k, capacity=capacity, seed=seed, spread_out=spread_out)
    h_TD = tokens(3 * length, D, seed=seed)
    routing = router(h_TD, RouterState(num_sequences=len(h_TD) // length))
    asked = selection(top_k=top_k, capacity=1.0, seed=seed, spread_out=spread_out)(h_TD)
    room = length if capacity == 1.0 else max(1, int(capacity * length))
    for part, wanted in zip(routing.ids_TK.split(length), asked.ids_TK.split(length), strict=True):
        asks = torch.bincount(wanted.flatten(), minlength=E)
        takes = torch.bincount(part.flatten(), minlength=E + 1)[:E]
        assert torch.equal(takes, asks.clamp(max=room))


def test_shares_by_hand():
    router = selection(2, top_k=1, capacity=0.5)
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    routing = router(set_scores(router, scores))
    # Three tokens ask for expert 0, which has room for the two that want it most.
    assert routing.ids_TK.flatten().tolist() == [2, 0, 0, 1]
    expected = torch.tensor([0.0, 3.0, 2.0, 5.0]).sigmoid() * torch.tensor([0.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(routing.weights_TK.flatten(), expected)


@pytest.mark.parametrize("module", [layer, attention], ids=["network", "attention"])
def test_only_full_capacity_is_causal(module):
    def change(**options):
        """Which positions feel another last token."""
        union, h_BSD = module(top_k=2, **options), sequences(8)
        other = h_BSD.clone()
        other[:, -1] = tokens(8, D, seed=9, dtype=torch.float64)
        # A sequence hears nothing of others, and the last token is felt there.
        return (union(h_BSD) - union(other)).abs().amax((0, 2)) > 1e-9

    assert change(capacity=1.0).tolist() == [False] * (S - 1) + [True]
    assert change(**PUBLISHED)[:-1].any()


@pytest.mark.parametrize("module", [layer, attention], ids=["network", "attention"])
def test_sequences_are_alone(module):
    union, h_BSD = module(**PUBLISHED), sequences()
    torch.testing.assert_close(union(h_BSD)[1:2], union(h_BSD[1:2]))


@pytest.mark.parametrize("module", [layer, attention], ids=["network", "attention"])
def test_the_gate_learns_only_if_it_weighs(module):
    for weight, learns in (("none", False), ("score", True)):
        union = module(weight=weight).train()
        union(sequences()).square().sum().backward()
        grad = union.router.weight.grad
        assert (grad is not None and bool(grad.any())) == learns


def test_attention_moves_with_its_positions():
    module = attention(capacity=1.0)
    h_BSD = sequences(1)
    angles = torch.arange(S, dtype=torch.float64)[:, None] * torch.ones(2, dtype=torch.float64)
    angles = torch.cat([angles, angles], 1)[None]
    turned = module(h_BSD, (angles.cos(), angles.sin()))
    shifted = module(h_BSD, ((angles + 0.7).cos(), (angles + 0.7).sin()))
    # Only distances count, and they do count.
    torch.testing.assert_close(shifted, turned)
    assert (turned - module(h_BSD)).abs().max() > 1e-3


def test_attention_refuses_what_does_not_fit():
    with pytest.raises(InputError, match=r"num_heads must divide dim=16, got 3; choose a divisor"):
        SelectiveAttention(D, 3, selection(3))
    with pytest.raises(InputError, match=r"among num_heads=4 experts, got 2; make it for as many"):
        SelectiveAttention(D, 4, selection(2))


def test_fresh_attention_is_small():
    module = attention()
    module.reset_parameters()
    assert module.qkv_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert "heads=4" in repr(module)
