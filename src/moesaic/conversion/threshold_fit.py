"""Place the thresholds of a layer's gates and neurons: what adds little counts as zero.

Ours. A neuron adds its magnitude times the length of its column of the down product; one threshold
on that for all neurons of a layer keeps the asked-for part of those in blocks that are on. A gate
is judged before the up product is known, by what its neuron would add at the root mean square of
that product.

Shapes: B tokens, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from moesaic.conversion.gram_router import cut
from moesaic.nn.experts.thresholded import Thresholded
from moesaic.ops.weights import activation

# Neurons times tokens that are looked at: bounds what exists of them to 12 MB.
_MAX_NEURONS = 3 << 20
_TINY = 1e-30


@torch.no_grad()
def fit_thresholds(
    experts: Thresholded, h_TD: Tensor, tokens_B: Tensor, weights_BE: Tensor
) -> None:
    """Write the thresholds that keep what the experts are set for (`Thresholded.kept`).

    Args:
        experts: Their thresholds are zero, and are written.
        h_TD: Inputs of the layer, [T, D].
        tokens_B: Which of them to fit to, [B] int64.
        weights_BE: Weight of every block for these, [B, E]; zero where it is off.
    """
    kept = experts.kept
    most = max(1, _MAX_NEURONS // (experts.num_experts * experts.width))
    h_BD, on_BE = h_TD[tokens_B[:most]], weights_BE[:most] != 0
    if not bool(on_BE.any()):
        return
    inputs = 0.0 if kept.inputs == 1.0 else _threshold(h_BD.abs(), kept.inputs)
    experts.set_thresholds(inputs, 0.0)
    weights = experts.weights()
    x_BD = weights.cut_inputs(h_BD).to(weights.up.dtype)
    bias = None if weights.up_bias is None else weights.up_bias.flatten()
    z_BM = nnf.linear(x_BD, weights.up.flatten(0, 1), bias)
    z_BER = z_BM.unflatten(1, (weights.num_experts, -1))
    length_EF = weights.down.float().norm(dim=1).clamp(min=_TINY)

    gates_EF: Tensor | float = 0.0
    if kept.gates < 1.0:
        gate_BEF, up_BEF = z_BER.float().chunk(2, dim=2)
        worth_EF = length_EF * up_BEF.square().mean(0).sqrt().clamp(min=_TINY)
        promised_BEF = activation(weights.activation)(gate_BEF).abs() * worth_EF
        gates_EF = _threshold(promised_BEF[on_BE], kept.gates) / worth_EF
        experts.set_thresholds(inputs, 0.0, gates_EF)
    if kept.neurons < 1.0:
        adds_BEF = experts.weights().activate(z_BER).float().abs() * length_EF
        neurons_EF = _threshold(adds_BEF[on_BE], kept.neurons) / length_EF
        experts.set_thresholds(inputs, neurons_EF, gates_EF)


def _threshold(values: Tensor, kept: float) -> float:
    return max(0.0, cut(values, kept))
