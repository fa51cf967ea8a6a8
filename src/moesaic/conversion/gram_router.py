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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moesaic.calibration.collectors import block_neurons, block_outputs
from moesaic.nn.experts._base import Experts
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold
from moesaic.ops.weights import ExpertWeights

# Active fractions at which a fitted router is measured.
FRACTIONS = tuple(round(0.05 * step, 2) for step in range(2, 21))
# Floats of the neurons of all tokens: bounds them to 512 MB.
_MAX_NEURONS = 1 << 27
_BATCH = 512
_LEARNING_RATE = 3e-3
# Part of the tokens, and at most so many, that set the final shift and measure the fit.
_HELD = 0.25
_MOST_HELD = 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens to fit a layer to, shuffled; a quarter, at most 1,024, is for measuring.

    Attributes:
        h_TD: Inputs of the layer, [T, D] float32.
        num_train: How many of them, from the first, may be trained on.
    """

    h_TD: Tensor
    num_train: int

    @classmethod
    def draw(cls, h_TD: Tensor, num_neurons: int, seed: int) -> Sample:
        """Draw as many tokens as 512 MB of neurons allow.

        Whatever is fitted to a layer with one seed trains on the same tokens and leaves the same
        ones to measure on.

        Args:
            h_TD: Inputs of the layer, [T, D].
            num_neurons: Of the layer.
            seed: Of the order.
        """
        most = _MAX_NEURONS // num_neurons
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(h_TD.shape[0], generator=generator)[:most]
        num_train = max(1, int(len(order) * (1 - _HELD)))
        return cls(h_TD[order[: num_train + _MOST_HELD]].float(), num_train)

    @property
    def held_B(self) -> Tensor:
        """Tokens that nothing was fitted to; all if there is but one."""
        total = len(self.h_TD)
        return torch.arange(self.num_train if self.num_train < total else 0, total)


class BlockErrors:
    """What blocks add to the output of a layer, and what is lost when some are off.

    A token counts by the length of its output, where the plain error counts by its square: with
    that, the few tokens of massive activations would be all that a router learns. A token quieter
    than the median counts by its square.

    Args:
        h_TD: Inputs of the layer, [T, D].
        experts: Its blocks.
        shared: What is always on beside them; an error counts by what all give together.
        rounded: Whether products may round what they multiply to bfloat16: some 1e-5 of a squared
            error, at twice the speed where a processor does it (`rounds`).

    Attributes:
        scale_T1: What a squared error counts, [T, 1].
        down_MD: Down product of the M neurons of all blocks, [M, D].
    """

    @torch.no_grad()
    def __init__(
        self,
        h_TD: Tensor,
        experts: Experts,
        *,
        shared: Experts | None = None,
        rounded: bool = False,
    ) -> None:
        self._rounded = rounded
        weights = experts.weights()
        self.down_MD = weights.down.float().transpose(1, 2).flatten(0, 1)
        self.bias_ED = None if weights.down_bias is None else weights.down_bias.float()
        self._a_TEF = self._neurons(h_TD, weights)
        parts = self._a_TEF.flatten(1).split(_BATCH)
        outputs = [self.product(a_BM, self.down_MD) for a_BM in parts]
        # What all blocks give together, whatever becomes of them.
        self._y_TD = torch.cat(outputs)
        if self.bias_ED is not None:
            self._y_TD += self.bias_ED.sum(0)
        whole_TD = self._y_TD
        if shared is not None:
            part = shared.weights()
            pieces = h_TD.to(part.up.dtype).split(_BATCH)
            whole_TD = whole_TD + torch.cat([block_outputs(h, part).sum(1) for h in pieces])
        self.scale_T1 = token_scale(whole_TD.square().sum(1))

    @cached_property
    @torch.no_grad()
    def own_TE(self) -> Tensor:
        """Squared length of each block's output, scaled, [T, E], as it is when first asked."""
        down_EFD = self.down_MD.view(*self._a_TEF.shape[1:], -1)
        gram_EFF = torch.bmm(down_EFD, down_EFD.transpose(1, 2))
        own = []
        for a_BEF in self._a_TEF.split(_BATCH):
            a_EBF = a_BEF.transpose(0, 1)
            along_EBF = torch.bmm(a_EBF, gram_EFF)
            if self.bias_ED is not None:
                along_EBF += 2 * torch.bmm(self.bias_ED.unsqueeze(1), down_EFD.transpose(1, 2))
            own_BE = (along_EBF * a_EBF).sum(2).T
            if self.bias_ED is not None:
                own_BE = own_BE + self.bias_ED.square().sum(1)
            own.append(own_BE)
        return torch.cat(own) * self.scale_T1

    @torch.no_grad()
    def see(self, h_TD: Tensor, experts: Experts) -> None:
        """Take the neurons as changed experts give them; what they are held to stays.

        Args:
            h_TD: The inputs, [T, D].
            experts: The same blocks with other thresholds.
        """
        weights = experts.weights()
        self._a_TEF = self._neurons(weights.cut_inputs(h_TD), weights)

    def _neurons(self, h_TD: Tensor, weights: ExpertWeights) -> Tensor:
        """Neurons of all blocks, [T, E, F]."""
        dtype = torch.bfloat16 if self._rounded else weights.up.dtype
        bias = None if weights.up_bias is None else weights.up_bias.to(dtype)
        weights = weights._replace(up=weights.up.to(dtype), up_bias=bias)
        parts = (block_neurons(h_BD.to(dtype), weights) for h_BD in h_TD.split(_BATCH))
        return torch.cat(list(parts))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Product of two matrices in float32, rounded or not as is all that is measured here."""
        if self._rounded:
            return (left.bfloat16() @ right.bfloat16()).float()
        return left @ right

    @torch.no_grad()
    def missing(self, tokens_B: Tensor, weights_BE: Tensor) -> Tensor:
        """What the weights leave out of the output, unscaled, [B, D].

        Args:
            tokens_B: Which tokens, [B] int64.
            weights_BE: Weight of every block, [B, E].
        """
        parts = self.batches(tokens_B, weights_BE)
        return torch.cat([self._missing(tokens, part) for tokens, part in parts])

    def _missing(self, tokens_B: Tensor, weights_BE: Tensor) -> Tensor:
        used_BM = self.weighted(tokens_B, weights_BE)
        r_BD = self._y_TD[tokens_B] - self.product(used_BM, self.down_MD)
        return r_BD if self.bias_ED is None else r_BD - weights_BE @ self.bias_ED

    def weighted(self, tokens_B: Tensor, weights_BE: Tensor) -> Tensor:
        """Neurons, each times the weight of its block, [B, M].

        Args:
            tokens_B: Which tokens, [B] int64.
            weights_BE: Weight of every block, [B, E].
        """
        return (self._a_TEF[tokens_B] * weights_BE.unsqueeze(2)).flatten(1)

    @staticmethod
    def batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split tensors of the same tokens alike, to bound what is made of them."""
        return zip(*(tensor.split(_BATCH) for tensor in tensors), strict=True)

    @torch.no_grad()
    def error(self, tokens_B: Tensor, weights_BE: Tensor, added_BD: Tensor | None = None) -> float:
        """Mean over some tokens of the scaled squared error that the weights leave.

        Args:
            tokens_B: Which tokens, [B] int64.
            weights_BE: Weight of every block, [B, E].
            added_BD: What is added to the blocks that are on, [B, D], or none.
        """
        r_BD = self.missing(tokens_B, weights_BE)
        if added_BD is not None:
            r_BD -= added_BD
        return float((r_BD.square().sum(1) * self.scale_T1[tokens_B, 0]).mean())

    @torch.no_grad()
    def savings(self, tokens_B: Tensor, on_BE: Tensor) -> Tensor:
        """How much lower the error is with a block on than off, the others as they are, [B, E].

        Args:
            tokens_B: Which tokens, [B] int64.
            on_BE: Which blocks are on, [B, E] bool.
        """
        a_BEF = self._a_TEF[tokens_B]
        used_BM = (a_BEF * on_BE.unsqueeze(2)).flatten(1)
        r_BD = self._y_TD[tokens_B] - self.product(used_BM, self.down_MD)
        if self.bias_ED is not None:
            r_BD -= on_BE.to(r_BD.dtype) @ self.bias_ED
        along_BEF = self.product(r_BD, self.down_MD.T).view_as(a_BEF)
        along_BE = along_BEF.mul_(a_BEF).sum(2)
        if self.bias_ED is not None:
            along_BE += r_BD @ self.bias_ED.T
        # What is missing contains the block itself where it is off.
        own_BE = self.own_TE[tokens_B]
        saved_BE: Tensor = 2 * along_BE * self.scale_T1[tokens_B]
        return saved_BE + torch.where(on_BE, own_BE, -own_BE)


