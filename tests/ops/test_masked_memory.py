"""The masked path needs the memory of one dense FFN, in the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from expert_cases import Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.ops.masked import experts_masked


class Largest(TorchDispatchMode):
    """Notes the elements of the largest storage that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                # A view may have more elements than there is memory behind it.
                size = leaf.untyped_storage().nbytes() // leaf.itemsize
                self.num_elements = max(self.num_elements, size)
        return out


def saved_bytes(function: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes kept for the backward pass beyond the parameters, shared storage counted once."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function()
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "all-on"])
def test_nothing_is_larger_than_the_up_product(weighted):
    case = Case(T=96, D=64, E=6, K=6, F=8)
    h_TD, _, weights_TE, weights = case.inputs(torch.float32)
    leaves = [h_TD, weights.up, weights.down, *([weights_TE] if weighted else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    bound = max(case.T * case.E * 2 * case.F, weights.up.numel())
    # Otherwise the outputs of all experts would pass.
    assert bound < case.T * case.E * case.D
    with Largest() as largest:
        out_TD = experts_masked(h_TD, weights_TE if weighted else None, weights)
        out_TD.backward(torch.ones_like(out_TD))
    assert all(leaf.grad is not None for leaf in leaves)
    assert case.T * case.E * case.F <= largest.num_elements <= bound


def test_the_measure_notices_the_outputs_of_all_experts():
    h_TD, _, weights_TE, weights = Case(T=96, D=64, E=6, K=6, F=8).inputs(torch.float32)
    with Largest() as largest:
        z_TEM = torch.einsum("td,emd->tem", h_TD, weights.up)
        out_TED = torch.einsum("tef,edf->ted", weights.activate(z_TEM), weights.down)
        (out_TED * weights_TE.unsqueeze(2)).sum(1)
    assert largest.num_elements == 96 * 6 * 64


def test_backward_keeps_less_than_a_dense_network():
    case = Case(T=256, D=32, E=6, K=6, F=16)
    h_TD, _, weights_TE, weights = case.inputs(torch.float32)
    gate_MD, up_MD = (x.flatten(0, 1).clone() for x in weights.up.split(case.F, dim=1))
    down_DM = weights.down.permute(1, 0, 2).flatten(1)
    parameters = [x.requires_grad_() for x in (weights.up, weights.down, gate_MD, up_MD, down_DM)]
    h_TD.requires_grad_()
    weights_TE.requires_grad_()

    def dense() -> Tensor:
        a_TM = nnf.silu(nnf.linear(h_TD, gate_MD)) * nnf.linear(h_TD, up_MD)
        return nnf.linear(a_TM, down_DM)

    dense_bytes = saved_bytes(dense, parameters)
    masked_bytes = saved_bytes(lambda: experts_masked(h_TD, weights_TE, weights), parameters)
    # h, and four matrices of the width of the network: gate, up, act(gate) and their product.
    assert dense_bytes == 4 * case.T * (case.D + 4 * case.E * case.F)
    assert 0 < masked_bytes <= dense_bytes
