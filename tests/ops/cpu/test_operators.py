"""The native code as operators of torch: what its own check says, compiled and exported.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import pytest
import torch
from expert_cases import Case
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic._errors import InputError, RunError
from moesaic.ops.choice import Choice, ScoreMap
from moesaic.ops.cpu import library, operators, structs
from moesaic.ops.cpu.ffn import PackedFfn, PackedRouter
from moesaic.ops.cpu.packed import PackedExperts, PackedLinear
from moesaic.ops.select import apply_experts

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())

CASES = [
    Case(T=T, gated=gated, bias=bias)
    for T in (0, 1, 63)
    for gated, bias in ((True, False), (False, True))
]


def packed_ffn(case, weight_format="float32", **parts):
    inputs = case.inputs(torch.float32)
    router = PackedRouter(
        ScoreMap(torch.randn(case.E, case.D), choice_bias=torch.randn(case.E)),
        Choice("highest", "softmax", top_k=2, normalize="sum"),
    )
    experts = PackedExperts(inputs.weights, weight_format)
    return inputs.h_TD, PackedFfn(router=router, experts=experts, **parts)


@pytest.mark.parametrize("weight_format", ["float32", "int8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchs_own_check_of_the_experts(case, weight_format):
    h_TD, ids_TK, weights_TK, weights = case.inputs(torch.float32)
    copy = PackedExperts(weights, weight_format)
    # What it clones is of another version: sources have a test of their own.
    taken = operators.take_apart(copy.struct, copy.parts)
    torch.library.opcheck(torch.ops.moesaic.experts, (h_TD, ids_TK, weights_TK, *taken, [], []))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchs_own_check_of_the_layer(case):
    D = case.D
    bypass = PackedLinear(torch.randn(3, D), None), PackedLinear(torch.randn(D, 3), torch.randn(D))
    shared = PackedExperts(Case(E=1, D=D, F=9).inputs(torch.float32).weights)
    h_TD, ffn = packed_ffn(case, shared=shared, bypass=bypass, output_bias_D=torch.randn(D))
    taken = operators.take_apart(ffn.struct, ffn.parts)
    torch.library.opcheck(torch.ops.moesaic.layer, (h_TD, *taken, [], []))
    expected = ffn(h_TD)
    assert torch.equal(torch.ops.moesaic.layer(h_TD, *taken, [], []), expected)
    torch.library.opcheck(
        torch.ops.moesaic.layer, (h_TD.bfloat16().reshape(-1, 1, D), *taken, [], [])
    )


def test_a_struct_taken_apart_and_rebuilt_is_the_same():
    _, ffn = packed_ffn(Case())
    pointers = [None if x is None else x.data_ptr() for x in ffn.parts]
    assert len(pointers) == structs.num_pointers(structs.Ffn)
    again = structs.rebuilt(structs.Ffn, pointers, *structs.numbers_of(ffn.struct))
    assert bytes(again) == bytes(ffn.struct)


class Layer(nn.Module):
    """A layer of experts whose routing is given, between two products."""

    def __init__(self, case):
        super().__init__()
        inputs = case.inputs(torch.float32)
        self.ids_TK, self.weights_TK, weights = inputs.ids_TK, inputs.weights_TK, inputs.weights
        self.up = nn.Parameter(weights.up, requires_grad=False)
        self.weights = weights._replace(
            up=self.up, packed=PackedExperts(weights._replace(up=self.up))
        )
        self.before = nn.Linear(case.D, case.D)

    def forward(self, h_TD):
        return apply_experts(self.before(h_TD), self.ids_TK, self.weights_TK, self.weights) * 2


def nodes(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@torch.no_grad()
def test_a_compiled_layer_holds_one_call_and_gives_the_same():
    layer, h_TD = Layer(Case()), torch.randn(63, 17)
    seen = []

    def keep(module, inputs):
        seen.extend(nodes(module.graph))
        return module

    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    assert torch.equal(compiled(h_TD), layer(h_TD))
    assert [name for name in seen if "moesaic" in name] == ["moesaic.experts"]
    layer.up.mul_(2)
    with pytest.raises(RunError, match="changed since they were packed, and this compiled graph"):
        compiled(h_TD)


@torch.no_grad()
def test_an_exported_layer_holds_one_call_and_gives_the_same():
    layer, h_TD = Layer(Case()), torch.randn(63, 17)
    exported = torch.export.export(layer, (h_TD,))
    assert [name for name in nodes(exported.graph) if "moesaic" in name] == [
        "moesaic.experts.default"
    ]
    assert torch.equal(exported.module()(h_TD), layer(h_TD))


def test_a_tensor_that_only_stands_for_one_gives_its_shape():
    _, ffn = packed_ffn(Case())
    with FakeTensorMode(allow_non_fake_inputs=True):
        h_BSD = torch.empty(2, 3, 17, dtype=torch.bfloat16)
        out = ffn(h_BSD)
    assert (out.shape, out.dtype) == (h_BSD.shape, h_BSD.dtype)


def test_a_gradient_is_refused():
    h_TD, ffn = packed_ffn(Case())
    taken = operators.take_apart(ffn.struct, ffn.parts)
    out_TD = torch.ops.moesaic.layer(h_TD.requires_grad_(), *taken, [], [])
    with pytest.raises(
        InputError, match=r"packed weights give no gradient; call under torch.no_grad"
    ):
        out_TD.sum().backward()


def test_weights_of_another_kind_of_machine_are_refused():
    h_TD, ffn = packed_ffn(Case())
    taken = list(operators.take_apart(ffn.struct, ffn.parts))
    taken[3] = 4
    with pytest.raises(RunError, match=r"registers of 4 floats and this machine's have \d+"):
        torch.ops.moesaic.layer(h_TD, *taken, [], [])
