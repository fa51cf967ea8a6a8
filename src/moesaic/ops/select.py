"""Which path computes the experts: chosen once per call, by rule, and forcible.

Shapes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.ops.grouped import experts_grouped
from moesaic.ops.masked import experts_masked
from moesaic.ops.reference import experts_reference
from moesaic.ops.weights import ExpertWeights

Backend = Literal["auto", "reference", "masked", "grouped", "native", "triton"]

logger = logging.getLogger(__name__)
_said: set[str] = set()

# Grouped products of narrower experts lose to the masked path in torch: their gather and scatter
# move more bytes than the skipped neurons cost.
_MIN_WIDTH = 128
_FEW_TOKENS = 4


def choose(
    num_tokens: int,
    num_slots: int,
    weights: ExpertWeights,
    *,
    training: bool,
    native: bool = False,
) -> Backend:
    """Choose a path; says which and why once per reason, at level INFO.

    Args:
        num_tokens: T of this call.
        num_slots: K of this call; K = E means that the router decides on every expert.
        weights: The experts.
        training: Whether gradients are wanted and every slot holds an expert, so that the output
            of each is needed, also at weight zero.
        native: Whether the weights are packed for native code and no gradient is wanted.
        triton: Whether the Triton kernels can run the call.

    Returns:
        `native` where it can be; `masked` where every expert's output is needed or skipping would
        cost more than it saves; else `grouped`. Never `triton`, which is for whoever asks for it
        until a GPU has timed it.
    """
    if native:
        return _say("native", "they are packed and need no gradient")
    if training and num_slots == weights.num_experts:
        return _say("masked", "the router learns from every expert's output")
    if num_slots == weights.num_experts and weights.width < _MIN_WIDTH and num_tokens > _FEW_TOKENS:
        return _say("masked", f"experts of {weights.width} neurons are too narrow to gather")
    return _say("grouped", "only chosen experts are computed")


def _say(backend: Backend, why: str) -> Backend:
    say_once(f"experts run on the {backend} path: {why}")
    return backend


def say_once(message: str) -> None:
    """Log a message at level INFO, the first time that it is given."""
    # A graph being made cannot log.
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        logger.info("%s", message)


def apply_experts(
    h_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    weights: ExpertWeights,
    backend: Backend = "auto",
) -> Tensor:
    """Compute `experts_reference` on the chosen path; same arguments, same result."""
    if backend == "auto":
        grad = torch.is_grad_enabled() and (weights_TK.requires_grad or h_TD.requires_grad)
        backend = choose(
            h_TD.shape[0],
            ids_TK.shape[1],
            weights,
            training=grad and _holds_all(ids_TK, weights.num_experts),
            native=not grad and _runs_native(h_TD, weights),
        )
    if backend == "native":
        if weights.packed is None:
            raise InputError(
                "backend 'native' needs packed weights; see moesaic.inference.pack_experts"
            )
        return weights.packed(h_TD, ids_TK, weights_TK, weights)
    h_TD = weights.cut_inputs(h_TD)
    if backend == "triton":
        return _experts_triton()(h_TD, ids_TK, weights_TK, weights)
    if backend == "masked":
        return experts_masked(h_TD, spread(ids_TK, weights_TK, weights.num_experts), weights)
    function = experts_reference if backend == "reference" else experts_grouped
    return function(h_TD, ids_TK, weights_TK, weights)


def _experts_triton() -> Callable[..., Tensor]:
    # Imported by name: the code beside a checkpoint must load where triton is not installed.
    function: Callable[..., Tensor] = importlib.import_module("moesaic.ops.triton").experts_triton
    return function


def _runs_native(h_TD: Tensor, weights: ExpertWeights) -> bool:
    if weights.packed is None or h_TD.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and (weights.up.requires_grad or weights.down.requires_grad):
        say_once("packed weights give no gradient and stay unused; call under torch.no_grad()")
        return False
    if not weights.packed.is_copy_of(weights):
        say_once("the weights changed since they were packed, so the copy stays unused; pack again")
        return False
    return True


def _holds_all(ids_TK: Tensor, num_experts: int) -> bool:
    """Whether no slot is empty."""
    if ids_TK.stride(0) == 0:
        # One row for all tokens leaves nothing to skip, and a GPU is not waited for.
        return True
    return bool(((ids_TK >= 0) & (ids_TK < num_experts)).all())


def spread(ids_TK: Tensor, values_TK: Tensor, num_experts: int) -> Tensor:
    """Spread slots over experts: [T, K] to [T, E], zero where no slot holds the expert."""
    # Empty slots (E or -1) land in an extra column, which is cut off.
    column_TK = torch.where(ids_TK < 0, num_experts, ids_TK)
    out = values_TK.new_zeros(ids_TK.shape[0], num_experts + 1)
    return out.scatter_add(1, column_TK, values_TK)[:, :num_experts]
