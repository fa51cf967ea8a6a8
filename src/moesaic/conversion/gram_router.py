"""Fit a DSMoE router to the Grams of block outputs, without running the model.

Ours. With block outputs o_i and y = sum o_i, replacing y by sum w_i o_i leaves the error
(w - 1)^T G (w - 1) with G_ij = <o_i, o_j>: an E x E matrix per token, computed once. The router
then trains on G alone, in seconds: with the other gates as they are, block i on saves
b_i = G_ii + 2 sum over the blocks j that are off of G_ij, and gates earn what their block saves
less a price. Price and shift of the scores are set at every step so that the requested fraction
is on. The straight-through gradient would leave G_ii out of what an open gate saves: it lets the
error grow from where the fit starts. Inputs are whitened, because a few directions of them carry
most of their variance.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.calibration.collectors import block_outputs
from moesaic.nn.experts._base import Experts
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold

# Active fractions at which a fitted router is measured.
FRACTIONS = tuple(round(0.05 * step, 2) for step in range(2, 21))
# Floats of all Grams of a layer: bounds them to 256 MB.
_MAX_GRAM = 1 << 26
_CHUNK = 256
_BATCH = 512
_LEARNING_RATE = 3e-3
# Part of the tokens that sets the final shift and measures the fit.
_HELD = 0.25


@dataclass(frozen=True, slots=True)
class RouterFit:
    """How a fitted router does on tokens that it was not trained on.

    Attributes:
        active: Mean active fraction of experts.
        shifts: What to take from the bias for each of `FRACTIONS` to be on.
        errors: Relative squared error of the layer's output there.
    """

    active: float
    shifts: tuple[float, ...]
    errors: tuple[float, ...]

    def error(self) -> float:
        """Error at the fraction that the router was fitted to."""
        return float(np.interp(self.active, FRACTIONS, self.errors))


@torch.no_grad()
def token_grams(h_TD: Tensor, experts: Experts) -> Tensor:
    """Gram matrix of the block outputs of every token, scaled, [T, E, E].

    A token counts by the length of its output, where the plain error counts by its square: with
    that, the few tokens of massive activations would be all that a router learns. A token quieter
    than the median counts by its square.
    """
    weights = experts.weights()
    grams = []
    for h in h_TD.split(_CHUNK):
        o_TED = block_outputs(h.to(weights.up.dtype), weights)
        grams.append(torch.bmm(o_TED, o_TED.transpose(1, 2)))
    gram_TEE = torch.cat(grams)
    energy_T = gram_TEE.sum((1, 2))
    median = energy_T.median().clamp(min=torch.finfo(energy_T.dtype).tiny)
    scale_T = (energy_T.clamp(min=median) * median).sqrt()
    return gram_TEE.div_(scale_T[:, None, None])


def fit_router(
    router: SigmoidThreshold,
    experts: Experts,
    h_TD: Tensor,
    active: float,
    *,
    steps: int,
    seed: int,
) -> RouterFit:
    """Train a layer's router, in place, to lose least at an active fraction.

    Args:
        router: Its weight and bias are written.
        experts: The blocks it gates.
        h_TD: Inputs of the layer, [T, D]; as many as 256 MB of Grams allow are used.
        active: Fraction of gates to be on, in (0, 1).
        steps: Adam steps of 512 tokens.
        seed: Of the batches.

    Returns:
        The fit on tokens held out of it.
    """
    assert router.bias is not None
    num_experts = router.num_experts
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(h_TD.shape[0], generator=generator)[: _MAX_GRAM // num_experts**2]
    h_TD = h_TD[order].float()
    num_train = max(1, int(len(order) * (1 - _HELD)))
    gram_TEE = token_grams(h_TD, experts)

    mean_D, whiten_DD = _whitening(h_TD[:num_train])
    x_TD = (h_TD - mean_D) @ whiten_DD
    weight_ED, bias_E = _first_guess(x_TD[:num_train], gram_TEE[:num_train])
    weight_ED.requires_grad_()
    bias_E.requires_grad_()
    optimizer = torch.optim.Adam([weight_ED, bias_E], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        batch = torch.randint(num_train, (min(_BATCH, num_train),), generator=generator)
        scores_TE = x_TD[batch] @ weight_ED.T + bias_E
        scores_TE = scores_TE - _shift(scores_TE.detach(), active, router.threshold)
        gates_TE = scores_TE.sigmoid()
        saved_TE = _savings(gram_TEE[batch], gates_TE > router.threshold)
        price = _cut(saved_TE, active)
        optimizer.zero_grad()
        ((price - saved_TE) * gates_TE).sum(1).mean().backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        held = slice(num_train, None) if num_train < len(order) else slice(None)
        held_TE = x_TD[held] @ weight_ED.T + bias_E
        shift = _shift(held_TE, active, router.threshold)
        folded_ED = weight_ED @ whiten_DD
        router.weight.copy_(folded_ED)
        router.bias.copy_(bias_E - shift - folded_ED @ mean_D)
        return _measure(router, held_TE - shift, gram_TEE[held])


def _measure(router: SigmoidThreshold, scores_TE: Tensor, gram_TEE: Tensor) -> RouterFit:
    """Measure a router at its own bias and moved to every fraction."""
    shifts = [_shift(scores_TE, fraction, router.threshold) for fraction in FRACTIONS]
    errors = [
        float(gram_error(gram_TEE, router.decide(scores_TE - shift).weights_TE()))
        for shift in shifts
    ]
    active = float(router.decide(scores_TE).active_TE().float().mean())
    return RouterFit(active, tuple(shifts), tuple(errors))


def gram_error(gram_TEE: Tensor, weights_TE: Tensor) -> Tensor:
    """Mean over tokens of (w - 1)^T G (w - 1)."""
    gap_TE = weights_TE - 1
    product_TE = torch.bmm(gram_TEE, gap_TE.unsqueeze(2)).squeeze(2)
    return (product_TE * gap_TE).sum(1).mean()


@torch.no_grad()
def _savings(gram_TEE: Tensor, on_TE: Tensor) -> Tensor:
    """How much lower the error is with a block on than off, the others as they are, [T, E]."""
    off_TE = (~on_TE).to(gram_TEE.dtype)
    own_TE = torch.diagonal(gram_TEE, dim1=1, dim2=2)
    with_off_TE = torch.bmm(gram_TEE, off_TE.unsqueeze(2)).squeeze(2) - own_TE * off_TE
    return own_TE + 2 * with_off_TE


def _whitening(h_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and symmetric whitening matrix of the inputs; flat directions are left small."""
    mean_D = h_TD.mean(0)
    centred_TD = h_TD - mean_D
    values_D, vectors_DD = torch.linalg.eigh(centred_TD.T @ centred_TD / len(h_TD))
    values_D = values_D.clamp(min=0) + 1e-2 * values_D.mean() + 1e-12
    return mean_D, (vectors_DD * values_D.rsqrt()) @ vectors_DD.T


