"""Calls of the native code on tensors: what it would misread is refused or converted here.

Shapes: T tokens, K slots per token, D model width, I inputs, O outputs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.ops.cpu import library, structs

# What native code reads and writes as it is.
_DIRECT = (torch.float32, torch.bfloat16)


def run_linear(struct: structs.Linear, x_TI: Tensor) -> Tensor:
    """Map [T, I] to [T, O] in float32; O is padded."""
    x_TI = _rows(x_TI, struct.inputs).float()
    out_TO = torch.empty(x_TI.shape[0], struct.outputs)
    library.call(
        "moesaic_linear",
        ctypes.byref(struct),
        x_TI.data_ptr(),
        x_TI.shape[0],
        out_TO.data_ptr(),
    )
    return out_TO


def run_experts(
    struct: structs.Experts, h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Sum the weighted outputs of each token's experts, [T, D] in the dtype of h_TD."""
    x_TD = _rows(h_TD, struct.inputs)
    num_tokens, num_slots = ids_TK.shape
    if len(x_TD) != num_tokens or weights_TK.shape != ids_TK.shape:
        raise InputError(
            f"ids and weights must be [T={len(x_TD)}, K], got {tuple(ids_TK.shape)} and "
            f"{tuple(weights_TK.shape)}"
        )
    ids_TK = on_cpu(ids_TK).to(torch.int64).contiguous()
    weights_TK = on_cpu(weights_TK).float().contiguous()
    out_TD = torch.empty_like(x_TD)
    failed = library.library().moesaic_experts(
        ctypes.byref(struct),
        x_TD.data_ptr(),
        x_TD.dtype is torch.bfloat16,
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        num_tokens,
        num_slots,
        out_TD.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise library.out_of_memory("moesaic_experts")
    return out_TD if x_TD.dtype is h_TD.dtype else out_TD.to(h_TD.dtype)


def run_layer(function: Any, struct: Any, width: int, h: Tensor) -> Tensor:
    """Route tokens and apply a whole layer.

    The memory of one token's experts passes through the caches between two calls, so every object
    that Python touches here is fetched anew: there are few of them.

    Args:
        function: `moesaic_layer` of the library.
        struct: Reference to a `structs.Ffn`.
        width: D.
        h: Inputs on the CPU, [..., D].

    Returns:
        Outputs, in the shape and dtype of h.
    """
    x = (h if h.dtype in _DIRECT else h.float()).contiguous()
    out = torch.empty_like(x)
    failed = function(
        struct,
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        x.numel() // width,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise library.out_of_memory("moesaic_layer")
    return out if out.dtype is h.dtype else out.to(h.dtype)


def on_cpu(x: Tensor) -> Tensor:
    """Refuse what native code cannot address."""
    if not x.is_cpu:
        raise InputError(f"native code needs tensors on the CPU, got one on {x.device}; move it")
    return x


def _rows(x: Tensor, width: int) -> Tensor:
    """Rows as native code reads them, which checks nothing itself."""
    if x.dim() != 2 or x.shape[1] != width:
        raise InputError(f"native code needs inputs of shape [T, {width}], got {tuple(x.shape)}")
    x = on_cpu(x)
    return (x if x.dtype in _DIRECT else x.float()).contiguous()