def rounds() -> bool:
    """Whether this processor multiplies bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()


def fit_router(
    router: SigmoidThreshold,
    experts: Experts,
    h_TD: Tensor,
    active: float,
    *,
    shared: Experts | None = None,
    steps: int,
    seed: int,
) -> tuple[float, ...]:
    """Train a layer's router, in place, to lose least at an active fraction.

    Args:
        router: Its weight and bias are written.
        experts: The blocks it gates.
        h_TD: Inputs of the layer, [T, D].
        active: Share of the gates to be on, in (0, 1).
        shared: What is always on beside the blocks.
        steps: Adam steps of 512 tokens.
        seed: Of the batches.

    Returns:
        Relative squared error of the layer's output with each of `FRACTIONS` on, on tokens held out
        of the fit.
    """
    assert router.bias is not None
    sample = Sample.draw(h_TD, router.num_experts * experts.width, seed)
    h_TD, num_train = sample.h_TD, sample.num_train
    generator = torch.Generator().manual_seed(seed)
    errors = BlockErrors(h_TD, experts, shared=shared, rounded=rounds())

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
        if router.down is not None:
            # The nearest of that rank, as the scores of whitened inputs count it.
            left_EK, sizes_K, right_KD = torch.linalg.svd(weight_ED, full_matrices=False)
            rank = len(router.down)
            left_ER, right_RD = left_EK[:, :rank] * sizes_K[:rank], right_KD[:rank]
            weight_ED = left_ER @ right_RD
            router.weight.copy_(left_ER)
            router.down.copy_(right_RD @ whiten_DD)
        held_BE = x_TD[sample.held_B] @ weight_ED.T + bias_E
        shift = _shift(held_BE, active, router.threshold)
        folded_ED = weight_ED @ whiten_DD
        if router.down is None:
            router.weight.copy_(folded_ED)
        router.bias.copy_(bias_E - shift - folded_ED @ mean_D)
        return _measure(router, held_BE, errors, sample.held_B)


@torch.no_grad()
def move_bias(router: SigmoidThreshold, h_TD: Tensor, share: float) -> Tensor:
    """Move a router's bias to where a share of its gates is on for some inputs.

    Args:
        router: Its bias is written.
        h_TD: Inputs of the layer, [T, D].
        share: In (0, 1].

    Returns:
        Gate logits of the inputs with the bias moved, [T, E].
    """
    assert router.bias is not None
    scores_TE = router.scores(h_TD)
    shift = _shift(scores_TE, share, router.threshold)
    router.bias.sub_(shift)
    return scores_TE - shift


def _measure(
    router: SigmoidThreshold, scores_BE: Tensor, errors: BlockErrors, tokens_B: Tensor
) -> tuple[float, ...]:
    """Measure a router moved to every fraction."""
    measured = []
    for fraction in FRACTIONS:
        shift = _shift(scores_BE, fraction, router.threshold)
        measured.append(errors.error(tokens_B, router.decide(scores_BE - shift).weights_TE()))
    return tuple(measured)


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
