"""Only the experts that were chosen: slots sorted by expert, one grouped product per matrix.

Shapes: T tokens, K slots per token, N slots that hold an expert, E experts, F width of one
expert, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.ops.weights import ExpertWeights

# Rows gathered at a time: bounds the memory of a long prefill to a few of these rows of D floats.
_MAX_ROWS = 32768


def experts_grouped(
    h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Sum the weighted outputs of each token's experts; same contract as the reference."""
    num_experts = weights.num_experts
    # A sum over slots in bfloat16 would round once per slot.
    sum_dtype = torch.promote_types(h_TD.dtype, torch.float32)
    tokens_at_a_time = max(1, _MAX_ROWS // max(1, ids_TK.shape[1]))
    pieces = []
    for h, ids, slot_weights in zip(
        h_TD.split(tokens_at_a_time),
        ids_TK.split(tokens_at_a_time),
        weights_TK.split(tokens_at_a_time),
        strict=True,
    ):
        used_TK = (ids >= 0) & (ids < num_experts)
        token_N, slot_N = used_TK.nonzero(as_tuple=True)
        expert_N, order_N = ids[token_N, slot_N].sort(stable=True)
        token_N, slot_N = token_N[order_N], slot_N[order_N]
        y_ND = _apply_sorted(h[token_N], expert_N, weights)
        y_ND = y_ND.to(sum_dtype) * slot_weights[token_N, slot_N, None].to(sum_dtype)
        out = torch.zeros_like(h, dtype=sum_dtype).index_add(0, token_N, y_ND)
        pieces.append(out.to(h.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _apply_sorted(x_ND: Tensor, expert_N: Tensor, weights: ExpertWeights) -> Tensor:
    """Apply each row's expert; rows are sorted by expert."""
    if x_ND.shape[0] == 0:
        return x_ND
    counts_E = torch.bincount(expert_N, minlength=weights.num_experts)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    z_NM = _grouped_mm(x_ND, weights.up, ends_E)
    z_NM = _add_bias(z_NM, weights.up_bias, expert_N)
    y_ND = _grouped_mm(weights.activate(z_NM, expert_N), weights.down, ends_E)
    return _add_bias(y_ND, weights.down_bias, expert_N)


def _add_bias(x_NO: Tensor, bias_EO: Tensor | None, expert_N: Tensor) -> Tensor:
    if bias_EO is None:
        return x_NO
    # Its gradient is a sum over all rows of an expert, which bfloat16 cannot hold.
    wide_EO = bias_EO.to(torch.promote_types(x_NO.dtype, torch.float32))
    return x_NO + wide_EO[expert_N].to(x_NO.dtype)


def _grouped_mm(x_NI: Tensor, w_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows that end at `ends_E` by their expert's matrix."""
    device = x_NI.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Autocast does not know grouped_mm; do what it does to the linear of the other paths.
        dtype = torch.get_autocast_dtype(device)
        x_NI, w_EOI = x_NI.to(dtype), w_EOI.to(dtype)
    # grouped_mm has no float64, which gradient checks need, and wants rows of whole 16 bytes.
    aligned = all(size * w_EOI.itemsize % 16 == 0 for size in w_EOI.shape[1:])
    if aligned and x_NI.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return F.grouped_mm(x_NI, w_EOI.transpose(1, 2), offs=ends_E)
    ends = ends_E.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([x_NI[a:b] @ w.T for a, b, w in zip(starts, ends, w_EOI, strict=True)])
