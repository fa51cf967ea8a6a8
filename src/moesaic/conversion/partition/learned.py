"""Blocks trained for what a router can switch off, after DOT-MoE, arXiv:2606.01666.

The paper's idea: the assignment of neurons to blocks is a transport plan with equal loads, relaxed
with Sinkhorn's iterations and made hard on the way forward, and it is trained together with the
router on the error of the layer's output. Known to us from its abstract; it released no code, and
the temperature, the schedule and the way to harden are ours.

Ours, too: training starts from the blocks of another partition. A block's score is the sum of
linear scores of its neurons, so a neuron that moves takes its part of the router along. The
assignment is hardened exactly. What passes straight through is no derivative but the change of the
error if a neuron moved: at its own block the derivative would count what the block's gate has from
that very neuron, and hold it there. Inputs are whitened, tokens weighed and the budget priced
as in `moesaic.conversion.gram_router`, which fits the router that is kept.

Letters: T tokens, B tokens of a batch, F neurons of the dense FFN, D model width, E experts.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.conversion.gram_router import Sample, cut, token_scale, whitening
from moesaic.conversion.partition._assignment import balanced_assignment
from moesaic.conversion.partition._base import PartitionInput
from moesaic.conversion.partition._common import number_blocks, order_by_block
from moesaic.conversion.partition._table import PARTITIONS

logger = logging.getLogger(__name__)

_BATCH = 512
# Standard deviation of block scores at the start, as in the fit of a router.
_SPREAD = 2.0
_RIDGE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedConfig:
    """Settings of the trained partition.

    Attributes:
        start: Partition that training starts from, with its default settings.
        active: Fraction of blocks that is on in training; the fraction the model is to run at.
        steps: Adam steps of 512 tokens; 0 keeps the start.
        temperature: Of Sinkhorn's relaxation. Higher spreads the gradient over more blocks.
        learning_rate: Of the assignment, in logits, where a neuron's block starts log(E) times the
            temperature ahead. A few blocks bear more; with many, noise moves neurons.
        router_rate: Learning rate of the scores that stand for the router.
    """

    start: str = "coactivation"
    active: float = 0.5
    steps: int = 150
    temperature: float = 1.0
    learning_rate: float = 0.12
    router_rate: float = 3e-5

    def __post_init__(self) -> None:
        PARTITIONS[self.start]
        if self.start == "learned":
            raise InputError("start must be another partition, got 'learned'; take 'coactivation'")
        if not 0.0 < self.active < 1.0:
            raise InputError(
                f"active must be in (0, 1), got {self.active}; with all blocks on their neurons do "
                f"not matter"
            )
        if self.steps < 0:
            raise InputError(f"steps must be at least 0, got {self.steps}; 0 keeps the start")
        for name in ("temperature", "learning_rate", "router_rate"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise InputError(f"{name} must be above 0 and finite, got {value}")


def learned(source: PartitionInput, config: LearnedConfig) -> Tensor:
    """Train which neurons share a block.

    Three quarters of the tokens are used; the fit of a router with the same seed measures itself on
    the rest.

    Returns:
        The permutation, (F,) int64; blocks are sorted by what their neurons add to the output.

    Raises:
        InputError: If the statistic `h_TD`, a matrix or what `start` needs is missing, or the
            statistic is not finite or empty.
    """
    h_TD = source.stat("h_TD", "learned")
    if source.down_DF is None or source.neurons is None:
        raise InputError("partition 'learned' needs down_DF and neurons; give them to its input")
    if len(h_TD) == 0:
        raise InputError("h_TD has 0 tokens; calibrate on text")
    num_experts, num_neurons = source.num_experts, source.num_neurons
    order_F: Tensor = PARTITIONS.load(config.start)(source, PARTITIONS.load_config(config.start)())
    if num_experts in (1, num_neurons) or config.steps == 0:
        return order_F
    label_F = torch.empty_like(order_F)
    label_F[order_F] = torch.arange(num_neurons) // source.block_size
    with torch.enable_grad():
        training = _Training(source, h_TD, label_F, config)
        for _ in range(config.steps):
            training.step()
    moved = float((training.label_F != label_F).float().mean())
    logger.debug("%.1f%% of the neurons moved", 100 * moved)
    energy_F = training.layer.own_TF.mean(0).numpy()
    return order_by_block(number_blocks(training.label_F.numpy(), energy_F))


class _Layer:
    """The neurons of some tokens and what the output lacks without them."""

    @torch.no_grad()
    def __init__(self, source: PartitionInput, h_TD: Tensor) -> None:
        assert source.neurons is not None
        assert source.down_DF is not None
        self.down_FD = source.down_DF.detach().to("cpu", torch.float32).T.contiguous()
        self.a_TF = torch.cat([source.neurons(h_BD) for h_BD in h_TD.split(_BATCH)])
        energy = [(a_BF @ self.down_FD).square().sum(1) for a_BF in self.a_TF.split(_BATCH)]
        self.scale_T1 = token_scale(torch.cat(energy))
        self.own_TF = self.a_TF.square() * self.down_FD.square().sum(1) * self.scale_T1

    def savings(self, tokens_B: Tensor, on_BF: Tensor) -> Tensor:
        """How much lower the error is with a neuron on than off, the others as they are, [B, F]."""
        a_BF = self.a_TF[tokens_B]
        missing_BD = (a_BF * ~on_BF) @ self.down_FD
        along_BF = a_BF * (missing_BD @ self.down_FD.T) * self.scale_T1[tokens_B]
        own_BF = self.own_TF[tokens_B]
        # What is missing contains the neuron itself where it is off.
        return 2 * along_BF + torch.where(on_BF, own_BF, -own_BF)


class _Training:
    """Assignment and scores on their way."""

    def __init__(
        self, source: PartitionInput, h_TD: Tensor, label_F: Tensor, config: LearnedConfig
    ) -> None:
        self.config, self.label_F = config, label_F
        self.generator = torch.Generator().manual_seed(source.seed)
        sample = Sample.draw(h_TD, source.num_neurons, source.seed)
        h_TD = sample.h_TD[: sample.num_train]
        self.layer = _Layer(source, h_TD)
        mean_D, whiten_DD = whitening(h_TD)
        self.x_TD = (h_TD - mean_D) @ whiten_DD
        hard_FE = torch.nn.functional.one_hot(label_F, source.num_experts).float()
        score_DF, self.bias_F = _first_scores(self.x_TD, self.layer.own_TF)
        spread = ((self.x_TD @ score_DF + self.bias_F) @ hard_FE).std().clamp(min=1e-6)
        self.score_DF = (score_DF * (_SPREAD / spread)).requires_grad_()
        self.bias_F = self.bias_F * (_SPREAD / spread)
        self.lead = math.log(source.num_experts) * config.temperature
        self.logits_FE = (hard_FE * self.lead).requires_grad_()
        self.price_E = torch.zeros(source.num_experts)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [self.logits_FE], "lr": config.learning_rate},
                {"params": [self.score_DF], "lr": config.router_rate},
            ],
            # Gradients through the plan are far smaller than Adam's usual constant and shrink as it
            # settles; a long memory of larger ones would freeze it there.
            betas=(0.9, 0.99),
            eps=1e-15,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)

    def step(self) -> None:
        """Look at one batch, then move scores and assignment."""
        size, active = len(self.x_TD), self.config.active
        tokens_B = torch.randint(size, (min(_BATCH, size),), generator=self.generator)
        score_BF = self.x_TD[tokens_B] @ self.score_DF + self.bias_F
        plan_FE, self.price_E = sinkhorn(self.logits_FE / self.config.temperature, self.price_E)
        with torch.no_grad():
            sums_BE = _block_sums(score_BF, self.label_F, plan_FE.shape[1])
            sums_BE -= cut(sums_BE, active)
            saved_BF = self.layer.savings(tokens_B, (sums_BE > 0)[:, self.label_F])
            saved_BE = _block_sums(saved_BF, self.label_F, plan_FE.shape[1])
            gate_BE = sums_BE.sigmoid()
            price = cut(saved_BE, active)
            slope_BE = (price - saved_BE) * gate_BE * (1 - gate_BE)
            gain_FE = gains(saved_BF, score_BF, saved_BE - price, sums_BE, self.label_F)
        self.optimizer.zero_grad()
        torch.autograd.backward(
            [score_BF, plan_FE], [slope_BE[:, self.label_F] / len(tokens_B), -gain_FE]
        )
        self.optimizer.step()
        self.schedule.step()
        self._harden()

    @torch.no_grad()
    def _harden(self) -> None:
        # A lead without bound could not be made good before the end.
        self.logits_FE.clamp_(-self.lead, self.lead)
        cost_FE = -self.logits_FE.double() / self.config.temperature
        label = balanced_assignment(cost_FE.numpy(), self.price_E.double().numpy())
        self.label_F = torch.from_numpy(label)


def sinkhorn(logits_FE: Tensor, price_E: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Relax an assignment: rows sum to 1, columns to F / E.

    Sinkhorn's iterations in log space (Cuturi 2013) from given prices, which follow the logits from
    step to step, so that few are enough.

    Args:
        logits_FE: Divided by the temperature.
        price_E: What the columns paid last time; zeros at first.
        iterations: Over columns and rows.

    Returns:
        The plan, (F, E), and the prices of its columns.
    """
    size = logits_FE.shape[0] / logits_FE.shape[1]
    for _ in range(iterations):
        rows_FE = (logits_FE + price_E).log_softmax(1)
        price_E = price_E + math.log(size) - rows_FE.logsumexp(0)
    return (logits_FE + price_E).softmax(1), price_E.detach()


