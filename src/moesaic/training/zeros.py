"""Weights that pruning set to zero stay zero while the rest trains.

The mask is taken once, before the first step: where a matrix of experts is exactly zero. Its
gradient is then zero there too, so AdamW, which has no weight decay here, keeps moments of zero and
moves nothing. A resumed training starts from the same model and takes the same mask.

Only matrices count: routers and biases often start at zero and have to move. And only where more
than one weight in a hundred of a layer's part is zero: dequantised matrices hold a few zeros that
nobody pruned.

Shapes: E experts, F width of one expert, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from moesaic._hooks import hooked
from moesaic.nn.experts._base import STRAY_ZEROS
from moesaic.nn.layer import moe_layers


def pruned_zeros(model: nn.Module) -> list[nn.Parameter]:
    """Matrices of experts that hold weights which were pruned.

    Args:
        model: A model with MoE layers.

    Returns:
        Parameters [E, ..., ...] of the routed experts and shared parts in which more than one
        weight in a hundred is zero; none where the conversion put zeros there to train.
    """
    found: list[nn.Parameter] = []
    moesaic = getattr(getattr(model, "config", None), "moesaic", None) or {}
    if moesaic.get("zeros_train"):
        return found
    for layer in moe_layers(model):
        for part in (layer.experts, layer.shared):
            if part is None:
                continue
            matrices = [p for p in part.parameters() if p.dim() == 3]
            total = sum(p.numel() for p in matrices)
            used = sum(int(p.count_nonzero()) for p in matrices)
            if total - used > STRAY_ZEROS * total:
                found += matrices
    return found


@contextmanager
def zeros_kept(model: nn.Module) -> Iterator[None]:
    """Give pruned weights of parameters that train no gradient while the block lasts.

    Args:
        model: The model as it is before its first step; one byte is held for each weight of a
            masked matrix.
    """
    handles = [
        parameter.register_post_accumulate_grad_hook(partial(_mask, parameter.detach() == 0))
        for parameter in pruned_zeros(model)
        if parameter.requires_grad
    ]
    with hooked(handles):
        yield


def _mask(zero: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.masked_fill_(zero, 0.0)
