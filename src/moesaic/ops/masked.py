"""Every expert for every token, in about the time and memory of one dense FFN.

The experts of a cut FFN together are as wide as the FFN was, so computing all of them costs what
the dense FFN costs. The slot weight scales an expert's neurons before the down product instead of
its output after it, so nothing of shape [T, E, D] exists. Training a router that needs the output
of experts it switched off (DSMoE's straight-through estimator) can do no better.

The up product keeps neurons in rows and tokens in columns: the gate rows of an expert are then one
piece of memory, however narrow the expert, and elementwise work runs at full speed.

Shapes: T tokens, E experts, F width of one expert, D model width, R rows of one expert in the up
product (2F if gated, else F), C experts of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.ops.weights import ExpertWeights, Thresholds, activation

# Neurons times tokens of one chunk. On a CPU the few tensors of this size that the elementwise
# part makes stay in its cache; on other devices it only bounds their memory.
_CHUNK_CPU = 2**16
_CHUNK = 2**24

# Torch's own derivatives of the usual activations; of any other, a graph for each chunk gives it.
_KERNELS: dict[Callable[[Tensor], Tensor], Any] = {
    F.gelu: torch.ops.aten.gelu_backward.grad_input,
    F.silu: torch.ops.aten.silu_backward.grad_input,
}


def experts_masked(h_TD: Tensor, weights_TE: Tensor | None, weights: ExpertWeights) -> Tensor:
    """Sum all experts, each scaled by its weight for the token.

    Differentiable once. What is kept for the backward pass is the up product: half of what the
    dense FFN keeps. The rest is done again, in chunks.

    Args:
        h_TD: Inputs, [T, D].
        weights_TE: Weight of every expert for every token, [T, E]; none means one everywhere,
            which is the dense FFN.
        weights: The experts.

    Returns:
        out_TD, in the dtype of the products.
    """
    up, down, up_bias, down_bias = weights.up, weights.down, weights.up_bias, weights.down_bias
    device = h_TD.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Do what autocast does to a linear, once, so that both passes compute alike.
        dtype = torch.get_autocast_dtype(device)
        h_TD, up, down = h_TD.to(dtype), up.to(dtype), down.to(dtype)
        up_bias = None if up_bias is None else up_bias.to(dtype)
        down_bias = None if down_bias is None else down_bias.to(dtype)
    with _no_autocast(device):
        rule = _Rule.of(weights)
        out_TD: Tensor = _Masked.apply(h_TD, weights_TE, up, down, up_bias, rule)
        if down_bias is None:
            return out_TD
        if weights_TE is None:
            return out_TD + down_bias.sum(0)
        return out_TD + weights_TE.to(out_TD.dtype) @ down_bias


def _no_autocast(device: str) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class _Rule(NamedTuple):
    """How up products become neurons: a function of the gate rows times the up rows, or of all.

    With thresholds, what does not exceed its own is zero.
    """

    function: Callable[[Tensor], Tensor]
    gated: bool
    thresholds: Thresholds | None = None

    @classmethod
    def of(cls, weights: ExpertWeights) -> _Rule:
        if weights.glu is not None:
            return cls(weights.glu, gated=False)
        return cls(activation(weights.activation), weights.gated, weights.thresholds)

    def small(self, act_CTF: Tensor, neurons_CTF: Tensor, part: slice) -> Tensor | None:
        """Where neurons of a chunk count as zero, [C, T, F] bool; none without thresholds."""
        if self.thresholds is None:
            return None
        _, neuron_EF, gate_EF = self.thresholds
        small_CTF = neurons_CTF.abs() <= neuron_EF[part].unsqueeze(1)
        if gate_EF is not None:
            small_CTF |= act_CTF.abs() <= gate_EF[part].unsqueeze(1)
        return small_CTF

    def split(self, z_ERT: Tensor, part: slice) -> tuple[Tensor, ...]:
        """Views [C, T, F] of the gate rows and up rows of a chunk, or [C, T, R] of all."""
        z_CTR = z_ERT[part].transpose(1, 2)
        return z_CTR.chunk(2, dim=-1) if self.gated else (z_CTR,)

    def backward(self, grad: Tensor, x: Tensor, *, out: Tensor) -> None:
        """Write the gradient of x, given that of function(x)."""
        if self.function in _KERNELS:
            _KERNELS[self.function](grad, x, grad_input=out)
            return
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.function(leaf)
        out.copy_(torch.autograd.grad(value, leaf, grad)[0])


def _chunks(num_experts: int, expert_size: int, device: torch.device) -> Iterator[slice]:
    """Give runs of experts, each of at least one."""
    limit = _CHUNK_CPU if device.type == "cpu" else _CHUNK
    step = max(1, limit // max(1, expert_size))
    return (slice(start, start + step) for start in range(0, num_experts, step))


class _Masked(torch.autograd.Function):
    """The products and the scaled neurons between them, with the weights [T, E] or none."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weights_TE: Tensor | None,
        up_ERD: Tensor,
        down_EDF: Tensor,
        up_bias_ER: Tensor | None,
        rule: _Rule,
    ) -> Tensor:
        (num_experts, num_rows, _), (_, dim, width) = up_ERD.shape, down_EDF.shape
        num_tokens = h_TD.shape[0]
        up_OD = up_ERD.flatten(0, 1)
        if up_bias_ER is None:
            z_OT = up_OD @ h_TD.T
        else:
            z_OT = torch.addmm(up_bias_ER.reshape(-1, 1), up_OD, h_TD.T)
        z_ERT = z_OT.view(num_experts, num_rows, num_tokens)
        scale_ET1 = None
        if weights_TE is not None:
            scale_ET1 = weights_TE.T.to(z_ERT.dtype).contiguous().unsqueeze(-1)
        ctx.save_for_backward(h_TD, z_ERT, scale_ET1, up_ERD, down_EDF)
        ctx.rule, ctx.weights_dtype = rule, None if weights_TE is None else weights_TE.dtype

        a_EFT = z_ERT.new_empty(num_experts, width, num_tokens)
        for part in _chunks(num_experts, width * num_tokens, h_TD.device):
            first_CTF, *up_CTF = rule.split(z_ERT, part)
            a_CTF = a_EFT[part].transpose(1, 2)
            act_CTF = rule.function(first_CTF)
            a_CTF.copy_(act_CTF)
            if up_CTF:
                a_CTF.mul_(up_CTF[0])
            small_CTF = rule.small(act_CTF, a_CTF, part)
            if small_CTF is not None:
                a_CTF.masked_fill_(small_CTF, 0.0)
            if scale_ET1 is not None:
                a_CTF.mul_(scale_ET1[part])
        return a_EFT.flatten(0, 1).T @ down_EDF.transpose(1, 2).reshape(-1, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast(dout_TD.device.type):
            return _gradients(ctx, dout_TD)


def _gradients(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of `_Masked`."""
    h_TD, z_ERT, scale_ET1, up_ERD, down_EDF = ctx.saved_tensors
    rule: _Rule = ctx.rule
    needs_h, needs_weights, needs_up, needs_down, needs_bias, _ = ctx.needs_input_grad
    num_experts, dim, width = down_EDF.shape
    num_tokens = h_TD.shape[0]
    dout_DT = dout_TD.T.contiguous()
    needs_z = needs_h or needs_up or needs_bias
    dz_ERT = torch.empty_like(z_ERT) if needs_z else None
    ddown_EDF = torch.empty_like(down_EDF) if needs_down else None
    dscale_ET = None
    if needs_weights:
        dscale_ET = h_TD.new_empty(num_experts, num_tokens, dtype=ctx.weights_dtype)

    for part in _chunks(num_experts, width * num_tokens, h_TD.device):
        first_CTF, *up_CTF = rule.split(z_ERT, part)
        act_CTF = rule.function(first_CTF)
        neurons_CTF = act_CTF * up_CTF[0] if up_CTF else act_CTF
        small_CTF = rule.small(act_CTF, neurons_CTF, part)
        if small_CTF is not None:
            neurons_CTF = neurons_CTF.masked_fill(small_CTF, 0.0)
        down_CFD = down_EDF[part].transpose(1, 2)
        dout_CDT = dout_DT.expand(down_CFD.shape[0], dim, num_tokens)
        da_CTF = torch.bmm(down_CFD, dout_CDT).transpose(1, 2)
        if dscale_ET is not None:
            along_CTF = da_CTF * neurons_CTF
            torch.sum(along_CTF, -1, dtype=dscale_ET.dtype, out=dscale_ET[part])
        if scale_ET1 is not None:
            da_CTF.mul_(scale_ET1[part])
        if small_CTF is not None:
            da_CTF.masked_fill_(small_CTF, 0.0)
        if ddown_EDF is not None:
            a_CTF = neurons_CTF if scale_ET1 is None else neurons_CTF * scale_ET1[part]
            torch.bmm(dout_CDT, a_CTF, out=ddown_EDF[part])
        if dz_ERT is not None:
            dfirst_CTF, *dup_CTF = rule.split(dz_ERT, part)
            if dup_CTF:
                torch.mul(da_CTF, act_CTF, out=dup_CTF[0])
                da_CTF.mul_(up_CTF[0])
            rule.backward(da_CTF, first_CTF, out=dfirst_CTF)

    dh_TD = dup_ERD = dbias_ER = None
    if dz_ERT is not None:
        dz_OT = dz_ERT.flatten(0, 1)
        if needs_h:
            dh_TD = dz_OT.T @ up_ERD.flatten(0, 1)
        if needs_up:
            dup_ERD = (dz_OT @ h_TD).view(up_ERD.shape)
        if needs_bias:
            dbias_ER = dz_ERT.sum(-1)
    dweights_TE = None if dscale_ET is None else dscale_ET.T
    return dh_TD, dweights_TE, dup_ERD, ddown_EDF, dbias_ER, None
