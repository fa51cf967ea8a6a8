"""One native call for a layer: it routes and computes what the modules do, or it is not used.

Shapes: T tokens, E experts, D model width.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from nn_cases import make_layer, make_router, tokens

from moesaic.inference import pack_experts
from moesaic.nn.layer import all_experts_on, record_routing
from moesaic.nn.operating_point import threshold_at
from moesaic.nn.routers._table import ROUTERS
from moesaic.ops import select
from moesaic.ops.cpu import library
from moesaic.ops.cpu.ffn import PackedFfn, PackedRouter
from moesaic.ops.cpu.packed import PackedExperts
from moesaic.ops.weights import ExpertWeights

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())

E, D = 12, 17
NATIVE = [name for name in ROUTERS if make_router(name, E).choice() is not None]
SETTINGS = [
    *((name, {}) for name in NATIVE),
    ("sigmoid-threshold", {"threshold": 0.0}),
    ("sigmoid-threshold", {"value": "one", "normalize": "none", "bias": True, "threshold": 0.8}),
    ("topk-softmax", {"top_k": 5, "renormalize": False}),
    ("topk-softmax", {"top_k": E}),
    ("sigmoid-top-k", {"top_k": 3, "scale": 2.5, "normalize": True}),
    ("sigmoid-top-k", {"top_k": 4, "num_groups": 4, "top_groups": 2}),
    ("grouped-top-k", {"num_groups": 3, "per_group": 2, "learn_scale": True}),
    ("null-experts", {"top_k": 7}),
    ("top-p", {"threshold": 0.0}),
    ("top-p", {"threshold": 0.7}),
    ("top-p", {"threshold": 1.0}),
]


def native_weights(router, h_TD):
    """What native code routes, [T, E]: each expert gives one number of its own."""
    experts = ExpertWeights(
        torch.zeros(E, 8, D), torch.zeros(E, D, 4), "silu", True, down_bias=torch.eye(E, D)
    )
    packed = PackedRouter(router.score_map(), router.choice())
    return PackedFfn(router=packed, experts=PackedExperts(experts))(h_TD)[:, :E].float()


def routed_weights(router, h_TD):
    with torch.no_grad():
        return router(h_TD).weights_TE()


def prefer(router):
    """Give the choice a bias that matters."""
    if hasattr(router, "choice_bias"):
        draw = torch.Generator().manual_seed(1)
        router.choice_bias.copy_(torch.randn(E, generator=draw) / 4)
    return router


def test_the_routers_of_the_published_mixtures_are_native():
    assert {"sigmoid-threshold", "topk-softmax", "sigmoid-top-k", "top-p"} <= set(NATIVE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0, 1, 63, 600])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_native_code_routes_as_torch(name, options, T, dtype):
    router = prefer(make_router(name, E, **options)).to(dtype)
    h_TD = tokens(T, dtype=dtype)
    expected = routed_weights(router, h_TD)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(
        native_weights(router, h_TD), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("top_k", [1, 2, 5, 11])
@pytest.mark.parametrize(
    "name", [n for n in NATIVE if "top_k" in type(make_router(n, E).config).__slots__]
)
def test_ties_fall_as_in_torch(name, top_k):
    router = make_router(name, E, top_k=top_k)
    # Whole numbers, of which few differ.
    router.weight.data = torch.randint(-1, 2, router.weight.shape).float() / 4
    h_TD = torch.randint(-1, 2, (63, D)).float()
    expected = routed_weights(router, h_TD)
    torch.testing.assert_close(native_weights(router, h_TD), expected, rtol=1e-6, atol=1e-6)
    router.weight.data.zero_()
    expected = routed_weights(router, h_TD)
    torch.testing.assert_close(native_weights(router, h_TD), expected, rtol=1e-6, atol=1e-6)


def test_scores_far_apart_stay_finite():
    router = make_router("topk-softmax", E, top_k=3, renormalize=False)
    h_TD = tokens(9) * 1e4
    expected = routed_weights(router, h_TD)
    torch.testing.assert_close(native_weights(router, h_TD), expected, rtol=1e-5, atol=1e-6)


def packed_layer_of(**options):
    dtype = options.pop("dtype", torch.float32)
    layer = make_layer(dtype=dtype, num_experts=6, **options).eval().requires_grad_(False)
    pack_experts(layer, "float32" if dtype == torch.float32 else "bfloat16")
    return layer


def calls_of(layer, monkeypatch):
    """Count the native calls of a layer."""
    calls = []
    native = PackedFfn.__call__
    monkeypatch.setattr(PackedFfn, "__call__", lambda *a: calls.append(1) or native(*a))
    return calls


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    "options",
    [{}, {"shared_width": 7, "output_bias": True, "bypass_rank": 3, "bias": True}],
    ids=["routed", "all-parts"],
)
@torch.no_grad()
def test_a_layer_computes_what_its_modules_do(name, options, monkeypatch):
    layer = packed_layer_of(router=name, **options)
    calls = calls_of(layer, monkeypatch)
    h_BSD = tokens(15).float().reshape(3, 5, D)
    actual = layer(h_BSD)
    assert calls == [1]
    with record_routing(layer) as routings:
        expected = layer(h_BSD)
    assert len(routings) == len(calls) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_of_a_shared_part_alone(monkeypatch):
    layer = make_layer(dtype=torch.float32, num_experts=0, width=0, shared_width=9).eval()
    expected = layer(tokens(4).float())
    pack_experts(layer)
    calls = calls_of(layer, monkeypatch)
    torch.testing.assert_close(layer(tokens(4).float()), expected, rtol=1e-5, atol=1e-5)
    assert calls == [1]


@torch.no_grad()
def test_what_else_is_asked_of_a_layer_takes_the_modules(monkeypatch):
    layer, h_TD = packed_layer_of(), tokens(5).float()
    calls = calls_of(layer, monkeypatch)
    with all_experts_on(layer):
        layer(h_TD)
    layer.train()(h_TD)
    layer.eval()
    layer.experts.backend = "grouped"
    layer(h_TD)
    layer.experts.backend = "auto"
    with torch.enable_grad():
        assert layer(h_TD.requires_grad_()).requires_grad
    h_TD.requires_grad_(False)
    assert not calls
    layer(h_TD)
    assert calls


@pytest.mark.parametrize("change", ["in-place", "replaced", "module"])
@torch.no_grad()
def test_a_changed_layer_is_noticed(change, monkeypatch, caplog):
    monkeypatch.setattr(select, "_said", set())
    caplog.set_level(logging.INFO, logger="moesaic.ops.select")
    layer, h_TD = packed_layer_of(), tokens(5).float()
    calls = calls_of(layer, monkeypatch)
    if change == "in-place":
        layer.router.weight.mul_(-1)
    elif change == "replaced":
        layer.router.weight = torch.nn.Parameter(-layer.router.weight)
    else:
        layer.router = make_layer(dtype=torch.float32, seed=5).eval().router
    actual = layer(h_TD)
    assert not calls
    assert "changed since it was packed" in caplog.text
    layer.packed = None
    assert torch.equal(actual, layer(h_TD))
    pack_experts(layer, "float32")
    torch.testing.assert_close(layer(h_TD), actual, rtol=1e-5, atol=1e-5)
    assert calls


@torch.no_grad()
def test_the_threshold_moves_without_packing_again(monkeypatch):
    layer, h_TD = packed_layer_of(), tokens(63).float()
    calls = calls_of(layer, monkeypatch)
    before = layer(h_TD)
    with threshold_at(layer, 0.7):
        moved = layer(h_TD)
        with record_routing(layer):
            expected = layer(h_TD)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, moved)
    assert torch.equal(layer(h_TD), before)
    assert len(calls) == 3


@torch.no_grad()
def test_a_copied_layer_is_not_packed():
    layer, h_TD = packed_layer_of(), tokens(5).float()
    again = copy.deepcopy(layer)
    assert again.packed is None
    assert again.experts.packed is None
    torch.testing.assert_close(again(h_TD), layer(h_TD), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_router_without_native_code_is_named(monkeypatch, caplog):
    monkeypatch.setattr(select, "_said", set())
    caplog.set_level(logging.INFO, logger="moesaic.ops.select")
    layer = packed_layer_of(router="cmoe")
    assert layer.packed is None
    assert "has the router 'cmoe', which as it is set has no native code" in caplog.text


@pytest.mark.parametrize("T", [1, 30])
def test_bfloat16_in_and_out_is_rounded_once(T):
    layer = packed_layer_of(dtype=torch.bfloat16, router="topk-softmax")
    h_TD = tokens(T, dtype=torch.bfloat16)
    with torch.no_grad():
        half, full = layer(h_TD), layer(h_TD.float())
    assert half.dtype == torch.bfloat16
    assert full.dtype == torch.float32
    assert torch.equal(half, full.bfloat16())


def native_calls(graph):
    return [str(n.target) for n in graph.nodes if "moesaic" in str(n.target)]


@pytest.mark.parametrize("name", ["topk-softmax", "sigmoid-threshold"])
@torch.no_grad()
def test_a_compiled_layer_is_one_operator(name):
    layer, h_BSD = packed_layer_of(router=name), tokens(6).float().reshape(2, 3, D)
    seen = []

    def keep(module, inputs):
        seen.append(native_calls(module.graph))
        return module

    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    assert torch.equal(compiled(h_BSD), layer(h_BSD))
    assert seen == [["moesaic.layer"]]
    if name == "sigmoid-threshold":
        # Until native code has followed, the graph is one of modules.
        with threshold_at(layer, 0.6):
            torch.testing.assert_close(compiled(h_BSD), layer(h_BSD), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_exported_layer_is_one_operator():
    layer, h_BSD = packed_layer_of(), tokens(6).float().reshape(2, 3, D)
    exported = torch.export.export(layer, (h_BSD,))
    assert native_calls(exported.graph) == ["moesaic.layer.default"]
    assert torch.equal(exported.module()(h_BSD), layer(h_BSD))
