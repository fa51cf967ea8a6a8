"""Facts that hold for any experts and any routing, tried on drawn sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from expert_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.ops.masked import experts_masked
from moesaic.ops.select import apply_experts

BACKENDS = ["reference", "masked", "grouped"]
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


@st.composite
def cases(draw: st.DrawFn, **fixed: object) -> Case:
    num_experts = fixed.get("E") or draw(st.integers(1, 7))
    sizes = {
        "T": draw(st.integers(0, 12)),
        "D": draw(st.integers(1, 9)),
        "E": num_experts,
        "K": draw(st.integers(1, num_experts)),
        "F": draw(st.integers(1, 6)),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    return Case(**{**sizes, **fixed})


@few
@given(case=cases(), seed=seeds, backend=st.sampled_from(BACKENDS))
def test_renumbering_experts_changes_nothing(case, seed, backend):
    h_TD, ids_TK, weights_TK, weights = case.inputs(torch.float64, seed)
    before = apply_experts(h_TD, ids_TK, weights_TK, weights, backend)
    order_E = torch.randperm(case.E, generator=torch.Generator().manual_seed(seed))
    renumbered = weights._replace(
        up=weights.up[order_E],
        down=weights.down[order_E],
        up_bias=None if weights.up_bias is None else weights.up_bias[order_E],
        down_bias=None if weights.down_bias is None else weights.down_bias[order_E],
    )
    after = apply_experts(h_TD, order_E.argsort()[ids_TK], weights_TK, renumbered, backend)
    torch.testing.assert_close(after, before)


@few
@given(case=cases(), seed=seeds, backend=st.sampled_from(BACKENDS))
def test_permuting_tokens_permutes_outputs(case, seed, backend):
    h_TD, ids_TK, weights_TK, weights = case.inputs(torch.float64, seed)
    out_TD = apply_experts(h_TD, ids_TK, weights_TK, weights, backend)
    order_T = torch.randperm(case.T, generator=torch.Generator().manual_seed(seed))
    permuted = apply_experts(h_TD[order_T], ids_TK[order_T], weights_TK[order_T], weights, backend)
    torch.testing.assert_close(permuted, out_TD[order_T])


@few
@given(case=cases(), seed=seeds, backend=st.sampled_from(BACKENDS))
def test_order_of_slots_changes_nothing(case, seed, backend):
    h_TD, ids_TK, weights_TK, weights = case.inputs(torch.float64, seed)
    out_TD = apply_experts(h_TD, ids_TK, weights_TK, weights, backend)
    flipped = apply_experts(h_TD, ids_TK.flip(1), weights_TK.flip(1), weights, backend)
    torch.testing.assert_close(flipped, out_TD)


@few
@given(case=cases(E=1, K=1), seed=seeds, backend=st.sampled_from(BACKENDS))
def test_one_expert_is_a_dense_network(case, seed, backend):
    h_TD, ids_TK, weights_TK, weights = case.inputs(torch.float64, seed)
    out_TD = apply_experts(h_TD, ids_TK, torch.ones_like(weights_TK), weights, backend)
    bias = (None, None) if weights.up_bias is None else weights.up_bias[0].split(case.F)
    if case.gated:
        gate, up = weights.up[0].split(case.F)
        a_TF = nnf.silu(nnf.linear(h_TD, gate, bias[0])) * nnf.linear(h_TD, up, bias[1])
    else:
        a_TF = nnf.silu(nnf.linear(h_TD, weights.up[0], bias[0]))
    down_bias = None if weights.down_bias is None else weights.down_bias[0]
    torch.testing.assert_close(out_TD, nnf.linear(a_TF, weights.down[0], down_bias))


@few
@given(case=cases(), seed=seeds)
def test_experts_are_linear_in_their_weights(case, seed):
    h_TD, _, _, weights = case.inputs(torch.float64, seed)
    one_TE = torch.ones(case.T, case.E, dtype=torch.float64)
    dense = experts_masked(h_TD, None, weights)
    torch.testing.assert_close(experts_masked(h_TD, one_TE, weights), dense)
    torch.testing.assert_close(experts_masked(h_TD, -2.5 * one_TE, weights), -2.5 * dense)
