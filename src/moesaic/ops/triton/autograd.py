"""Forward and backward of the experts in launches of the kernels; this module needs triton.

Source: SonicMoE, arXiv 2512.14080: three kernels forward, and backward without y, without a and
without gathered copies of h or of the gradient.

Shapes: T tokens, K slots per token, N = T * K rows (see `plan`), E experts, F width of one expert,
C = 2F or F columns of `up`, D model width, B blocks of neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.ops.triton.kernels import (
    bias_gradient_kernel,
    down_backward_kernel,
    gather_sum_kernel,
    matrix_gradient_kernel,
    product_kernel,
    up_kernel,
)
from moesaic.ops.triton.plan import Plan, make_plan
from moesaic.ops.triton.tiles import Tiles, arithmetic, choose_tiles
from moesaic.ops.weights import ExpertWeights


def apply(
    h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights, out_dtype: torch.dtype
) -> Tensor:
    """Run the experts; all tensors of one dtype, except the slot weights and the output."""
    tiles = choose_tiles(h_TD, ids_TK.numel(), weights.num_experts)
    plan = make_plan(ids_TK, weights.num_experts, tiles.rows)
    leaves = [h_TD, weights_TK, *(x for x in weights if isinstance(x, Tensor))]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    call = _Call(weights.activation, weights.gated, tiles, keep, out_dtype)
    w = weights
    out: Tensor = _Experts.apply(h_TD, weights_TK, w.up, w.down, w.up_bias, w.down_bias, plan, call)
    return out


class _Call(NamedTuple):
    """What the launches of one call share.

    Attributes:
        act: Name of the activation, as the kernels spell it.
        gated: Whether `up` holds gate and up rows.
        tiles: Sizes of the tiles.
        keep: Whether the up product is wanted for a backward pass.
        out_dtype: Dtype of the output.
    """

    act: str
    gated: bool
    tiles: Tiles
    keep: bool
    out_dtype: torch.dtype


class _Experts(torch.autograd.Function):
    """The experts; saves h, the up product z, the slot weights and the plan."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weights_TK: Tensor,
        up_ECD: Tensor,
        down_EDF: Tensor,
        up_bias_EC: Tensor | None,
        down_bias_ED: Tensor | None,
        plan: Plan,
        call: _Call,
    ) -> Tensor:
        h_TD, weights_TK = h_TD.contiguous(), weights_TK.contiguous()
        up_bias_EC, down_bias_ED = _contiguous(up_bias_EC), _contiguous(down_bias_ED)
        z_NC, a_NF = _up(h_TD, up_ECD, up_bias_EC, plan, call)
        y_ND = _product(a_NF, down_EDF, down_bias_ED, plan, call.tiles)
        out_TD = _gather_sum(y_ND, plan, weights_TK, call.tiles, call.out_dtype)
        ctx.call = call
        if call.keep:
            ctx.save_for_backward(h_TD, weights_TK, up_ECD, down_EDF, down_bias_ED, z_NC, *plan)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, weights_TK, up_ECD, down_EDF, down_bias_ED, z_NC, *rest = ctx.saved_tensors
        plan, call, tiles = Plan(*rest), ctx.call, ctx.call.tiles
        need_h, need_weights, need_up, need_down, need_up_bias, need_down_bias, *_ = (
            ctx.needs_input_grad
        )
        dout_TD = dout_TD.to(h_TD.dtype).contiguous()
        dz_NC, wa_NF, dweights_TK = _down_backward(
            dout_TD, down_EDF, down_bias_ED, z_NC, weights_TK, plan, call
        )
        dh_TD = dup_ECD = ddown_EDF = dup_bias_EC = ddown_bias_ED = None
        if need_down:
            ddown_EDF = _matrix_gradient(dout_TD, wa_NF, plan, tiles, gather="g")
        if need_down_bias:
            ddown_bias_ED = _bias_gradient(dout_TD, plan, tiles, weights_TK)
        if need_up:
            dup_ECD = _matrix_gradient(dz_NC, h_TD, plan, tiles, gather="x")
        if need_up_bias:
            dup_bias_EC = _bias_gradient(dz_NC, plan, tiles, None)
        if need_h:
            dx_ND = _product(dz_NC, up_ECD.transpose(1, 2), None, plan, tiles)
            dh_TD = _gather_sum(dx_ND, plan, None, tiles, h_TD.dtype)
        return (
            dh_TD,
            dweights_TK if need_weights else None,
            dup_ECD,
            ddown_EDF,
            dup_bias_EC,
            ddown_bias_ED,
            None,
            None,
        )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _up(
    h_TD: Tensor, up_ECD: Tensor, bias_EC: Tensor | None, plan: Plan, call: _Call
) -> tuple[Tensor, Tensor]:
    """Give the up product, empty unless it is kept, and the neurons."""
    N, (E, C, D) = plan.slot_N.numel(), up_ECD.shape
    F = C // 2 if call.gated else C
    z_NC = h_TD.new_empty(N if call.keep else 0, C)
    a_NF = h_TD.new_empty(N, F)
    blocks = triton.cdiv(C, call.tiles.columns)
    _launch(up_kernel, plan.tile_row_M.numel() * blocks)(
        h_TD,
        up_ECD,
        bias_EC,
        z_NC,
        a_NF,
        plan.slot_N,
        plan.bounds,
        plan.tile_expert_M,
        plan.tile_row_M,
        D,
        F,
        blocks,
        *up_ECD.stride(),
        plan.row_TK.shape[1],
        E=E,
        GATED=call.gated,
        HAS_BIAS=bias_EC is not None,
        KEEP=call.keep,
        ACT=call.act,
        **call.tiles.product(call.tiles.columns),
        **arithmetic(h_TD),
    )
    return z_NC, a_NF


