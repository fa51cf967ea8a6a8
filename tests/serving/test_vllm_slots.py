"""Slots for vLLM: the same layer, any number of blocks on, distinct ids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.nn.layer import LayerConfig
from moesaic.serving.vllm.obstacles import make_router
from moesaic.serving.vllm.slots import SlotRouting, num_slots, slots_of


def test_unused_slots_hold_other_blocks_at_weight_zero():
    weights_TE = torch.tensor([[0.0, 2.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0], [-3.0, 1.0, 0.0, 0.0]])
    weights_TK, ids_TK = slots_of(weights_TE, 2)
    assert weights_TK.tolist() == [[2.0, 0.5], [0.0, 0.0], [-3.0, 1.0]]
    assert ids_TK[0].tolist() == [1, 3]
    assert ids_TK[2].tolist() == [0, 1]


@given(
    tokens=st.integers(0, 5), experts=st.integers(1, 7), on=st.integers(0, 7), seed=st.integers(0)
)
def test_slots_are_distinct_and_keep_every_weight(tokens, experts, on, seed):
    draw = torch.Generator().manual_seed(seed % 1000)
    on = min(on, experts)
    weights_TE = torch.zeros(tokens, experts)
    for row in weights_TE:
        row[torch.randperm(experts, generator=draw)[:on]] = 1 + torch.rand(on, generator=draw)
    for slots in range(max(on, 1), experts + 1):
        weights_TK, ids_TK = slots_of(weights_TE, slots)
        assert ids_TK.shape == (tokens, slots)
        assert all(len(set(row)) == slots for row in ids_TK.tolist())
        back_TE = torch.zeros_like(weights_TE).scatter(1, ids_TK, weights_TK)
        assert torch.equal(back_TE, weights_TE)


def test_processes_share_the_slots_of_a_token():
    weights_TE = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 7.0, 0.0, 0.0, 6.0]])
    first, second = SlotRouting(), SlotRouting()
    first.hold(torch.tensor([1, 0, -1, -1, 2], dtype=torch.int32))
    second.hold(torch.tensor([-1, -1, 0, 1, -1], dtype=torch.int32))
    h_TD = torch.zeros(2, 3)
    weights_TK, ids_TK = first(h_TD, weights_TE, 5, False)
    # In its order: blocks 1, 0 and 4.
    assert weights_TK.tolist() == [[2.0, 1.0, 5.0], [7.0, 0.0, 6.0]]
    assert ids_TK.tolist() == [[0, 1, 2], [0, 1, 2]]
    weights_TK, ids_TK = second(h_TD, weights_TE, 1, False)
    assert weights_TK.tolist() == [[4.0], [0.0]]
    assert ids_TK[0].tolist() == [1]


ROUTERS = [
    ("sigmoid-threshold", {}, 6),
    ("sigmoid-top-k", {"top_k": 3}, 3),
    ("topk-softmax", {"top_k": 2}, 2),
    ("null-experts", {"top_k": 4}, 4),
]


@pytest.mark.parametrize(("router", "options", "slots"), ROUTERS)
def test_a_router_says_how_many_slots_it_fills(router, options, slots):
    layer = LayerConfig(num_experts=6, width=4, router=router, router_options=options)
    assert num_slots(make_router(layer, 8), 8) == slots


@pytest.mark.parametrize(("router", "options", "slots"), ROUTERS)
def test_routing_compiles_as_one_graph(router, options, slots):
    """As vLLM compiles a model, in whole."""
    layer = LayerConfig(num_experts=6, width=4, router=router, router_options=options)
    made = make_router(layer, 8)

    def routed(h_TD):
        return slots_of(made(h_TD).weights_TE().float(), slots)

    torch.compiler.reset()
    h_TD = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    want = routed(h_TD)
    got = torch.compile(routed, backend="eager", fullgraph=True)(h_TD)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
