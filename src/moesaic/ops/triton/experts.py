"""Experts on a GPU: what is asked of the kernels, and what is said where they cannot run.

Source: SonicMoE, arXiv 2512.14080: rows are gathered as they are loaded, tokens fetch and sum their
rows without atomics, and the backward pass needs only h, the up product, the weights of the slots
and the order of the rows. Unlike its kernels these take gate rows before up rows, as transformers
lays them out, and are plain Triton, without warp specialisation. Triton is imported on first use.

Shapes: T tokens, K slots per token, E experts, D model width.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.ops.weights import ExpertWeights

# How the kernels call the activations of `moesaic.ops.weights.ACTIVATIONS`.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
# float64 is there to hold gradients to 1e-10; no GPU is fast at it.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not(h_TD: Tensor, weights: ExpertWeights) -> str | None:
    """Say in one sentence why the kernels cannot take this call, or None if they can.

    Args:
        h_TD: Inputs, [T, D].
        weights: The experts.
    """
    if importlib.util.find_spec("triton") is None:
        return 'the triton path needs triton, which is not installed; pip install "moesaic[gpu]"'
    if h_TD.device.type != "cuda" and not _interpreted():
        return (
            f"the triton path needs a cuda device, got {h_TD.device}; use another backend, or set "
            "TRITON_INTERPRET=1 before triton is imported to check it slowly on a cpu"
        )
    if weights.glu is not None or weights.activation not in _ACTIVATIONS:
        return (
            f"the triton path needs an activation of {sorted(_ACTIVATIONS)}, got "
            f"{weights.activation or 'a function'}; use the grouped path"
        )
    if weights.thresholds is not None:
        return "the triton path knows no thresholds of neurons; use the grouped path"
    tensors = [h_TD, weights.up, weights.down, weights.up_bias, weights.down_bias]
    dtypes = {_compute_dtype(x) for x in tensors if x is not None}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return (
            f"the triton path needs inputs and weights of one dtype of {list(map(str, _DTYPES))}, "
            f"got {sorted(map(str, dtypes))}; cast them"
        )
    return None


def experts_triton(
    h_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Sum the weighted outputs of each token's experts; same contract as the reference.

    Sums are in float32 whatever the dtype. What is saved for the backward pass is h, the up
    product [T * K, 2F], the slot weights and 8 bytes a slot, so with K * F fixed it does not
    grow with K. Buffers have T * K rows: an empty slot costs memory, but no time.

    Args:
        h_TD: Inputs, [T, D], in float32, bfloat16 or float16 (float64 for checks).
        ids_TK: Expert of each slot, [T, K] int64; id E (or -1) is an empty slot.
        weights_TK: Weight of each slot, [T, K]; ignored where the slot is empty.
        weights: The experts, with an activation given by name.

    Returns:
        out_TD, in the dtype of h.

    Raises:
        ImportError: If triton is not installed.
        InputError: If the device, the dtypes or the activation cannot be taken.
    """
    if problem := why_not(h_TD, weights):
        if importlib.util.find_spec("triton") is None:
            raise ImportError(problem)
        raise InputError(problem)
    from moesaic.ops.triton.autograd import apply

    # Autocast does not reach into kernels; do what it does to the linear of the other paths.
    w, dtype = weights, _compute_dtype(h_TD)
    cast = w._replace(
        up=w.up.to(dtype),
        down=w.down.to(dtype),
        activation=_ACTIVATIONS[w.activation],
        up_bias=None if w.up_bias is None else w.up_bias.to(dtype),
        down_bias=None if w.down_bias is None else w.down_bias.to(dtype),
    )
    return apply(h_TD.to(dtype), ids_TK, weights_TK, cast, out_dtype=h_TD.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype x is multiplied in: its own, or that of autocast."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