def _first_guess(x_TD: Tensor, gram_TEE: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of the log energy of each block's output, at the scale of gate logits."""
    energy_TE = torch.diagonal(gram_TEE, dim1=1, dim2=2)
    target_TE = torch.log(energy_TE + 1e-6)
    target_TE = (target_TE - target_TE.mean()) * (2.0 / (target_TE.std() + 1e-6))
    bias_E = target_TE.mean(0)
    cov_DD = x_TD.T @ x_TD / len(x_TD) + 0.1 * torch.eye(x_TD.shape[1])
    slope_DE = x_TD.T @ (target_TE - bias_E) / len(x_TD)
    return torch.linalg.solve(cov_DD, slope_DE).T.contiguous(), bias_E.clone()


def _shift(scores_TE: Tensor, active: float, threshold: float) -> float:
    """What to take from all scores so that a fraction `active` of gates exceeds the threshold."""
    return _cut(scores_TE, active) - math.log(threshold / (1 - threshold))


def _cut(values_TE: Tensor, active: float) -> float:
    """The value that a fraction `active` of all exceeds."""
    # kthvalue, since quantile refuses large inputs.
    rank = round((1 - active) * values_TE.numel())
    if rank < 1:
        return float(values_TE.min()) - 1.0
    return float(values_TE.flatten().kthvalue(rank).values)
