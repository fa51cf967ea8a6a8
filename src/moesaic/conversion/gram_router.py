"""Fit a DSMoE router to the Grams of block outputs, without running the model.

Ours. With block outputs o_i and y = sum o_i, replacing y by sum w_i o_i leaves the error
(w - 1)^T G (w - 1) with G_ij = <o_i, o_j>. With the other gates as they are, block i on saves
b_i = G_ii + 2 sum over the blocks j that are off of G_ij, and gates earn what their block saves
less a price. Price and shift of the scores are set at every step so that the requested fraction
is on. The straight-through gradient would leave G_ii out of what an open gate saves: it lets the
error grow from where the fit starts. Inputs are whitened, because a few directions of them carry
most of their variance.

The E x E matrix of a token is never formed: sum over the off blocks j of G_ij is <o_i, r> with r
what the off blocks add up to, and one product with the down matrix gives it for all i. Blocks may
be as small as one neuron.

Shapes: T tokens, B tokens of a batch, D model width, E experts, F width of one expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.calibration.collectors import block_neurons
from moesaic.nn.experts._base import Experts
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold

# Active fractions at which a fitted router is measured.
FRACTIONS = tuple(round(0.05 * step, 2) for step in range(2, 21))
# Floats of the neurons of all tokens: bounds them to 512 MB.
_MAX_NEURONS = 1 << 27
# Floats of the block outputs of a few tokens.
_MAX_OUTPUTS = 1 << 24
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


class BlockErrors:
    """What blocks add to the output of a layer, and what is lost when some are off.

    A token counts by the length of its output, where the plain error counts by its square: with
    that, the few tokens of massive activations would be all that a router learns. A token quieter
    than the median counts by its square.

    Args:
        h_TD: Inputs of the layer, [T, D].
        experts: Its blocks.

    Attributes:
        own_TE: Squared length of every block's output, scaled, [T, E].
    """

    @torch.no_grad()
    def __init__(self, h_TD: Tensor, experts: Experts) -> None:
        weights = experts.weights()
        self.down_EFD = weights.down.float().transpose(1, 2).contiguous()
        self.bias_ED = None if weights.down_bias is None else weights.down_bias.float()
        num_experts, _, dim = self.down_EFD.shape
        neurons, own, energy = [], [], []
        for h_BD in h_TD.split(max(1, _MAX_OUTPUTS // (num_experts * dim))):
            a_BEF = block_neurons(h_BD.to(weights.up.dtype), weights)
            o_BED = self._outputs(a_BEF)
            neurons.append(a_BEF.flatten(1))
            own.append(o_BED.square().sum(2))
            energy.append(o_BED.sum(1).square().sum(1))
        self._a_TM = torch.cat(neurons)
        energy_T = torch.cat(energy)
        self._scale_T1 = token_scale(energy_T)
        self.own_TE = torch.cat(own) * self._scale_T1

    def _outputs(self, a_BEF: Tensor) -> Tensor:
        o_BED = torch.einsum("bef,efd->bed", a_BEF, self.down_EFD)
        return o_BED if self.bias_ED is None else o_BED + self.bias_ED

    def missing(self, tokens_B: Tensor, weights_BE: Tensor) -> Tensor:
        """What the weights leave out of the output, [B, D], unscaled."""
        gap_BE = 1 - weights_BE
        width = self.down_EFD.shape[1]
        a_BM = self._a_TM[tokens_B] * gap_BE.repeat_interleave(width, dim=1)
        r_BD = a_BM @ self.down_EFD.flatten(0, 1)
        return r_BD if self.bias_ED is None else r_BD + gap_BE @ self.bias_ED

    @torch.no_grad()
    def error(self, tokens_B: Tensor, weights_BE: Tensor) -> float:
        """Mean over some tokens of the scaled squared error that the weights leave.

        Args:
            tokens_B: Which tokens, [B] int64.
            weights_BE: Weight of every block, [B, E].
        """
        total = 0.0
        for tokens, weights in zip(tokens_B.split(_BATCH), weights_BE.split(_BATCH), strict=True):
            r_BD = self.missing(tokens, weights)
            total += float((r_BD.square().sum(1) * self._scale_T1[tokens, 0]).sum())
        return total / len(tokens_B)

    @torch.no_grad()
    def savings(self, tokens_B: Tensor, on_BE: Tensor) -> Tensor:
        """How much lower the error is with a block on than off, the others as they are, [B, E].

        Args:
            tokens_B: Which tokens, [B] int64.
            on_BE: Which blocks are on, [B, E] bool.
        """
        r_BD = self.missing(tokens_B, on_BE.to(self.down_EFD.dtype))
        along_BM = self._a_TM[tokens_B] * (r_BD @ self.down_EFD.flatten(0, 1).T)
        along_BE = along_BM.unflatten(1, (on_BE.shape[1], -1)).sum(2)
        if self.bias_ED is not None:
            along_BE = along_BE + r_BD @ self.bias_ED.T
        # What is missing contains the block itself where it is off.
        own_BE = self.own_TE[tokens_B]
        saved_BE: Tensor = 2 * along_BE * self._scale_T1[tokens_B]
        return saved_BE + torch.where(on_BE, own_BE, -own_BE)


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
        h_TD: Inputs of the layer, [T, D]; as many as 512 MB of neurons allow are used.
        active: Fraction of gates to be on, in (0, 1).
        steps: Adam steps of 512 tokens.
        seed: Of the batches.

    Returns:
        The fit on tokens held out of it.
    """
    assert router.bias is not None
    num_neurons = router.num_experts * experts.width
    generator = torch.Generator().manual_seed(seed)
    order, num_train = shuffled_tokens(h_TD.shape[0], num_neurons, generator)
    h_TD = h_TD[order].float()
    errors = BlockErrors(h_TD, experts)

    mean_D, whiten_DD = whitening(h_TD[:num_train])
    x_TD = (h_TD - mean_D) @ whiten_DD
    weight_ED, bias_E = _first_guess(x_TD[:num_train], errors.own_TE[:num_train])
    weight_ED.requires_grad_()
    bias_E.requires_grad_()
    optimizer = torch.optim.Adam([weight_ED, bias_E], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        tokens_B = torch.randint(num_train, (min(_BATCH, num_train),), generator=generator)
        scores_BE = x_TD[tokens_B] @ weight_ED.T + bias_E
        scores_BE = scores_BE - _shift(scores_BE.detach(), active, router.threshold)
        gates_BE = scores_BE.sigmoid()
        saved_BE = errors.savings(tokens_B, gates_BE > router.threshold)
        price = cut(saved_BE, active)
        optimizer.zero_grad()
        ((price - saved_BE) * gates_BE).sum(1).mean().backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        tokens_B = torch.arange(num_train if num_train < len(order) else 0, len(order))
        held_BE = x_TD[tokens_B] @ weight_ED.T + bias_E
        shift = _shift(held_BE, active, router.threshold)
        folded_ED = weight_ED @ whiten_DD
        router.weight.copy_(folded_ED)
        router.bias.copy_(bias_E - shift - folded_ED @ mean_D)
        return _measure(router, held_BE - shift, errors, tokens_B)


def _measure(
    router: SigmoidThreshold, scores_BE: Tensor, errors: BlockErrors, tokens_B: Tensor
) -> RouterFit:
    """Measure a router at its own bias and moved to every fraction."""
    shifts = [_shift(scores_BE, fraction, router.threshold) for fraction in FRACTIONS]
    measured = [
        errors.error(tokens_B, router.decide(scores_BE - shift).weights_TE()) for shift in shifts
    ]
    active = float(router.decide(scores_BE).active_TE().float().mean())
    return RouterFit(active, tuple(shifts), tuple(measured))


def shuffled_tokens(
    num_tokens: int, num_neurons: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Choose the tokens of a fit, as many as 512 MB of neurons allow.

    Whatever is fitted to a layer with one seed trains on the same tokens and leaves the same ones
    to measure on.

    Returns:
        Their numbers, and how many of them, from the front, are to train on.
    """
    order_T = torch.randperm(num_tokens, generator=generator)[: _MAX_NEURONS // num_neurons]
    return order_T, max(1, int(len(order_T) * (1 - _HELD)))


def token_scale(energy_T: Tensor) -> Tensor:
    """What the squared error of each token is multiplied with, [T, 1]; see `BlockErrors`."""
    median = energy_T.median().clamp(min=torch.finfo(energy_T.dtype).tiny)
    return (energy_T.clamp(min=median) * median).rsqrt().unsqueeze(1)


def whitening(h_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and symmetric whitening matrix of the inputs; flat directions are left small."""
    mean_D = h_TD.mean(0)
    centred_TD = h_TD - mean_D
    values_D, vectors_DD = torch.linalg.eigh(centred_TD.T @ centred_TD / len(h_TD))
    values_D = values_D.clamp(min=0) + 1e-2 * values_D.mean() + 1e-12
    return mean_D, (vectors_DD * values_D.rsqrt()) @ vectors_DD.T


def _first_guess(x_TD: Tensor, energy_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of the log energy of each block's output, at the scale of gate logits."""
    target_TE = torch.log(energy_TE + 1e-6)
    target_TE = (target_TE - target_TE.mean()) * (2.0 / (target_TE.std() + 1e-6))
    bias_E = target_TE.mean(0)
    cov_DD = x_TD.T @ x_TD / len(x_TD) + 0.1 * torch.eye(x_TD.shape[1])
    slope_DE = x_TD.T @ (target_TE - bias_E) / len(x_TD)
    return torch.linalg.solve(cov_DD, slope_DE).T.contiguous(), bias_E.clone()


def _shift(scores_TE: Tensor, active: float, threshold: float) -> float:
    """What to take from all scores so that a fraction `active` of gates exceeds the threshold."""
    return cut(scores_TE, active) - math.log(threshold / (1 - threshold))


def cut(values_TE: Tensor, active: float) -> float:
    """The value that a fraction `active` of all exceeds."""
    # kthvalue, since quantile refuses large inputs.
    rank = round((1 - active) * values_TE.numel())
    if rank < 1:
        return float(values_TE.min()) - 1.0
    return float(values_TE.flatten().kthvalue(rank).values)