@torch.no_grad()
def gains(
    saved_BF: Tensor, score_BF: Tensor, worth_BE: Tensor, sums_BE: Tensor, label_F: Tensor
) -> Tensor:
    """What each neuron is worth in each block: with it there less without it, mean over tokens.

    A block is worth its saving less the price, times its gate; with neuron f its saving rises by
    saved_f and its score by score_f. To second order in the score for other blocks, exact for the
    block that the neuron is in.

    Args:
        saved_BF: Saving of every neuron.
        score_BF: Its part of the score.
        worth_BE: Saving of every block less the price.
        sums_BE: Score of every block less the threshold.
        label_F: Block of every neuron.

    Returns:
        Gain of neuron f in block e, (F, E).
    """
    gate_BE = sums_BE.sigmoid()
    first_BE = gate_BE * (1 - gate_BE)
    second_BE = first_BE * (1 - 2 * gate_BE)
    gain_FE = saved_BF.T @ gate_BE + score_BF.T @ (worth_BE * first_BE)
    gain_FE += (saved_BF * score_BF).T @ first_BE
    gain_FE += score_BF.square().T @ (worth_BE * second_BE) / 2
    without_BF = (worth_BE[:, label_F] - saved_BF) * (sums_BE[:, label_F] - score_BF).sigmoid()
    own_F = (worth_BE * gate_BE).sum(0)[label_F] - without_BF.sum(0)
    gain_FE.scatter_(1, label_F.unsqueeze(1), own_F.unsqueeze(1))
    return gain_FE / len(saved_BF)


def _block_sums(value_BF: Tensor, label_F: Tensor, num_experts: int) -> Tensor:
    """Sum over the neurons of every block, [B, E]."""
    order_F = label_F.argsort(stable=True)
    sums_BE: Tensor = value_BF[:, order_F].unflatten(1, (num_experts, -1)).sum(2)
    return sums_BE


def _first_scores(x_TD: Tensor, own_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of the log energy that each neuron adds; quiet neurons count as equal."""
    target_TF = torch.log1p(own_TF / own_TF.mean().clamp(min=1e-30))
    bias_F = target_TF.mean(0)
    cov_DD = x_TD.T @ x_TD / len(x_TD) + _RIDGE * torch.eye(x_TD.shape[1])
    slope_DF = x_TD.T @ (target_TF - bias_F) / len(x_TD)
    return torch.linalg.solve(cov_DD, slope_DF), bias_F