def _product(
    x_NI: Tensor, w_ECI: Tensor, bias_EC: Tensor | None, plan: Plan, tiles: Tiles
) -> Tensor:
    """Multiply every row by the matrix of its expert."""
    E, C, I = w_ECI.shape
    y_NC = x_NI.new_empty(x_NI.shape[0], C)
    blocks = triton.cdiv(C, tiles.columns)
    _launch(product_kernel, plan.tile_row_M.numel() * blocks)(
        x_NI,
        w_ECI,
        bias_EC,
        y_NC,
        plan.bounds,
        plan.tile_expert_M,
        plan.tile_row_M,
        I,
        C,
        blocks,
        *w_ECI.stride(),
        E=E,
        HAS_BIAS=bias_EC is not None,
        **tiles.product(tiles.columns),
        **arithmetic(x_NI),
    )
    return y_NC


def _gather_sum(
    y_ND: Tensor, plan: Plan, weights_TK: Tensor | None, tiles: Tiles, dtype: torch.dtype
) -> Tensor:
    """Sum the rows of every token, weighted or not."""
    (T, K), D = plan.row_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(T, D, dtype=dtype)
    _launch(gather_sum_kernel, triton.cdiv(T, tiles.tokens), triton.cdiv(D, tiles.features))(
        y_ND,
        plan.row_TK,
        weights_TK,
        out_TD,
        T,
        D,
        K,
        WEIGHTED=weights_TK is not None,
        BLOCK_T=tiles.tokens,
        BLOCK_D=tiles.features,
        ACC=arithmetic(y_ND)["ACC"],
        num_warps=4,
    )
    return out_TD


def _down_backward(
    dout_TD: Tensor,
    down_EDF: Tensor,
    bias_ED: Tensor | None,
    z_NC: Tensor,
    weights_TK: Tensor,
    plan: Plan,
    call: _Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give dz, the weighted neurons, and the gradient of the slot weights."""
    N, (E, D, F) = plan.slot_N.numel(), down_EDF.shape
    dz_NC, wa_NF = torch.empty_like(z_NC), z_NC.new_empty(N, F)
    blocks = triton.cdiv(F, call.tiles.backward_columns)
    sum_dtype = torch.promote_types(z_NC.dtype, torch.float32)
    dweight_NB = z_NC.new_empty(N, blocks, dtype=sum_dtype)
    _launch(down_backward_kernel, plan.tile_row_M.numel() * blocks)(
        dout_TD,
        down_EDF,
        bias_ED,
        z_NC,
        weights_TK,
        dz_NC,
        wa_NF,
        dweight_NB,
        plan.slot_N,
        plan.bounds,
        plan.tile_expert_M,
        plan.tile_row_M,
        D,
        F,
        blocks,
        *down_EDF.stride(),
        plan.row_TK.shape[1],
        E=E,
        GATED=call.gated,
        HAS_BIAS=bias_ED is not None,
        ACT=call.act,
        **call.tiles.product(call.tiles.backward_columns),
        **arithmetic(z_NC),
    )
    # Rows of empty slots were never written.
    dweight_N = dweight_NB.sum(1)
    held_TK = plan.row_TK >= 0
    dweights_TK = dweight_N[torch.where(held_TK, plan.row_TK, 0)] if N else held_TK
    return dz_NC, wa_NF, torch.where(held_TK, dweights_TK, 0.0).to(weights_TK.dtype)


def _matrix_gradient(
    g: Tensor, x: Tensor, plan: Plan, tiles: Tiles, gather: Literal["g", "x"]
) -> Tensor:
    """Sum over the rows of every expert the outer products of g and x, one read by token."""
    E, C, I = plan.bounds.numel() - 1, g.shape[1], x.shape[1]
    dw_ECI = g.new_empty(E, C, I)
    programs = E * triton.cdiv(C, tiles.columns) * triton.cdiv(I, tiles.columns)
    _launch(matrix_gradient_kernel, programs)(
        g,
        x,
        dw_ECI,
        plan.slot_N,
        plan.bounds,
        C,
        I,
        plan.row_TK.shape[1],
        GATHER_G=gather == "g",
        GATHER_X=gather == "x",
        **tiles.gradient(),
        **arithmetic(g),
    )
    return dw_ECI


def _bias_gradient(g: Tensor, plan: Plan, tiles: Tiles, weights_TK: Tensor | None) -> Tensor:
    """Sum g over the rows of every expert; with slot weights, g is read by token and scaled."""
    E, C = plan.bounds.numel() - 1, g.shape[1]
    db_EC = g.new_empty(E, C)
    _launch(bias_gradient_kernel, E, triton.cdiv(C, tiles.columns))(
        g,
        weights_TK,
        db_EC,
        plan.slot_N,
        plan.bounds,
        C,
        plan.row_TK.shape[1],
        GATHER=weights_TK is not None,
        BLOCK_R=tiles.inner,
        BLOCK_C=tiles.columns,
        ACC=arithmetic(g)["ACC"],
        num_warps=4,
    )
    return db_EC


def _launch(kernel: Any, *grid: int) -> Callable[..., object]:
    """Launch a kernel on a grid; a grid without programs, which no device takes, does nothing."""
    if 0 in grid:
        return lambda *args, **options: None
    return kernel[grid]  # type: ignore[no-any-return]
